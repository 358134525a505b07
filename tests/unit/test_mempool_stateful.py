"""Any history of records, blocks and cuts: a bounded mempool, and blocks in which everything takes effect."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from blyan_node.chain.block import CHAINS, encode_body
from blyan_node.chain.mempool import MOST_OF_A_SENDER, TOO_EARLY, Mempool, chain_of
from blyan_node.chain.records import BlobRef, Bond, Faucet, Layer, Transfer, Unbond, make_record
from blyan_node.codec import MAX_INT, pack
from blyan_node.errors import RequestError
from tests.support.chains import NETWORK
from tests.support.mempools import Books
from tests.support.money import CARRIER, USERS, VALIDATORS, start

MOST_RECORDS, MOST_BYTES, BODY = 12, 3000, 1500
PEOPLE = [*VALIDATORS[:1], *USERS[:3]]
people = st.sampled_from(PEOPLE)
amounts = st.one_of(st.integers(1, 60), st.integers(1, 1500))


class Waiting(RuleBasedStateMachine):
    """Users send records, here or to somebody else; validators carry what the mempool picks; cuts are decided."""

    def __init__(self) -> None:
        super().__init__()
        self.books = Books(start())
        self.pool = Mempool(NETWORK, most_records=MOST_RECORDS, most_bytes=MOST_BYTES)
        self.now = 0

    def _record(self, key, arguments, fee, skew, lasts):
        nonce = max(0, self.pool.next_nonce(key.address, self.books.view()) + skew)
        expires = MAX_INT if lasts is None else self.books.state.k + lasts
        return make_record(key, NETWORK, arguments, nonce=nonce, fee=fee, expires_at_cut=expires)

    def _arguments(self, kind, other, amount):
        if kind is Layer:
            return Layer(bytes(32), amount % 7, BlobRef(bytes(32), amount))
        return kind(other.address, amount)

    @rule(
        key=people,
        other=people,
        kind=st.sampled_from([Transfer, Transfer, Transfer, Bond, Unbond, Faucet, Layer]),
        amount=amounts,
        fee=st.integers(0, 40),
        skew=st.sampled_from([0, 0, 0, 0, -1, -2, 1, 2]),
        lasts=st.sampled_from([None, None, None, 0, 1, 2]),
        held=st.sampled_from([0, 0, 0, 500, 2000]),
    )
    def send(self, key, other, kind, amount, fee, skew, lasts, held):
        record = self._record(key, self._arguments(kind, other, amount), fee, skew, lasts)
        view = self.books.view()
        before = {waiting.id: waiting for waiting in self.pool.records()}
        rival = {(each.sender, each.nonce): each for each in before.values()}.get((record.sender, record.nonce))
        try:
            new = self.pool.add(record, view, now_ms=self.now, not_before=self.now + held)
        except RequestError:
            assert record.id not in self.pool
            return
        if not new:
            assert record.id in before or view.standing(record.id).void is None
            return
        assert record.id in self.pool
        assert record.nonce >= view.next_nonce(record.sender)
        assert record.expires_at_cut >= view.tentative.k
        if rival is not None and rival.nonce >= view.next_nonce(record.sender):
            assert record.fee > rival.fee
            assert rival.id not in self.pool
        for gone in before.keys() - {each.id for each in self.pool.records()}:
            self._went_rightly(before[gone], record, rival, view)

    def _went_rightly(self, gone, newcomer, rival, view):
        """Who had to go for a newcomer was stale, replaced, could not be carried yet, or paid less than others."""
        if gone == rival or gone.nonce < view.next_nonce(gone.sender) or gone.expires_at_cut < view.tentative.k:
            return
        ahead = [newcomer, *self.pool.records()]
        places = {each.nonce for each in (*ahead, gone) if each.sender == gone.sender}
        in_turn = all(nonce in places for nonce in range(view.next_nonce(gone.sender), gone.nonce))
        same = [each for each in ahead if each.sender == gone.sender and each.nonce <= gone.nonce]
        worth = min(each.fee / len(pack(each)) for each in (*same, gone))
        poor = worth <= newcomer.fee / len(pack(newcomer))
        assert poor or not in_turn or gone.sender == newcomer.sender

    @rule(key=people, other=people, amount=amounts, fee=st.integers(0, 40))
    def send_to_somebody_else(self, key, other, amount, fee):
        nonce = self.books.view().next_nonce(key.address)
        self.books.carry(make_record(key, NETWORK, Transfer(other.address, amount), nonce=nonce, fee=fee))

    @precondition(lambda self: len(self.pool) > 0)
    @rule(number=st.integers(0, MOST_RECORDS))
    def somebody_else_carries(self, number):
        records = list(self.pool.records())
        self.books.carry(records[number % len(records)])

    @rule(most=st.integers(1, 6))
    def carry(self, most):
        """All that is picked takes effect, in the order in which it was picked."""
        view = self.books.view()
        if (chain := self.pool.next_chain(view, now_ms=self.now)) is None:
            return
        picked = self.pool.pick(view, chain=chain, now_ms=self.now, most_records=most, most_bytes=BODY)
        assert picked, "a chain is only named for what can be carried"
        assert len(picked) <= most
        assert len(encode_body(picked)) <= BODY
        assert {chain_of(record.kind) for record in picked} == {chain}
        following = {}
        for record in picked:
            slot = following.get(record.sender, view.next_nonce(record.sender))
            while self._comes_early(view, record.sender, slot):
                slot += 1
            assert record.nonce == slot
            following[record.sender] = slot + 1
        self.books.carry(*picked)
        after = self.books.view()
        for record in picked:
            assert after.standing(record.id).void is None or self._is_unlucky(record)
        self.pool.prune(after)

    def _in_blocks(self, sender):
        return [record for item in self.books.items for record in item.records if record.sender == sender]

    def _comes_early(self, view, sender, nonce):
        """Whether a block carries the record of this nonce already, too early."""
        placed = (record for record in self._in_blocks(sender) if record.nonce == nonce)
        return any(view.standing(record.id) == TOO_EARLY for record in placed)

    def _is_unlucky(self, record):
        """Whether it may be void though the sender's waiting records did not tell: another validator carries a rival
        of it or of one before it, or the faucet, which all share in a cut, has given enough.
        """
        others = [each for each in self._in_blocks(record.sender) if each.nonce <= record.nonce]
        slots = [each.nonce for each in {each.id: each for each in others}.values()]
        return len(set(slots)) < len(slots) or "faucet" in {each.kind for each in others}

    @rule()
    def close(self):
        self.books.close()
        self.pool.prune(self.books.view())

    @rule()
    def prune(self):
        self.pool.prune(self.books.view())

    @rule(ms=st.sampled_from([100, 1000]))
    def wait(self, ms):
        self.now += ms

    @invariant()
    def it_is_bounded_and_its_sums_are_right(self):
        records = list(self.pool.records())
        assert len(records) == len(self.pool) <= MOST_RECORDS
        assert sum(len(pack(record)) for record in records) == self.pool.size <= MOST_BYTES
        assert len({(record.sender, record.nonce) for record in records}) == len(records)
        assert len(self.pool._cheapest) == len(records)
        assert self.pool._cheapest == sorted(self.pool._cheapest)
        assert {worth[-1] for worth in self.pool._cheapest} == {record.id for record in records}
        assert sum(len(queue.waiting) for queue in self.pool._queues.values()) == len(records)
        assert all(0 < len(queue.waiting) <= MOST_OF_A_SENDER for queue in self.pool._queues.values())

    @invariant()
    def heads_are_served_by_their_fees(self):
        view = self.books.view()
        for chain in CHAINS:
            picked = self.pool.pick(view, chain=chain, now_ms=self.now)
            heads = [record for record in picked if record.nonce == view.next_nonce(record.sender)]
            rates = [record.fee * 1_000_000 // len(pack(record)) for record in heads]
            assert rates == sorted(rates, reverse=True)
            assert len({record.sender for record in picked}) == len(heads), "each sender's begin with its next one"

    def teardown(self):
        """In the end nothing that could be carried is left."""
        self.now += 10_000
        for _ in range(100):
            view = self.books.view()
            if (chain := self.pool.next_chain(view, now_ms=self.now)) is None:
                break
            self.books.carry(*self.pool.pick(view, chain=chain, now_ms=self.now), author=CARRIER)
            self.pool.prune(self.books.view())
        else:
            raise AssertionError("never done")


TestWaiting = Waiting.TestCase
TestWaiting.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
