"""What gets into the mempool, what goes out, in which order, and what has to go when it is full."""

from __future__ import annotations

from dataclasses import replace

import pytest

from blyan_node.chain.block import MAX_BODY, MAX_RECORDS, encode_body
from blyan_node.chain.keys import Key
from blyan_node.chain.mempool import MOST_OF_A_SENDER, Mempool, chain_of
from blyan_node.chain.records import (
    KINDS,
    BlobRef,
    Bond,
    Faucet,
    Layer,
    Manifest,
    Record,
    Transfer,
    make_record,
    sign_record,
)
from blyan_node.codec import pack
from blyan_node.errors import RequestError, RuleError, SignatureError
from tests.support.chains import NETWORK, STRANGER
from tests.support.mempools import Books
from tests.support.money import CARRIER, USERS, VALIDATORS, double_block, double_vote, start

ALICE, BOB, CAROL, DAVE = USERS


def pay(key: Key = ALICE, nonce: int = 0, *, to: Key = BOB, amount: int = 1, fee: int = 0, **options: int) -> Record:
    return make_record(key, NETWORK, Transfer(to.address, amount), nonce=nonce, fee=fee, **options)


class Pool(Mempool):
    """A mempool on books of its own."""

    def __init__(self, books: Books | None = None, **limits: int) -> None:
        super().__init__(NETWORK, **limits)
        self.books = books or Books()

    def put(self, *records: Record, now_ms: int = 0, not_before: int = 0) -> bool:
        return [self.add(record, self.books.view(), now_ms=now_ms, not_before=not_before) for record in records][-1]

    def take(self, chain: str = "T", *, now_ms: int = 0, **most: int) -> tuple[Record, ...]:
        return self.pick(self.books.view(), chain=chain, now_ms=now_ms, **most)

    def chain(self, now_ms: int = 0) -> str | None:
        return self.next_chain(self.books.view(), now_ms=now_ms)


# What comes in


def test_a_record_waits_and_is_picked_until_a_block_carries_it():
    pool, record = Pool(), pay()
    assert pool.put(record)
    assert record.id in pool
    assert pool.size == len(pack(record))
    assert pool.take() == (record,)
    assert pool.take() == (record,), "picking takes nothing away"
    pool.books.carry(record)
    assert pool.take() == ()
    pool.prune(pool.books.view())
    assert len(pool) == pool.size == 0
    assert not pool.put(record), "what took effect is known"
    pool.books.close()
    assert not pool.put(record)
    assert len(pool) == 0


def test_the_same_record_again_changes_nothing():
    pool = Pool()
    assert pool.put(pay())
    assert not pool.put(pay())
    assert len(pool) == 1


def forged(record: Record) -> Record:
    return replace(record, sender=BOB.address)


@pytest.mark.parametrize(
    ("record", "error"),
    [(make_record(ALICE, bytes(32), Transfer(BOB.address, 1), nonce=0), RuleError), (forged(pay()), SignatureError)],
    ids=["network", "signature"],
)
def test_what_no_honest_node_passes_on_is_told_apart(record, error):
    with pytest.raises(error) as raised:
        Pool().put(record)
    assert not isinstance(raised.value, RequestError)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (sign_record(ALICE, NETWORK, "data", b"", nonce=0), "kind is unknown"),
        (sign_record(ALICE, NETWORK, "transfer", b"\xc1", nonce=0), "do not parse"),
        (sign_record(ALICE, NETWORK, "transfer", b"\xc1", nonce=3), "do not parse"),
        (pay(expires_at_cut=0), "expires at cut 0 and the next cut is 1"),
        (pay(nonce=MOST_OF_A_SENDER), "the sender's next one is 0"),
        (pay(amount=1001), "balance is too small"),
        (pay(fee=1001), "cannot pay the fee"),
        (pay(fee=1, amount=1000), "balance is too small"),
        (pay(STRANGER), "balance is too small"),
        (pay(STRANGER, fee=1), "cannot pay the fee"),
        (pay(STRANGER, 1), "balance is too small"),
        (make_record(STRANGER, NETWORK, Faucet(BOB.address, 1), nonce=1, fee=1), "balance is too small"),
        (make_record(ALICE, NETWORK, Faucet(BOB.address, 51), nonce=0), "the faucet gives no more"),
    ],
)
def test_a_record_without_effect_is_refused_with_the_reason(record, reason):
    pool = Pool()
    with pytest.raises(RequestError, match=reason) as raised:
        pool.put(record)
    assert raised.value.param == "record"
    assert len(pool) == 0


