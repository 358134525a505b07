"""The ledger's state after a cut: accounts, bonds, validators, models; its root, its snapshot, its invariants.

Money is integer nano-BLY. All of it is in accounts, in bonds or on its way back from a bond, and adds up to ``supply``
at every cut, exactly.

The state as *rows*: canonical arrays ``[table, [field, …]]``, sorted bytewise. The root is a hash of the RFC 6962 tree
over them, so one account can be proven to who knows the root; the rows themselves are the snapshot that a new node
starts from.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from blyan_node.chain.genesis import MAX_VALIDATORS, Genesis, Money, Parameters, Validator
from blyan_node.chain.keys import digest
from blyan_node.chain.merkle import Tree, leaf_hash
from blyan_node.chain.records import MAX_ARGUMENTS, Address, Amount, Hash, Layer, Manifest
from blyan_node.chain.validators import ValidatorSet
from blyan_node.codec import decode, encode, from_value, to_value
from blyan_node.errors import CodecError, ConfigError, RuleError

STATE_DOMAIN = b"blyan/state/1"
MAX_ROW = MAX_ARGUMENTS + 128
"""Bytes of the largest row: a manifest as it was published, and whose it is."""


@dataclass(frozen=True)
class Account:
    """``nonce`` is that of the sender's next record."""

    balance: int = 0
    nonce: int = 0


EMPTY = Account()


@dataclass(frozen=True, order=True)
class Unbonding:
    """Money on its way back to ``owner``, spendable at cut ``release``; ``source`` is the record that caused it."""

    release: int
    source: Hash
    owner: Address
    validator: Address
    amount: Amount


@dataclass(frozen=True)
class Model:
    """A published model, by the id of its manifest's record; ``owner`` sent it and alone publishes its layers."""

    owner: Address
    manifest: Manifest


@dataclass
class State:
    """The state after cut ``k``. Whoever folds a cut works on a copy; a state that was handed out does not change.

    ``validators`` decide cut k + 1 and ``next_validators`` cut k + 2: a cut names the set after it, and its proposer
    can know only what was final before. ``bonds`` maps (validator, owner) to an amount. ``minted`` are the receipts
    that have been paid, ``slashed`` maps the keys that were proven to cheat, and never validate again, to the cut that
    barred them. ``models`` stand in the order in which their manifests took effect; ``layers`` maps (model, unit) to
    the weights that count now.
    """

    parameters: Parameters
    k: int = 0
    supply: int = 0
    accounts: dict[bytes, Account] = field(default_factory=dict)
    bonds: dict[tuple[bytes, bytes], int] = field(default_factory=dict)
    unbonding: list[Unbonding] = field(default_factory=list)
    minted: set[bytes] = field(default_factory=set)
    slashed: dict[bytes, int] = field(default_factory=dict)
    validators: tuple[Validator, ...] = ()
    next_validators: tuple[Validator, ...] = ()
    models: dict[bytes, Model] = field(default_factory=dict)
    layers: dict[tuple[bytes, int], Layer] = field(default_factory=dict)

    def copy(self) -> State:
        """Return a state that can be changed without changing this one."""
        return replace(
            self,
            accounts=dict(self.accounts),
            bonds=dict(self.bonds),
            unbonding=list(self.unbonding),
            minted=set(self.minted),
            slashed=dict(self.slashed),
            models=dict(self.models),
            layers=dict(self.layers),
        )

    def account(self, address: bytes) -> Account:
        """Return an account; one that was never used is empty."""
        return self.accounts.get(address, EMPTY)

    def stake(self) -> dict[bytes, int]:
        """Return the stake that votes on cut k + 1, by validator."""
        return {validator.address: validator.stake for validator in self.validators}

    def may_author(self, address: bytes) -> bool:
        """Tell whether a key may write blocks anchored at this cut: it validates now or next, and never cheated."""
        members = {validator.address for validator in (*self.validators, *self.next_validators)}
        return address in members and address not in self.slashed

    def authors(self) -> tuple[bytes, ...]:
        """Return all keys that may write blocks anchored at this cut, sorted."""
        members = {validator.address for validator in (*self.validators, *self.next_validators)}
        return tuple(sorted(members - self.slashed.keys()))

    def bonded_by(self, owner: bytes) -> dict[bytes, int]:
        """Return what an address has bonded, by validator."""
        return {validator: amount for (validator, by), amount in sorted(self.bonds.items()) if by == owner}

    def is_due(self) -> bool:
        """Tell whether the next cut has something to do even without records: money to release."""
        return any(unbonding.release <= self.k + 1 for unbonding in self.unbonding)

    def total(self) -> int:
        """Add up all money there is: equal to ``supply``, always."""
        balances = sum(account.balance for account in self.accounts.values())
        return balances + sum(self.bonds.values()) + sum(unbonding.amount for unbonding in self.unbonding)

    def rows(self) -> list[bytes]:
        """Return the state as rows, sorted."""
        rows: list[Any] = [_Head(self.k, self.supply, self.parameters)]
        rows += [_Account(address, account.balance, account.nonce) for address, account in self.accounts.items()]
        rows += [_Bond(validator, owner, amount) for (validator, owner), amount in self.bonds.items()]
        rows += self.unbonding
        rows += map(_Minted, self.minted)
        rows += [_Slashed(address, k) for address, k in self.slashed.items()]
        rows += [_Validator(validator.address, validator.stake) for validator in self.validators]
        rows += [_Next(validator.address, validator.stake) for validator in self.next_validators]
        rows += [_Model(place, *entry) for place, entry in enumerate(self.models.items())]
        rows += self.layers.values()
        return sorted(encode([_TABLES.index(type(row)), to_value(row)]) for row in rows)

    def root(self) -> bytes:
        """Return the state root: digest("blyan/state/1", [number of rows, root of the Merkle tree over the rows])."""
        return root_of(self.rows())


