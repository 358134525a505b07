"""The ledger: a fold of ordered records over the state, one cut at a time. Pure; every node computes the same.

A cut is folded in these steps: the validators of the next cut take over; money whose unbonding is over is released;
the records, in order; receipts are minted; at the end of an epoch the validators after the next are chosen.

A record takes effect if its nonce is the sender's next and the balance suffices. What does not take effect is *void*,
with a reason: it changes nothing, costs nothing, never harms its block, and may be carried in again.

A record that stands too early, before its predecessor or before the money it spends, waits within the cut. So the
effect of transfers and bonds does not depend on their places at all: each account's own records follow their nonces,
and money that comes in can only help. Were it otherwise, a copy of somebody's payment in a withheld low block, before
the money for it arrived, would void a payment that everyone has acknowledged. For the same reason a void record does
not use up its nonce.

The fee goes to the author of the first block that carries the record, if it takes effect.

A manifest makes its sender the owner of a model. Only the owner publishes layers of it, and a later one, by nonce,
replaces an earlier one of the same unit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from blyan_node.chain.evidence import check_evidence
from blyan_node.chain.genesis import MILLION
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
    Record,
    Transfer,
    Unbond,
)
from blyan_node.chain.state import Account, Model, State, Unbonding, choose_validators
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
    TWIN_UNITS = "two units of the manifest have the same name"
    NO_MODEL = "no manifest of this model took effect before the layer"
    NOT_OWNER = "only the owner of a model, the sender of its manifest, publishes its layers"
    NO_UNIT = "the model has no unit of this number"


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

    A record comes out once in every cut that carries it: what took effect stands, and later copies are NONCE_USED; what
    was void may take effect in a later cut.
    """

    id: bytes
    void: Void | None


