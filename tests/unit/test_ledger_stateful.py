"""Any history of records, in any order, with double spends and receipts: never negative, exact, minted once."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from blyan_node.chain.ledger import Receipt, Result, Void
from blyan_node.chain.records import BlobRef, Bond, Faucet, Layer, Manifest, Transfer, Unbond, make_record
from blyan_node.chain.state import state_of_rows
from tests.support.chains import NETWORK
from tests.support.money import CARRIER, USERS, VALIDATORS, carry, cut, double_block, double_vote, start

PEOPLE = [*VALIDATORS, *USERS]
people = st.sampled_from(PEOPLE)
amounts = st.one_of(st.integers(1, 60), st.integers(1, 1500))
fees = st.one_of(st.just(0), st.integers(0, 20))


class Money(RuleBasedStateMachine):
    """Writes records into a cut at any place, closes cuts, and keeps books of its own beside the ledger's."""

    def __init__(self) -> None:
        super().__init__()
        self.state = start()
        self.pending = []
        self.receipts = []
        self.paid: dict[bytes, int] = {}
        self.balances = {key.address: 0 for key in VALIDATORS} | {key.address: 1000 for key in USERS}

    def _write(self, key, arguments, fee, skew, place) -> None:
        waiting = sum(carried.record.sender == key.address for carried in self.pending)
        nonce = max(0, self.state.account(key.address).nonce + waiting + skew)
        record = make_record(key, NETWORK, arguments, nonce=nonce, fee=fee)
        slot = (record.sender, record.nonce)
        rival = next(
            (c.record for c in self.pending if (c.record.sender, c.record.nonce) == slot and not c.lost_to), None
        )
        if rival is not None and rival.id == record.id:
            return
        lost_to = None if rival is None else rival.id
        self.pending.insert(place % (len(self.pending) + 1), carry(record, lost_to=lost_to))

    skews = st.sampled_from([0, 0, 0, 0, -1, 1])
    places = st.integers(0, 50)

    @rule(key=people, payee=people, amount=amounts, fee=fees, skew=skews, place=places)
    def transfer(self, key, payee, amount, fee, skew, place):
        self._write(key, Transfer(payee.address, amount), fee, skew, place)

    @rule(key=people, validator=people, amount=amounts, fee=fees, skew=skews, place=places)
    def bond(self, key, validator, amount, fee, skew, place):
        self._write(key, Bond(validator.address, amount), fee, skew, place)

    @rule(key=people, validator=st.none() | people, amount=amounts, fee=fees, skew=skews, place=places)
    def unbond(self, key, validator, amount, fee, skew, place):
        self._write(key, Unbond((validator or key).address, amount), fee, skew, place)

    @rule(key=people, payee=people, amount=st.integers(1, 60), place=places)
    def faucet(self, key, payee, amount, place):
        self._write(key, Faucet(payee.address, amount), 0, 0, place)

    @rule(key=people, offender=people, prove=st.sampled_from([double_vote, double_block]), place=places)
    def accuse(self, key, offender, prove, place):
        self._write(key, prove(offender), 0, 0, place)

    @rule(delta=st.integers(0, 3), payee=people, index=st.integers(0, 1), amount=st.integers(1, 3000))
    def grant(self, delta, payee, index, amount):
        self.receipts.append(Receipt(bytes([delta]) * 32, payee.address, index, amount))

    @rule()
    def close(self):
        before, root = self.state, self.state.root()
        folded = cut(before, *self.pending, receipts=tuple(self.receipts))
        assert before.root() == root, "folding changes nothing that was handed out"
        assert folded == cut(before, *self.pending, receipts=tuple(self.receipts))
        assert len(folded.results) == len(self.pending) + len(self.receipts)
        results = {result.id: result.void for result in folded.results[: len(self.pending)]}
        assert results.keys() == {carried.record.id for carried in self.pending}
        for carried in self.pending:
            assert (carried.lost_to is not None) == (results[carried.record.id] is Void.LOST)
        for receipt, result in zip(self.receipts, folded.results[len(self.pending) :], strict=True):
            assert result.id == receipt.id
            if result.void is None:
                assert receipt.id not in self.paid, "a receipt mints once"
                self.paid[receipt.id] = receipt.amount
            else:
                assert (result.void is Void.MINTED) == (receipt.id in self.paid)
        for movement in folded.movements:
            self.balances[movement.address] = movement.balance
        self.state, self.pending, self.receipts = folded.state, [], []

    @invariant()
    def money_is_exact(self):
        state = self.state
        assert state.total() == state.supply <= state.parameters.cap
        assert all(account.balance >= 0 for account in state.accounts.values())
        assert all(amount > 0 for amount in state.bonds.values())
        assert all(unbonding.amount > 0 and unbonding.release > state.k for unbonding in state.unbonding)
        assert state.minted == set(self.paid)

    @invariant()
    def histories_tell_every_balance(self):
        for key in [*PEOPLE, CARRIER]:
            assert self.state.account(key.address).balance == self.balances.get(key.address, 0)

    @invariant()
    def there_is_always_a_set_of_validators(self):
        assert self.state.validators
        assert self.state.next_validators
        assert all(not self.state.may_author(address) for address in self.state.slashed)

    def teardown(self):
        self.close()
        assert state_of_rows(self.state.rows()) == self.state