def genesis_state(genesis: Genesis) -> State:
    """Return the state at cut 0: each validator's stake is bonded by itself, ``balances`` are what others own."""
    accounts = {balance.address: Account(balance.amount) for balance in genesis.balances}
    bonds = {(validator.address, validator.address): validator.stake for validator in genesis.validators}
    return State(
        genesis.parameters,
        supply=genesis.supply,
        accounts=accounts,
        bonds=bonds,
        slashed=dict.fromkeys(genesis.restart.barred, 0) if genesis.restart else {},
        validators=genesis.validators,
        next_validators=genesis.validators,
    )


def root_of(rows: Sequence[bytes]) -> bytes:
    """Return the root of a state from its rows, sorted: see :meth:`State.root`."""
    return digest(STATE_DOMAIN, encode([len(rows), Tree([leaf_hash(row) for row in rows]).root]))


def authors_between(deciders: ValidatorSet, later: ValidatorSet, k: int, state: State) -> tuple[bytes, ...]:
    """Return :meth:`State.authors` of an earlier cut ``k``, of which no state is here.

    ``deciders`` decided cut k + 1 and ``later`` cut k + 2: in the state of cut k these are the validators now and next.
    ``state`` is any state since, which tells who had been barred by then.
    """
    barred = {address for address, since in state.slashed.items() if since <= k}
    return tuple(sorted({*deciders.stakes, *later.stakes} - barred))


def choose_validators(state: State) -> tuple[Validator, ...]:
    """Return the keys with the most stake, at most 100, sorted by address; of equal stakes the lower address first.

    Keys below the least stake and keys that cheated are left out. Where nobody is left the old set stays, since
    without one no cut could ever be decided again.
    """
    stakes: defaultdict[bytes, int] = defaultdict(int)
    for (validator, _owner), amount in state.bonds.items():
        stakes[validator] += amount
    able = [
        Validator(address, stake)
        for address, stake in stakes.items()
        if stake >= state.parameters.min_stake and address not in state.slashed
    ]
    able.sort(key=lambda validator: (-validator.stake, validator.address))
    chosen = sorted(able[:MAX_VALIDATORS], key=lambda validator: validator.address)
    return tuple(chosen) or state.next_validators


def state_of_rows(rows: Iterable[bytes]) -> State:
    """Rebuild a state from its rows. Raises RuleError where they are not the rows of any state, or one is too large.

    The caller compares the root of what comes back with one that it trusts.
    """
    given = list(rows)
    state: State | None = None
    for raw in given:
        row = _parse(raw)
        if isinstance(row, _Head):
            state = State(row.parameters, row.k, row.supply)
        elif state is None:
            raise RuleError("a state's rows begin with its head")
        elif isinstance(row, _Account):
            state.accounts[row.address] = Account(row.balance, row.nonce)
        elif isinstance(row, _Bond):
            state.bonds[row.validator, row.owner] = row.amount
        elif isinstance(row, Unbonding):
            state.unbonding.append(row)
        elif isinstance(row, _Minted):
            state.minted.add(row.receipt)
        elif isinstance(row, _Slashed):
            state.slashed[row.address] = row.k
        elif isinstance(row, _Validator):
            state.validators += (Validator(row.address, row.stake),)
        elif isinstance(row, _Next):
            state.next_validators += (Validator(row.address, row.stake),)
        elif isinstance(row, _Model):
            state.models[row.id] = row.model
        else:
            state.layers[row.model, row.unit] = row
    if state is None or sorted(set(state.rows())) != given:
        raise RuleError("not the rows of a state: unsorted, doubled or without a head")
    if state.total() != state.supply or state.supply > state.parameters.cap:
        raise RuleError("the money of the state does not add up to its supply")
    for model, unit in state.layers:
        if model not in state.models or unit >= len(state.models[model].manifest.units):
            raise RuleError("a layer of the state belongs to no unit of its models")
    return state


@dataclass(frozen=True)
class _Head:
    k: int
    supply: Money
    parameters: Parameters


@dataclass(frozen=True)
class _Account:
    address: Address
    balance: Money
    nonce: int


@dataclass(frozen=True)
class _Bond:
    validator: Address
    owner: Address
    amount: Amount


@dataclass(frozen=True)
class _Minted:
    receipt: Hash


@dataclass(frozen=True)
class _Slashed:
    address: Address
    k: int


@dataclass(frozen=True)
class _Validator:
    address: Address
    stake: Amount


@dataclass(frozen=True)
class _Next:
    address: Address
    stake: Amount


@dataclass(frozen=True)
class _Model:
    place: int  # first, so that sorted rows hold the models in their order: encodings of ints sort like the ints
    id: Hash
    model: Model


_Row = _Head | _Account | _Bond | Unbonding | _Minted | _Slashed | _Validator | _Next | _Model | Layer
_TABLES: tuple[type[_Row], ...] = (
    _Head,
    _Account,
    _Bond,
    Unbonding,
    _Minted,
    _Slashed,
    _Validator,
    _Next,
    _Model,
    Layer,
)


def _parse(raw: bytes) -> _Row:
    value = decode(raw, most=MAX_ROW)
    if type(value) is not list or len(value) != 2 or type(value[0]) is not int or value[0] >= len(_TABLES):
        raise CodecError("not a row of a state")
    try:
        return from_value(_TABLES[value[0]], value[1])
    except ConfigError as error:
        raise RuleError(f"the parameters of the state are not usable: {error}") from error