def test_an_account_without_money_may_ask_the_faucet():
    pool = Pool()
    assert pool.put(make_record(STRANGER, NETWORK, Faucet(STRANGER.address, 50), nonce=0))
    assert pool.put(pay(STRANGER, 1, amount=50)), "and spend what it will get"


def test_a_record_that_expires_with_the_next_cut_is_taken():
    pool, record = Pool(), pay(expires_at_cut=1)
    pool.put(record)
    assert pool.take() == (record,)
    pool.books.carry(record)
    pool.books.close()
    assert pool.books.results[record.id].void is None


def test_a_used_nonce_is_refused():
    pool = Pool()
    pool.books.carry(pay(to=CAROL))
    with pytest.raises(RequestError, match="nonce 0 has been used: the sender's next one is 1"):
        pool.put(pay())


def test_the_fee_grows_with_the_size():
    pool = Pool(Books(start(fee_per_byte=2)))
    least = 2 * len(pack(pay(fee=500)))
    with pytest.raises(RequestError, match=f"this network asks {least}"):
        pool.put(pay(fee=least - 1))
    assert pool.put(pay(fee=least))


def test_records_are_judged_behind_those_that_wait():
    pool = Pool()
    pool.put(pay(amount=600), pay(nonce=1, amount=300))
    with pytest.raises(RequestError, match="balance is too small"):
        pool.put(pay(nonce=2, amount=101))
    assert pool.put(pay(nonce=2, amount=100))


def test_money_that_others_have_not_sent_yet_is_not_counted_on():
    pool, spent = Pool(), pay(STRANGER, amount=5)
    pool.put(pay(to=STRANGER, amount=5))
    with pytest.raises(RequestError, match="balance is too small"):
        pool.put(spent)
    pool.books.carry(pay(to=STRANGER, amount=5))
    assert pool.put(spent)


def test_what_waits_for_a_missing_record_must_be_payable():
    pool = Pool()
    pool.put(pay(amount=100), pay(nonce=5, amount=500), pay(nonce=7, amount=300, fee=50))
    with pytest.raises(RequestError, match="balance is too small"):
        pool.put(pay(nonce=6, amount=51))
    assert pool.put(pay(nonce=6, amount=50))


def test_a_sender_has_no_more_than_so_many_records():
    pool = Pool()
    pool.put(*(pay(nonce=nonce) for nonce in range(MOST_OF_A_SENDER)))
    with pytest.raises(RequestError, match="too far ahead"):
        pool.put(pay(nonce=MOST_OF_A_SENDER))
    assert len(pool) == MOST_OF_A_SENDER


def test_records_that_took_effect_since_do_not_count():
    pool = Pool()
    pool.put(*(pay(nonce=nonce) for nonce in range(MOST_OF_A_SENDER)))
    pool.books.carry(pay(), pay(nonce=1))
    assert pool.put(pay(nonce=MOST_OF_A_SENDER + 1))
    assert len(pool) == MOST_OF_A_SENDER - 1


# Replacement


def test_a_better_fee_replaces_a_waiting_record():
    pool, first = Pool(), pay(fee=100)
    pool.put(first)
    for fee in (99, 100, 109):
        with pytest.raises(RequestError, match="offer a fee of 110 nano-BLY"):
            pool.put(pay(to=CAROL, fee=fee))
    better = pay(to=CAROL, fee=110)
    assert pool.put(better)
    assert pool.take() == (better,)
    assert len(pool) == 1
    assert pool.size == len(pack(better))