@dataclass(frozen=True)
class Movement:
    """An entry of an address's history: what happened to its money, and its balance afterwards.

    ``kind`` is that of the sender's own record, or ``received``, ``fee`` (earned by carrying), ``released``,
    ``slashed`` (a bond, not the balance) or ``reward``. ``source`` is the record or receipt. (``k``, ``index``) count
    up, so they order a history.
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
    """One cut in the making."""

    def __init__(self, state: State, network: bytes) -> None:
        self.state = state
        self.results: list[Result] = []
        self.movements: list[Movement] = []
        self._network = network
        self._from_faucet = 0
        self._waiting: dict[tuple[bytes, int], Carried] = {}

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
        for carried in records:
            record = carried.record
            if carried.lost_to is not None:
                self._void(carried, Void.LOST)
            elif record.expires_at_cut < self.state.k:
                self._void(carried, Void.EXPIRED)
            else:
                self._waiting[record.sender, record.nonce] = carried
                self._serve(record.sender)
        for (sender, nonce), carried in self._waiting.items():
            account = self.state.account(sender)
            if nonce != account.nonce:
                self._void(carried, Void.NONCE_USED if nonce < account.nonce else Void.NONCE_GAP)
            else:
                self._void(carried, Void.NO_FEE if carried.record.fee > account.balance else Void.INSUFFICIENT)

    def _serve(self, sender: bytes) -> None:
        """Carry out a sender's records while it is their turn, and those of others that waited for the money."""
        able = deque([sender])
        while able:
            slot = (address := able.popleft()), self.state.account(address).nonce
            if (carried := self._waiting.get(slot)) is None:
                continue
            judged = self._judge(carried.record)
            if judged is Void.NO_FEE or judged is Void.INSUFFICIENT:
                continue
            del self._waiting[slot]
            if isinstance(judged, Void):
                self._void(carried, judged)
                continue
            able += [address, *self._carry_out(carried, judged)]

    def _judge(self, record: Record) -> Void | Arguments:
        """Return the arguments of a record whose turn it is, or why it is void. Changes nothing."""
        state, account = self.state, self.state.account(record.sender)
        try:
            arguments = record.parsed()
        except RuleError:
            return Void.MALFORMED
        if record.fee > account.balance:
            return Void.NO_FEE
        void: Void | None = None
        match arguments:
            case Transfer(_, amount) if record.fee + amount > account.balance:
                void = Void.INSUFFICIENT
            case Bond(validator, amount):
                if validator in state.slashed:
                    void = Void.CHEATED
                elif record.fee + amount > account.balance:
                    void = Void.INSUFFICIENT
            case Unbond(validator, amount) if state.bonds.get((validator, record.sender), 0) < amount:
                void = Void.NOT_BONDED
            case Faucet(_, amount):
                void = self._judge_faucet(amount)
            case Evidence():
                void = self._judge_evidence(arguments)
            case Manifest(units=units) if len(set(units)) < len(units):
                void = Void.TWIN_UNITS
            case Layer():
                void = self._judge_layer(record.sender, arguments)
        return arguments if void is None else void

    def _judge_faucet(self, amount: int) -> Void | None:
        limits = self.state.parameters
        if not limits.faucet_per_cut:
            return Void.NO_FAUCET
        if amount > limits.faucet_per_record or self._from_faucet + amount > limits.faucet_per_cut:
            return Void.FAUCET_LIMIT
        return Void.CAP if self.state.supply + amount > limits.cap else None

    def _judge_evidence(self, evidence: Evidence) -> Void | None:
        try:
            offender = check_evidence(evidence, self._network)
        except RuleError:
            return Void.NO_PROOF
        state = self.state
        at_stake = any(validator == offender for validator, _ in state.bonds)
        at_stake = at_stake or any(unbonding.validator == offender for unbonding in state.unbonding)
        return None if at_stake and offender not in state.slashed else Void.NO_STAKE

    def _judge_layer(self, sender: bytes, layer: Layer) -> Void | None:
        if (model := self.state.models.get(layer.model)) is None:
            return Void.NO_MODEL
        if sender != model.owner:
            return Void.NOT_OWNER
        return None if layer.unit < len(model.manifest.units) else Void.NO_UNIT

    def _carry_out(self, carried: Carried, arguments: Arguments) -> tuple[bytes, ...]:
        """Do what a record says, and return who may have got money by it."""
        record, account = carried.record, self.state.account(carried.record.sender)
        self.state.accounts[record.sender] = Account(account.balance - record.fee, account.nonce + 1)
        other, amount = self._apply(record.sender, record.id, arguments)
        self._move(record.sender, record.kind, record.id, other, amount, fee=record.fee)
        if record.fee:
            self._credit(carried.author, record.fee)
            self._move(carried.author, "fee", record.id, record.sender, record.fee)
        self.results.append(Result(record.id, None))
        return (carried.author,) if other is None else (other, carried.author)

    def _apply(self, sender: bytes, id: bytes, arguments: Arguments) -> tuple[bytes | None, int]:
        """Apply arguments that were judged good; return the other side and the amount for the sender's history."""
        state = self.state
        match arguments:
            case Transfer(payee, amount):
                self._credit(sender, -amount)
                self._credit(payee, amount)
                self._move(payee, "received", id, sender, amount)
                return payee, amount
            case Bond(validator, amount):
                self._credit(sender, -amount)
                state.bonds[validator, sender] = state.bonds.get((validator, sender), 0) + amount
                return validator, amount
            case Unbond(validator, amount):
                self._loosen(id, validator, sender, state.bonds[validator, sender], amount)
                return validator, amount
            case Faucet(payee, amount):
                self._from_faucet += amount
                state.supply += amount
                self._credit(payee, amount)
                if payee != sender:
                    self._move(payee, "received", id, sender, amount)
                return payee, amount
            case Evidence():
                self._punish(id, check_evidence(arguments, self._network))
                return None, 0
            case Manifest():
                state.models[id] = Model(sender, arguments)
                return None, 0
            case Layer(model, unit):
                state.layers[model, unit] = arguments
                return None, 0

    def _loosen(self, id: bytes, validator: bytes, owner: bytes, bonded: int, amount: int) -> None:
        """Start to give back a part of a bond."""
        del self.state.bonds[validator, owner]
        if rest := bonded - amount:
            self.state.bonds[validator, owner] = rest
        release = self.state.k + self.state.parameters.unbonding
        self.state.unbonding.append(Unbonding(release, id, owner, validator, amount))
        self.state.unbonding.sort()

    def _punish(self, id: bytes, offender: bytes) -> None:
        """Burn a part of everything that stands behind an offender, give back the rest later, and bar its key."""
        state = self.state
        state.slashed[offender] = state.k
        bonds = sorted((owner, amount) for (validator, owner), amount in state.bonds.items() if validator == offender)
        for owner, amount in bonds:
            self._loosen(id, offender, owner, amount, amount)
        kept = [unbonding for unbonding in state.unbonding if unbonding.validator != offender]
        for unbonding in [unbonding for unbonding in state.unbonding if unbonding.validator == offender]:
            burnt = unbonding.amount * state.parameters.slash_millionths // MILLION
            state.supply -= burnt
            if rest := unbonding.amount - burnt:
                kept.append(replace(unbonding, amount=rest))
            self._move(unbonding.owner, "slashed", id, offender, burnt)
        state.unbonding = sorted(kept)

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

    def _void(self, carried: Carried, void: Void) -> None:
        self.results.append(Result(carried.record.id, void))

    def _move(
        self, address: bytes, kind: str, source: bytes, other: bytes | None, amount: int, *, fee: int = 0
    ) -> None:
        balance = self.state.account(address).balance
        index = len(self.movements)
        self.movements.append(Movement(address, self.state.k, index, kind, source, other, amount, fee, balance))
