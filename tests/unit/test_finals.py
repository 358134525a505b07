"""What is final, in the database: read back whole or not at all, in pages, with anchors, and a vote log that ends."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from blyan_node.chain import finals as module
from blyan_node.chain.finals import Finals, movement_entry, row_key
from blyan_node.chain.ledger import Void
from blyan_node.chain.records import Transfer
from blyan_node.chain.replica import Replica
from blyan_node.chain.state import root_of
from blyan_node.chain.store import Batch, Prefix, Store
from blyan_node.codec import pack
from blyan_node.errors import StoreError
from tests.support.decided import GENESIS, NETWORK, USERS, VALIDATORS, Decided, write_chain

ALICE, BOB = USERS[:2]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[bytes, bytes]]:
    """All that the database of a chain of nine cuts holds."""
    directory = tmp_path_factory.mktemp("written") / "chain"
    write_chain(directory)
    with Store(directory) as store:
        return [(key, store.get(key) or b"") for key in store.keys(b"")]


@pytest.fixture
def store(written: list[tuple[bytes, bytes]], tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "chain") as store:
        store.write([*written])
        yield store


@pytest.fixture
def chain(tmp_path: Path) -> Iterator[Decided]:
    with Replica.open(tmp_path / "chain", GENESIS) as replica:
        yield Decided(replica)


def first(store: Store, prefix: Prefix, *parts: bytes | int) -> bytes:
    return next(iter(store.keys(prefix.key(*parts))))


# Damage


def lose_a_row(store: Store) -> Batch:
    return [(first(store, Prefix.ROW), None)]


def add_a_row(_store: Store) -> Batch:
    return [(row_key(b"more"), b"more")]


def change_a_row(store: Store) -> Batch:
    key = first(store, Prefix.ROW)
    return [(key, (store.get(key) or b"") + b"\0")]


def lose_the_state(store: Store) -> Batch:
    return [(key, None) for key in store.keys(Prefix.ROW.key())]


def lose_the_last_cut(store: Store) -> Batch:
    return [(Prefix.CUT.key(9), None)]


def garble_the_last_cut(_store: Store) -> Batch:
    return [(Prefix.CUT.key(9), b"garbage")]


def write_a_state_that_is_none(store: Store) -> Batch:
    stored = Finals(store, GENESIS).stored(9)
    assert stored is not None
    rows = [b"neither", b"nor"]
    batch: Batch = [*lose_the_state(store), *((row_key(row), row) for row in rows)]
    return [*batch, (Prefix.CUT.key(9), pack(replace(stored, root=root_of(rows))))]


DAMAGES = [
    lose_a_row,
    add_a_row,
    change_a_row,
    lose_the_state,
    lose_the_last_cut,
    garble_the_last_cut,
    write_a_state_that_is_none,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_state_is_not_read(damage, store: Store):
    assert Finals(store, GENESIS).last.k == 9
    store.write(damage(store))
    with pytest.raises(StoreError, match=r"is damaged.*Stop the node, move .*chain away"):
        Finals(store, GENESIS)


def test_a_damaged_entry_is_named_when_it_is_read(store: Store):
    finals = Finals(store, GENESIS)
    result = first(store, Prefix.RESULT)
    movement = first(store, Prefix.MOVEMENT, ALICE.address)
    damaged = [Prefix.CUT.key(4), result, movement, first(store, Prefix.VOTE)]
    store.write([(key, (store.get(key) or b"")[:-1]) for key in damaged])
    reads = [
        lambda: finals.stored(4),
        lambda: list(finals.cuts()),
        lambda: finals.anchor(4),
        lambda: finals.result(result[1:]),
        lambda: list(finals.history(ALICE.address)),
        finals.vote_log,
    ]
    for read in reads:
        with pytest.raises(StoreError, match="unreadable"):
            read()
    assert finals.stored(5) is not None, "the rest can be read"


# Cuts and anchors


def test_cuts_are_read_from_the_last_down(store: Store):
    finals = Finals(store, GENESIS)
    assert [stored.cut.k for stored in finals.cuts()] == [9, 8, 7, 6, 5, 4, 3, 2, 1]
    assert [stored.cut.k for stored in finals.cuts(before=4)] == [3, 2, 1]
    assert [stored.cut.k for stored in finals.cuts(before=100)] == [9, 8, 7, 6, 5, 4, 3, 2, 1]
    assert list(finals.cuts(before=1)) == []
    assert (finals.stored(0), finals.stored(10)) == (None, None)


def test_anchors_name_the_cut_and_who_may_author_on_it(store: Store):
    finals = Finals(store, GENESIS)
    everybody = frozenset(key.address for key in VALIDATORS)
    assert finals.anchor(0) == (NETWORK, everybody)
    assert finals.anchor(1)[1] == everybody
    assert finals.anchor(2)[1] == everybody - {VALIDATORS[3].address}, "its fork was shown in cut 2"
    for stored in finals.cuts():
        assert finals.anchor(stored.cut.k)[0] == stored.cut.id
        assert finals.anchor(stored.cut.k) == Finals(store, GENESIS).anchor(stored.cut.k)
    assert ALICE.address in finals.anchor(9)[1], "she bonded"


def test_an_anchor_that_is_not_here_is_damage(store: Store):
    finals = Finals(store, GENESIS)
    with pytest.raises(StoreError, match="cut 10 is not in it"):
        finals.anchor(10)
    store.write([(Prefix.CUT.key(5), None)])
    with pytest.raises(StoreError, match="cut 5 is not in it"):
        finals.anchor(5)


def test_few_anchors_are_kept_in_memory(store: Store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "CACHED", 3)
    finals = Finals(store, GENESIS)
    anchors = [finals.anchor(k) for k in range(10)]
    assert len(finals._anchors) == 3
    assert [finals.anchor(k) for k in range(10)] == anchors


def test_blocks_know_the_cut_that_made_them_final(chain: Decided):
    block = chain.write(VALIDATORS[0])
    assert chain.replica.finals.cut_of(block.id) is None
    chain.decide()
    chain.write(VALIDATORS[1])
    chain.decide()
    assert chain.replica.finals.cut_of(block.id) == 1
    assert chain.replica.finals.cut_of(NETWORK) is None


def test_what_is_read_back_is_what_was_written(chain: Decided, tmp_path: Path):
    chain.write(VALIDATORS[0], chain.record(ALICE, Transfer(BOB.address, 7)))
    chain.decide()
    last = chain.replica.final
    chain.replica.close()
    with Store(tmp_path / "chain") as store:
        again = Finals(store, GENESIS).last
    assert (again.k, again.id, again.heads, again.root) == (last.k, last.id, last.heads, last.root)
    assert again.state.rows() == last.state.rows()
    assert again.base() == last.base()


# Results and histories


def test_an_effect_outlives_the_copies_that_come_after_it(chain: Decided):
    record = chain.record(ALICE, Transfer(BOB.address, 7))
    for _ in range(2):
        chain.write(VALIDATORS[0], record)
        chain.decide()
    result = chain.replica.finals.result(record.id)
    assert result is not None
    assert result.void is None


def test_a_void_record_may_take_effect_later(chain: Decided):
    early = chain.record(ALICE, Transfer(BOB.address, 7), nonce=1)
    chain.write(VALIDATORS[0], early)
    chain.decide()
    result = chain.replica.finals.result(early.id)
    assert result is not None
    assert result.void is Void.NONCE_GAP
    chain.write(VALIDATORS[0], chain.record(ALICE, Transfer(BOB.address, 1)), early)
    chain.decide()
    result = chain.replica.finals.result(early.id)
    assert result is not None
    assert result.void is None
    assert chain.replica.finals.result(bytes(32)) is None


def test_a_history_is_read_in_pages_without_a_gap(chain: Decided):
    for count in (3, 1, 2):
        chain.write(VALIDATORS[0], *(chain.record(ALICE, Transfer(BOB.address, 1)) for _ in range(count)))
        chain.decide()
    finals = chain.replica.finals
    whole = list(finals.history(ALICE.address))
    assert [movement.k for movement in whole] == [3, 3, 2, 1, 1, 1]
    places = [(movement.k, movement.index) for movement in whole]
    assert places == sorted(places, reverse=True)
    for start, place in enumerate(places):
        assert list(finals.history(ALICE.address, before=place)) == whole[start + 1 :]
    assert list(finals.history(ALICE.address, before=(4, 0))) == whole
    assert list(finals.history(ALICE.address, before=(1, 0))) == []
    assert {movement.address for movement in finals.history(BOB.address)} == {BOB.address}
    assert list(finals.history(bytes(20))) == []


@pytest.mark.parametrize("neighbour", [b"\xff" * 20, b"\x00" * 20])
def test_the_history_of_the_first_and_last_address_is_its_own(neighbour: bytes, chain: Decided, tmp_path: Path):
    chain.write(VALIDATORS[0], chain.record(ALICE, Transfer(BOB.address, 1)))
    chain.decide()
    (movement,) = chain.replica.finals.history(ALICE.address)
    chain.replica.close()
    with Store(tmp_path / "chain") as store:
        theirs = replace(movement, address=neighbour)
        store.write([movement_entry(theirs)])
        assert list(Finals(store, GENESIS).history(neighbour)) == [theirs]
        assert list(Finals(store, GENESIS).history(neighbour, before=(10, 0))) == [theirs]


# The vote log


def test_a_vote_is_forgotten_once_its_cut_is_past(chain: Decided):
    finals = chain.replica.finals
    seen = []
    for _ in range(3):
        chain.write(VALIDATORS[0], chain.record(ALICE, Transfer(BOB.address, 1)))
        chain.decide()  # logs the proposal and both votes before
        seen.append([entry.place for entry in finals.vote_log()])
    assert seen == [[(k, 0, step) for step in (0, 1, 2)] for k in (1, 2, 3)], "of the cut just decided, no older"


def test_votes_of_heights_to_come_are_kept_across_a_cut_and_a_restart(chain: Decided, tmp_path: Path):
    chain.acknowledge()
    later = replace(chain.propose(), k=300)
    chain.log(later, VALIDATORS[0])
    chain.write(VALIDATORS[0], chain.record(ALICE, Transfer(BOB.address, 1)))
    chain.decide()
    entries = chain.replica.finals.vote_log()
    assert [entry.place[0] for entry in entries] == [1] * 3 + [300] * 3
    chain.replica.close()
    with Store(tmp_path / "chain") as store:
        assert Finals(store, GENESIS).vote_log() == entries


def test_how_long_to_abstain_is_remembered(store: Store):
    finals = Finals(store, GENESIS)
    assert finals.abstain_through() == 0
    for through in (None, 0, 5, 2**63 - 1, None):
        finals.set_abstain(through)
        assert finals.abstain_through() == through
        assert Finals(store, GENESIS).abstain_through() == through