TestMoney = Money.TestCase
TestMoney.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def draw_records(random_: random.Random, count: int) -> list:
    """Records of which no two are rivals; nonces may have gaps, and money may be short."""
    records = {}
    for _ in range(count):
        key, other = random_.choice(PEOPLE), random_.choice(PEOPLE).address
        nonce, fee = random_.randint(0, 3), random_.choice([0, 3, 30])
        kind = random_.choice([Transfer, Transfer, Transfer, Bond, Unbond])
        arguments = kind(other, random_.choice([1, 40, 100, 700, 1100]))
        records[key.address, nonce] = carry(make_record(key, NETWORK, arguments, nonce=nonce, fee=fee))
    return list(records.values())


@given(st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_the_places_of_transfers_and_bonds_do_not_matter(seed):
    """Copies in other places, or another order of concurrent blocks, change no outcome: see the ledger's docstring."""
    random_ = random.Random(seed)
    records = draw_records(random_, random_.randint(2, 24))
    expected = cut(start(), *records)
    for _ in range(4):
        random_.shuffle(records)
        folded = cut(start(), *records)
        assert folded.state == expected.state
        assert {each.id: each.void for each in folded.results} == {each.id: each.void for each in expected.results}


STEPS = st.lists(
    st.tuples(
        st.sampled_from(USERS[:2]),
        st.sampled_from(["manifest", "layer", "layer", "layer", "twins", "close"]),
        st.sampled_from([0, 0, 0, 1, 2]),  # which of the models so far, from the last
        st.sampled_from([0, 0, 1, 2]),  # which unit; there are two
        st.integers(0, 9),  # which weights
    ),
    min_size=12,
    max_size=40,
)


@given(STEPS)
@settings(max_examples=150, deadline=None)
def test_models_are_what_their_owners_made_of_them(steps):
    """However records are spread over cuts. A plain model beside the ledger says what becomes of each."""
    state, pending, expected = start(), [], []
    nonces = dict.fromkeys(USERS[:2], 0)
    owners: dict[bytes, bytes] = {}
    layers: dict[tuple[bytes, int], Layer] = {}
    for key, what, which, unit, number in [*steps, (USERS[0], "close", 0, 0, 0)]:
        if what == "close":
            folded = cut(state, *pending)
            assert list(folded.results) == expected
            state, pending, expected = folded.state, [], []
            assert [(id, model.owner) for id, model in state.models.items()] == list(owners.items())
            assert state.layers == layers
            assert state_of_rows(state.rows()) == state
            continue
        blob = BlobRef(bytes([number]) * 32, number)
        model = ([*owners][::-1] + 4 * [bytes(32)])[which]
        if what == "layer":
            arguments = Layer(model, unit, blob)
        else:
            arguments = Manifest("model", b"", ("embed", "head" if what == "manifest" else "embed"), blob)
        record = make_record(key, NETWORK, arguments, nonce=nonces[key])
        void = None
        if what == "manifest":
            owners[record.id] = key.address
        elif what == "twins":
            void = Void.TWIN_UNITS
        elif model not in owners:
            void = Void.NO_MODEL
        elif owners[model] != key.address:
            void = Void.NOT_OWNER
        elif unit > 1:
            void = Void.NO_UNIT
        else:
            layers[model, unit] = Layer(model, unit, blob)
        nonces[key] += void is None
        pending.append(carry(record))
        expected.append(Result(record.id, void))