def test_ten_per_cent_are_rounded_up():
    pool = Pool()
    pool.put(pay(fee=101))
    with pytest.raises(RequestError, match="offer a fee of 112 nano-BLY"):
        pool.put(pay(to=CAROL, fee=111))
    assert pool.put(pay(to=CAROL, fee=112))


def test_a_record_without_fee_is_replaced_for_one_nano():
    pool = Pool()
    pool.put(pay())
    with pytest.raises(RequestError, match="offer a fee of 1 nano"):
        pool.put(pay(amount=2))
    assert pool.put(pay(amount=2, fee=1))


def test_a_replacement_must_leave_itself_payable_and_may_orphan_later_ones():
    pool = Pool()
    pool.put(pay(amount=500), pay(nonce=1, amount=500))
    assert pool.put(pay(amount=800, fee=1))
    assert [record.nonce for record in pool.take()] == [0]
    assert len(pool) == 1, "what can no longer be paid goes when it is next looked at"


def test_what_is_in_a_block_is_not_replaced():
    pool, other = Pool(), pay(amount=900)
    pool.put(other)
    pool.books.carry(make_record(ALICE, NETWORK, Bond(BOB.address, 200), nonce=0))
    pool.prune(pool.books.view())
    assert len(pool) == 0
    # a waiting one that a block carries too early
    early = pay(nonce=2)
    pool.put(early)
    pool.books.carry(early)
    with pytest.raises(RequestError, match="is in a block and cannot be replaced"):
        pool.put(pay(nonce=2, fee=5))


# What goes out


def test_a_block_takes_who_pays_most_per_byte():
    pool = Pool()
    pool.put(pay(ALICE, fee=3), pay(BOB, fee=5), pay(CAROL, fee=4), pay(BOB, 1, fee=1), pay(BOB, 2, fee=9))
    assert [(record.sender, record.fee) for record in pool.take()] == [
        (BOB.address, 5),
        (CAROL.address, 4),
        (ALICE.address, 3),
        (BOB.address, 1),
        (BOB.address, 9),
    ]
    assert [record.fee for record in pool.take(most_records=2)] == [5, 4]


def test_ties_are_broken_the_same_way_everywhere():
    records = [pay(key) for key in USERS]
    one, other = Pool(), Pool()
    one.put(*records)
    other.put(*reversed(records))
    assert one.take() == other.take()


def test_what_waits_for_a_missing_record_is_not_carried():
    pool = Pool()
    pool.put(pay(nonce=1), pay(nonce=2))
    assert pool.take() == ()
    assert pool.chain() is None
    pool.put(pay(nonce=0))
    assert [record.nonce for record in pool.take()] == [0, 1, 2]


def test_a_block_is_never_too_large():
    pool = Pool(Books(start(fee_per_byte=0)))
    for key in USERS:
        pool.put(*(pay(key, nonce) for nonce in range(MOST_OF_A_SENDER)))
    pool.put(*(make_record(CARRIER, NETWORK, Faucet(BOB.address, 1), nonce=nonce) for nonce in range(20)))
    records = pool.take()
    assert len(records) == MAX_RECORDS
    assert len(encode_body(records)) <= MAX_BODY


