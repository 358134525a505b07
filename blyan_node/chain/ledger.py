"""The ledger: a fold of ordered records over the state, one cut at a time. Pure; every node computes the same.

A cut is folded in these steps: the validators of the next cut take over; money whose unbonding is over is released;
the records, in order; receipts are minted; at the end of an epoch the validators after the next are chosen.

A record counts if its nonce is the sender's next. One that stands too early waits for its predecessor within the cut.
What does not count is void, with a reason, and never harms its block. There are two ways to be void: a record that
could not even pay its fee, or whose turn it is not, changes nothing and may be carried in again; a record whose turn
it was pays its fee and uses up its nonce whatever becomes of it, so its place in a block was paid for, and what was
judged stays judged. The fee goes to the author of the first block that carries it.

Kinds that other machines fold (manifest, layer) only pay here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from blyan_node.chain.evidence import check_evidence
from blyan_node.chain.keys import digest
from blyan_node.chain.order import Carried
from blyan_node.chain.records import (
    Address,
    Amount,
    Arguments,
    Bond,
    Evidence,
    Faucet,
    Hash,
    Layer,
    Manifest,
    Transfer,
    Unbond,
)
from blyan_node.chain.state import MILLION, Account, State, Unbonding, choose_validators
from blyan_node.codec import encode
from blyan_node.errors import RuleError

REWARD_DOMAIN = b"blyan/reward/1"


class Void(Enum):
    """Why a record, or a receipt, has no effect."""

    LOST = "the sender signed two records with this nonce, and more stake saw the other one first"
    EXPIRED = "the record has expired"
    NONCE_USED = "the nonce has been used"
    NONCE_GAP = "the sender's record before this one is missing"
    NO_FEE = "the sender cannot pay the fee"
    MALFORMED = "the kind is unknown, or the arguments do not parse"
    INSUFFICIENT = "the sender's balance is too small"
    NOT_BONDED = "the sender has not bonded that much to this validator"
    CHEATED = "the validator was proven to cheat and takes no more bonds"
    NO_FAUCET = "this network has no faucet"
    FAUCET_LIMIT = "the faucet gives no more in one record, or in this cut"
    CAP = "all the money that may ever exist has been made"
    NO_PROOF = "the evidence proves nothing"
    NO_STAKE = "the offender was slashed before, or has nothing at stake"
    MINTED = "the receipt has been paid"


@dataclass(frozen=True)
class Receipt:
    """A reward that the proof-of-learning machine grants: to ``payee``, the ``index``-th one of ``delta``."""

    delta: Hash
    payee: Address
    index: int
    amount: Amount

    @property
    def id(self) -> bytes:
        """What is paid once: digest("blyan/reward/1", [delta, payee, index])."""
        return digest(REWARD_DOMAIN, encode([self.delta, self.payee, self.index]))


@dataclass(frozen=True)
class Result:
    """What became of a record or a receipt. ``void`` is None where it took effect.

    A later copy of a record that took effect comes out as NONCE_USED; the first result is the one that stands.
    """

    id: bytes
    void: Void | None


@dataclass(frozen=True)
class Movement:
    """An entry of an address's history: what happened to its money, and its balance afterwards.

    ``kind`` is that of the sender's own record, or ``received``, ``fee`` (earned by carrying), ``released``,
    ``slashed`` (a bond, not the balance) or ``reward``. ``source`` is the record or receipt. A void record's amount is
    0. (``k``, ``index``) count up, so they order a history.
    """

    address: bytes
    k: int
    index: int
    kind: str
    source: bytes
    other: bytes | None
    amount: int
    fee: int
    balance: int
    void: Void | None = None


@dataclass(frozen=True)
class Folded:
    """A cut's effect: the state after it, the results in order, and the entries for the histories."""

    state: State
    results: tuple[Result, ...]
    movements: tuple[Movement, ...]


def fold(
    state: State,
    records: Sequence[Carried],
    *,
    network: bytes,
    receipts: Iterable[Receipt] = (),
) -> Folded:
    """Fold the cut after ``state``, which stays as it is.

    ``records`` come from :func:`blyan_node.chain.order.order`; their signatures were checked with their blocks.
    """
    step = _Step(state.copy(), network)
    step.begin()
    step.take(records)
    for receipt in receipts:
        step.mint(receipt)
    step.end()
    return Folded(step.state, tuple(step.results), tuple(step.movements))


