"""What consensus asks of the DAG: the heads to propose, whether a cut is valid, and what an author has still to do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from blyan_node.chain import candidates as module
from blyan_node.chain.block import Block
from blyan_node.chain.candidates import Candidates
from blyan_node.chain.genesis import Genesis
from blyan_node.chain.height import Window
from blyan_node.chain.keys import Key
from blyan_node.chain.records import Bond, Transfer, Unbond
from blyan_node.chain.replica import Replica
from tests.support.cuts import finalise
from tests.support.decided import GENESIS, NETWORK, USERS, VALIDATORS, Decided

ONE, TWO, THREE, CHEAT = VALIDATORS
ALICE, BOB = USERS[:2]
UNKNOWN = bytes([9] * 32)


@pytest.fixture
def chain(tmp_path: Path) -> Iterator[Decided]:
    with Replica.open(tmp_path / "chain", GENESIS) as replica:
        yield Decided(replica)


def heads(chain: Decided) -> tuple[bytes, ...]:
    return Candidates(chain.replica).heads(chain.replica.final.base())


def window(chain: Decided, *blocks: Block | bytes) -> Window:
    ids = tuple(block if isinstance(block, bytes) else block.id for block in blocks)
    return Candidates(chain.replica).window(chain.replica.final.base(), ids)


def payment(chain: Decided, key: Key = ONE, *, on: tuple[Block, ...] = ()) -> Block:
    return chain.write(key, chain.record(ALICE, Transfer(BOB.address, 1)), parents=on)


# The heads to propose


def test_of_an_empty_chain_the_genesis_is_proposed(chain: Decided):
    assert heads(chain) == (NETWORK,)
    assert not window(chain, NETWORK).content


def test_all_tips_are_proposed_sorted(chain: Decided):
    first = payment(chain)
    tips = [chain.write(key, parents=(first,)) for key in VALIDATORS]
    assert heads(chain) == tuple(sorted(tip.id for tip in tips))


def test_previous_heads_stay_until_something_covers_them(chain: Decided):
    first = payment(chain)
    left, right = (chain.write(key, parents=(first,)) for key in (ONE, TWO))
    chain.decide()
    before = chain.replica.final.heads
    assert heads(chain) == before
    assert window(chain, *before) == Window((), True, False, frozenset())
    later = payment(chain)
    assert heads(chain) == (later.id,)
    assert {left.id, right.id}.isdisjoint(before), "they are covered by acknowledgements"


def test_an_equivocators_own_blocks_are_not_proposed(chain: Decided):
    first = payment(chain)
    left = chain.write(CHEAT, parents=(first,))
    right = chain.fork(CHEAT, left)
    assert heads(chain) == (first.id,)
    above = chain.write(ONE, parents=(first,))
    assert heads(chain) == (above.id,)
    chosen = chain.write(TWO, parents=(above, right))
    assert heads(chain) == (chosen.id,), "unless somebody has built on one"


def test_heads_of_an_equivocator_that_are_final_are_still_covered(chain: Decided):
    first = payment(chain)
    left = chain.write(CHEAT, parents=(first,))
    chain.decide()
    assert left.id not in chain.replica.final.heads
    tip = chain.write(CHEAT, chain.record(ALICE, Transfer(BOB.address, 1)))
    chain.decide()
    chain.fork(CHEAT, tip)
    assert heads(chain) == chain.replica.final.heads


def test_too_many_heads_leave_out_what_covers_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "MAX_HEADS", 4)
    keys = [Key(bytes([1, number]) * 16) for number in range(8)]
    genesis = Genesis.make("wide", {key.address: 1 for key in keys}, created_ms=0)
    with Replica.open(tmp_path / "wide", genesis) as replica:
        root = (genesis.network,)

        def write(key: Key, parents: tuple[bytes, ...]) -> Block:
            return replica.author(key, (), chain="T", type="data", now_ms=1, parents=parents)

        blocks = [write(key, root) for key in keys]
        proposed = Candidates(replica).heads(replica.final.base())
        assert len(proposed) == 4
        assert list(proposed) == sorted(proposed)
        assert set(proposed) < {block.id for block in blocks}
        high = write(keys[0], (blocks[0].id,))
        covering = write(keys[0], (high.id,))
        base = replace(replica.final.base(), prev_heads=(high.id,))
        proposed = Candidates(replica).heads(base)
        assert len(proposed) == 4
        assert covering.id in proposed, "it alone covers the previous cut, though it is the highest"


# Whether a cut is valid


def test_unknown_heads_are_missing(chain: Decided):
    block = payment(chain)
    assert window(chain, block, UNKNOWN) == Window(missing=(UNKNOWN,))


def test_a_window_tells_its_content_and_who_anchored(chain: Decided):
    block = payment(chain)
    assert window(chain, block) == Window((), True, True, frozenset({ONE.address}))
    acknowledged = chain.write(TWO)
    assert window(chain, acknowledged).anchored == {ONE.address, TWO.address}
    chain.decide()
    only_acknowledges = chain.write(THREE)
    assert window(chain, only_acknowledges) == Window((), True, False, frozenset({THREE.address}))


def test_blocks_on_an_older_anchor_cover_nothing(chain: Decided):
    old = payment(chain, TWO)
    first = chain.write(ONE, parents=(old,))
    chain.replica.author(THREE, (), chain="T", type="data", now_ms=1, parents=(old.id,))
    chain.decide()
    late = payment(chain, ONE)
    base = chain.replica.final.base()
    assert chain.replica.dag.known(late.id).anchor == 1
    assert chain.replica.dag.known(first.id).anchor == 0
    assert Candidates(chain.replica).window(base, (late.id,)).anchored == {ONE.address}


def test_heads_that_stand_on_one_another_are_not_ordered(chain: Decided):
    below = payment(chain)
    above = chain.write(TWO)
    assert not window(chain, below, above).ordered
    assert window(chain, above).ordered


def test_a_cut_must_cover_the_one_before(chain: Decided):
    first = payment(chain)
    chain.decide()
    assert not window(chain, first).ordered
    assert not window(chain, NETWORK).ordered
    assert window(chain, *chain.replica.final.heads).ordered


def test_a_deadline_that_falls_due_is_content(chain: Decided):
    chain.write(ONE, chain.record(ALICE, Bond(TWO.address, 50)))
    chain.decide()
    chain.write(ONE, chain.record(ALICE, Unbond(TWO.address, 50)))
    due = []
    for _ in range(GENESIS.parameters.unbonding + 1):
        chain.decide()
        due.append(Candidates(chain.replica).has_content())
    assert True in due
    assert due[-1] is False, "once it is done the chain comes to rest"
    assert due == [False] * due.index(True) + [True] + [False] * (len(due) - due.index(True) - 1)


# What an author has still to do


def test_content_is_there_from_the_payment_to_its_cut(chain: Decided):
    candidates = Candidates(chain.replica)
    assert not candidates.has_content()
    chain.write(ONE)
    assert not candidates.has_content()
    payment(chain)
    assert candidates.has_content()
    chain.decide()
    assert not candidates.has_content()


def test_only_what_others_carried_is_to_be_acknowledged_and_once(chain: Decided):
    candidates = Candidates(chain.replica)
    payment(chain, ONE)
    assert [candidates.is_unacknowledged(key.address) for key in VALIDATORS] == [False, True, True, True]
    chain.write(TWO)
    assert [candidates.is_unacknowledged(key.address) for key in VALIDATORS] == [False, False, True, True]
    chain.decide()
    assert not any(candidates.is_unacknowledged(key.address) for key in VALIDATORS)


def test_what_is_final_needs_no_acknowledgement(chain: Decided):
    payment(chain, ONE)
    assert Candidates(chain.replica).is_unacknowledged(TWO.address)
    finalise(chain.replica, keys=VALIDATORS)
    assert not Candidates(chain.replica).is_unacknowledged(TWO.address)


def test_what_an_equivocator_alone_wrote_calls_for_nothing(chain: Decided):
    candidates = Candidates(chain.replica)
    payment(chain)
    for key in (TWO, THREE):
        chain.write(key)
    left = payment(chain, CHEAT)
    assert candidates.is_unacknowledged(ONE.address)
    chain.fork(CHEAT, left)
    assert not candidates.is_unacknowledged(ONE.address)
    assert not candidates.is_unacknowledged(TWO.address)


def test_an_author_is_anchored_once_it_has_written_on_the_last_cut(chain: Decided):
    candidates = Candidates(chain.replica)
    assert not candidates.is_anchored(ONE.address)
    payment(chain)
    assert candidates.is_anchored(ONE.address)
    assert not candidates.is_anchored(TWO.address)
    chain.decide()
    assert not candidates.is_anchored(ONE.address)