def test_the_bytes_of_a_block_are_those_of_its_body():
    pool = Pool()
    pool.put(pay(), pay(BOB), pay(CAROL))
    size = len(pack(pay()))
    for most in range(size + 5, 4 * size):
        taken = pool.take(most_bytes=most)
        assert len(encode_body(taken)) <= most
        assert len(taken) >= min(3, (most - 5) // size)


def test_records_go_to_their_chains_the_longest_waiting_first():
    pool, root = Pool(), BlobRef(bytes(32), 1)
    manifest = make_record(BOB, NETWORK, Manifest("tiny", b"{}", ("embed",), root), nonce=0)
    pool.books.carry(manifest)
    layer = make_record(BOB, NETWORK, Layer(manifest.id, 0, root), nonce=1)
    after = pay(BOB, 2)
    proof = make_record(CAROL, NETWORK, double_vote(VALIDATORS[0]), nonce=0)
    pool.put(layer, after, now_ms=1)
    pool.put(pay(), now_ms=2)
    pool.put(proof, now_ms=3)
    order = []
    while chain := pool.chain(now_ms=9):
        taken = pool.take(chain, now_ms=9)
        assert taken
        assert {chain_of(record.kind) for record in taken} == {chain}
        order.append((chain, len(taken)))
        pool.books.carry(*taken)
        pool.prune(pool.books.view())
    assert order[0] == ("B", 1), "a sender's later records wait for another chain's block"
    assert sorted(order[1:]) == [("A", 1), ("T", 2)]


def test_every_kind_has_its_chain():
    assert {kind: chain_of(kind) for kind in KINDS} == {
        "manifest": "A",
        "evidence": "A",
        "layer": "B",
        "transfer": "T",
        "bond": "T",
        "unbond": "T",
        "faucet": "T",
    }


def test_what_is_held_back_waits_until_it_is_due():
    pool, record = Pool(), pay()
    pool.put(record, now_ms=1000, not_before=3000)
    pool.put(pay(BOB), now_ms=1000, not_before=2000)
    assert pool.take(now_ms=1999) == ()
    assert pool.chain(now_ms=1999) is None
    assert pool.due_at(now_ms=1000) == 2000
    assert pool.due_at(now_ms=2000) == 3000
    assert len(pool.take(now_ms=2000)) == 1
    assert not pool.put(record, now_ms=1500), "the user asks this very node"
    assert len(pool.take(now_ms=2000)) == 2
    assert pool.due_at(now_ms=2000) is None


def test_a_record_that_a_block_carries_too_early_is_not_carried_again():
    pool = Pool()
    records = [pay(nonce=nonce) for nonce in range(3)]
    pool.books.carry(records[1])
    pool.put(*records)
    assert [record.nonce for record in pool.take()] == [0, 2]
    pool.books.close()
    assert [record.nonce for record in pool.take()] == [0, 1, 2], "void by the cut, so it may be carried again"


def test_a_record_that_lost_the_faucets_race_tries_again_after_the_cut():
    pool = Pool()
    late = make_record(ALICE, NETWORK, Faucet(ALICE.address, 50), nonce=0)
    pool.put(late, pay(nonce=1))
    pool.books.carry(make_record(BOB, NETWORK, Faucet(BOB.address, 50), nonce=0), late)
    assert pool.take() == (), "it is void in the tentative cut, and those behind it would be"
    assert pool.chain() is None
    pool.prune(pool.books.view())
    pool.books.close()
    assert [record.nonce for record in pool.take()] == [0, 1]


def test_what_is_expired_goes():
    pool = Pool()
    pool.put(pay(expires_at_cut=1), pay(nonce=1), pay(BOB))
    pool.books.close()
    pool.prune(pool.books.view())
    assert {record.nonce for record in pool.records()} == {0, 1}
    assert [record.sender for record in pool.take()] == [BOB.address]


def test_what_has_become_impossible_goes():
    pool = Pool()
    pool.put(pay(amount=600), pay(nonce=1, amount=300))
    pool.books.carry(pay(amount=900, to=CAROL))
    pool.prune(pool.books.view())
    assert len(pool) == 0


def test_evidence_that_came_too_late_goes_when_it_is_reached():
    pool = Pool()
    pool.put(make_record(ALICE, NETWORK, double_vote(VALIDATORS[0]), nonce=0))
    pool.books.carry(make_record(BOB, NETWORK, double_block(VALIDATORS[0]), nonce=0))
    assert pool.chain() is None
    assert len(pool) == 0


def test_the_next_nonce_counts_what_waits_in_turn():
    pool = Pool()
    view = pool.books.view()
    assert pool.next_nonce(ALICE.address, view) == 0
    pool.put(pay(), pay(nonce=1), pay(nonce=3))
    assert pool.next_nonce(ALICE.address, view) == 2


# When it is full


def test_when_full_the_cheapest_goes_or_the_newcomer():
    pool = Pool(most_records=3)
    pool.put(pay(ALICE, fee=5), pay(BOB, fee=3), pay(CAROL, fee=4))
    with pytest.raises(RequestError, match="the mempool is full") as raised:
        pool.put(pay(DAVE, fee=3))
    least = int(str(raised.value).split("a fee of ")[1].split(" ")[0])
    assert least == 4
    assert pool.put(pay(DAVE, fee=least))
    assert {record.sender for record in pool.records()} == {ALICE.address, CAROL.address, DAVE.address}


def test_the_bytes_are_bounded_too():
    size = len(pack(pay(fee=1)))
    pool = Pool(most_bytes=2 * size + 1)
    pool.put(pay(ALICE, fee=2), pay(BOB, fee=1), pay(CAROL, fee=3))
    assert pool.size <= 2 * size + 1
    assert {record.fee for record in pool.records()} == {2, 3}


def test_a_record_never_goes_before_those_that_need_it():
    pool = Pool(most_records=4)
    pool.put(pay(fee=1), pay(nonce=1, fee=50), pay(nonce=2, fee=50), pay(BOB, fee=5))
    pool.put(pay(CAROL, fee=5))
    assert sorted((record.sender == ALICE.address, record.nonce) for record in pool.records()) == [
        (False, 0),
        (False, 0),
        (True, 0),
        (True, 1),
    ]


def test_what_cannot_be_carried_yet_goes_first():
    pool = Pool(most_records=2)
    pool.put(pay(nonce=1, fee=500), pay(BOB, fee=1))
    pool.put(pay(CAROL))
    assert {record.sender for record in pool.records()} == {BOB.address, CAROL.address}
    with pytest.raises(RequestError, match="predecessor is missing"):
        pool.put(pay(nonce=1, fee=500))


def test_a_replacement_takes_its_rivals_place():
    pool = Pool(most_records=2)
    pool.put(pay(fee=10), pay(BOB, fee=5))
    assert pool.put(pay(to=CAROL, fee=11))
    assert {record.fee for record in pool.records()} == {5, 11}


def test_a_replacement_that_is_larger_makes_room_for_the_difference():
    small, large = pay(fee=1), make_record(ALICE, NETWORK, double_vote(VALIDATORS[0]), nonce=0, fee=900)
    pool = Pool(most_bytes=len(pack(large)) + len(pack(small)))
    pool.put(small, pay(BOB, fee=2), pay(CAROL, fee=3))
    assert pool.put(large)
    assert {record.fee for record in pool.records()} == {900, 3}


def test_a_record_whose_predecessor_came_by_another_way_is_as_good_as_any():
    pool = Pool(most_records=2)
    pool.put(pay(nonce=1, fee=5), pay(BOB, fee=1))
    pool.books.carry(pay())
    pool.prune(pool.books.view())
    pool.put(pay(CAROL, fee=3))
    assert {record.fee for record in pool.records()} == {5, 3}


def test_a_record_whose_predecessor_was_dropped_goes_first():
    pool = Pool(most_records=2)
    pool.put(pay(fee=9), pay(nonce=1, fee=9))
    pool.drop(pay(fee=9).id)
    pool.put(pay(BOB, fee=1), pay(CAROL, fee=1))
    assert {record.fee for record in pool.records()} == {1}


def test_one_record_larger_than_all_the_rest_finds_room():
    large = make_record(ALICE, NETWORK, double_block(VALIDATORS[0]), nonce=0, fee=900)
    pool = Pool(most_bytes=len(pack(large)))
    pool.put(pay(BOB), pay(CAROL))
    pool.put(large)
    assert [record.id for record in pool.records()] == [large.id]