class _Step:
    """One cut in the making. Methods that judge return the reason why not, or None and have taken effect."""

    def __init__(self, state: State, network: bytes) -> None:
        self.state = state
        self.results: list[Result] = []
        self.movements: list[Movement] = []
        self._network = network
        self._from_faucet = 0

    def begin(self) -> None:
        state = self.state
        state.k += 1
        state.validators = state.next_validators
        due = [unbonding for unbonding in state.unbonding if unbonding.release <= state.k]
        state.unbonding = [unbonding for unbonding in state.unbonding if unbonding.release > state.k]
        for unbonding in due:
            self._credit(unbonding.owner, unbonding.amount)
            self._move(unbonding.owner, "released", unbonding.source, unbonding.validator, unbonding.amount)

    def end(self) -> None:
        if self.state.k % self.state.parameters.epoch == 0:
            self.state.next_validators = choose_validators(self.state)

    def take(self, records: Sequence[Carried]) -> None:
        waiting: dict[tuple[bytes, int], Carried] = {}
        for carried in records:
            record = carried.record
            if carried.lost_to is not None:
                self._void(carried, Void.LOST)
            elif record.expires_at_cut < self.state.k:
                self._void(carried, Void.EXPIRED)
            else:
                waiting[record.sender, record.nonce] = carried
            slot = (record.sender, self.state.account(record.sender).nonce)
            while (ready := waiting.pop(slot, None)) is not None and self._serve(ready):
                slot = (slot[0], slot[1] + 1)
        for (sender, nonce), carried in waiting.items():
            used = nonce < self.state.account(sender).nonce
            self._void(carried, Void.NONCE_USED if used else Void.NONCE_GAP)

    def _serve(self, carried: Carried) -> bool:
        """Judge a record whose turn it is; tell whether it used up its nonce."""
        record, account = carried.record, self.state.account(carried.record.sender)
        if record.fee > account.balance:
            self._void(carried, Void.NO_FEE)
            return False
        self.state.accounts[record.sender] = Account(account.balance - record.fee, account.nonce + 1)
        amount, other, void = 0, None, None
        try:
            arguments = record.parsed()
        except RuleError:
            void = Void.MALFORMED
        else:
            void = self._apply(record.sender, record.id, arguments)
            if void is None and not isinstance(arguments, Manifest | Layer | Evidence):
                amount = arguments.amount
                other = arguments.payee if isinstance(arguments, Transfer | Faucet) else arguments.validator
        self._move(record.sender, record.kind, record.id, other, amount, fee=record.fee, void=void)
        if record.fee:
            self._credit(carried.author, record.fee)
            self._move(carried.author, "fee", record.id, record.sender, record.fee)
        self.results.append(Result(record.id, void))
        return True

    def _apply(self, sender: bytes, id: bytes, arguments: Arguments) -> Void | None:
        match arguments:
            case Transfer(payee, amount):
                return self._transfer(sender, id, payee, amount)
            case Bond(validator, amount):
                return self._bond(sender, validator, amount)
            case Unbond(validator, amount):
                return self._unbond(sender, id, validator, amount)
            case Faucet(payee, amount):
                return self._faucet(sender, id, payee, amount)
            case Evidence():
                return self._punish(id, arguments)
            case Manifest() | Layer():
                return None

    def _transfer(self, sender: bytes, id: bytes, payee: bytes, amount: int) -> Void | None:
        if not self._debit(sender, amount):
            return Void.INSUFFICIENT
        self._credit(payee, amount)
        self._move(payee, "received", id, sender, amount)
        return None

    def _bond(self, sender: bytes, validator: bytes, amount: int) -> Void | None:
        if validator in self.state.slashed:
            return Void.CHEATED
        if not self._debit(sender, amount):
            return Void.INSUFFICIENT
        key = (validator, sender)
        self.state.bonds[key] = self.state.bonds.get(key, 0) + amount
        return None

    def _unbond(self, sender: bytes, id: bytes, validator: bytes, amount: int) -> Void | None:
        bonded = self.state.bonds.get((validator, sender), 0)
        if bonded < amount:
            return Void.NOT_BONDED
        self._loosen(id, validator, sender, bonded, amount)
        return None

    def _loosen(self, id: bytes, validator: bytes, owner: bytes, bonded: int, amount: int) -> None:
        """Start to give back a part of a bond."""
        del self.state.bonds[validator, owner]
        if rest := bonded - amount:
            self.state.bonds[validator, owner] = rest
        release = self.state.k + self.state.parameters.unbonding
        self.state.unbonding.append(Unbonding(release, id, owner, validator, amount))
        self.state.unbonding.sort()

    def _faucet(self, sender: bytes, id: bytes, payee: bytes, amount: int) -> Void | None:
        limits = self.state.parameters
        if not limits.faucet_per_cut:
            return Void.NO_FAUCET
        if amount > limits.faucet_per_record or self._from_faucet + amount > limits.faucet_per_cut:
            return Void.FAUCET_LIMIT
        if self.state.supply + amount > limits.cap:
            return Void.CAP
        self._from_faucet += amount
        self.state.supply += amount
        self._credit(payee, amount)
        if payee != sender:
            self._move(payee, "received", id, sender, amount)
        return None

    def _punish(self, id: bytes, evidence: Evidence) -> Void | None:
        """Burn a part of everything that stands behind an offender, give back the rest later, and bar its key."""
        state = self.state
        try:
            offender = check_evidence(evidence, self._network)
        except RuleError:
            return Void.NO_PROOF
        bonds = sorted((owner, amount) for (validator, owner), amount in state.bonds.items() if validator == offender)
        leaving = [unbonding for unbonding in state.unbonding if unbonding.validator == offender]
        if offender in state.slashed or not (bonds or leaving):
            return Void.NO_STAKE
        state.slashed.add(offender)
        for owner, amount in bonds:
            self._loosen(id, offender, owner, amount, amount)
        kept = [unbonding for unbonding in state.unbonding if unbonding.validator != offender]
        for unbonding in [unbonding for unbonding in state.unbonding if unbonding.validator == offender]:
            burnt = unbonding.amount * state.parameters.slash_millionths // MILLION
            state.supply -= burnt
            if rest := unbonding.amount - burnt:
                kept.append(Unbonding(unbonding.release, unbonding.source, unbonding.owner, unbonding.validator, rest))
            self._move(unbonding.owner, "slashed", id, offender, burnt)
        state.unbonding = sorted(kept)
        return None

    def mint(self, receipt: Receipt) -> None:
        """Pay a receipt unless it was paid; one that the cap leaves no room for may come again."""
        state = self.state
        void: Void | None = None
        if receipt.id in state.minted:
            void = Void.MINTED
        elif state.supply + receipt.amount > state.parameters.cap:
            void = Void.CAP
        else:
            state.minted.add(receipt.id)
            state.supply += receipt.amount
            self._credit(receipt.payee, receipt.amount)
            self._move(receipt.payee, "reward", receipt.id, None, receipt.amount)
        self.results.append(Result(receipt.id, void))

    def _credit(self, address: bytes, amount: int) -> None:
        account = self.state.account(address)
        self.state.accounts[address] = Account(account.balance + amount, account.nonce)

    def _debit(self, address: bytes, amount: int) -> bool:
        account = self.state.account(address)
        if account.balance < amount:
            return False
        self.state.accounts[address] = Account(account.balance - amount, account.nonce)
        return True

    def _void(self, carried: Carried, void: Void) -> None:
        """Note a record that changes nothing. Copies of old records make no history: anyone can carry them in."""
        self.results.append(Result(carried.record.id, void))
        if void is not Void.NONCE_USED:
            self._move(carried.record.sender, carried.record.kind, carried.record.id, None, 0, void=void)

    def _move(
        self,
        address: bytes,
        kind: str,
        source: bytes,
        other: bytes | None,
        amount: int,
        *,
        fee: int = 0,
        void: Void | None = None,
    ) -> None:
        balance = self.state.account(address).balance
        line = Movement(address, self.state.k, len(self.movements), kind, source, other, amount, fee, balance, void)
        self.movements.append(line)
