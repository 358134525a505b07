"""Layer choice: the whole model is covered, without a coordinator, by nodes that each see only the view."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blyan_node.inference.messages import LOADING, SERVING, Held
from blyan_node.inference.placement import Demand, Proven, Range, choose, holdings, rank, should_move, windows
from blyan_node.inference.swarm import SwarmView
from tests.support.swarm import heartbeat

MODEL, VERSION = bytes(32), bytes([1] * 32)
LAYER = 14
HELD = Held(MODEL, VERSION, 10, 20, SERVING)
DEMAND = Demand(MODEL, VERSION, (113, *[LAYER] * 30, 1), shared=113)


def view_of(*claims: tuple[str, int, int, int]) -> SwarmView:
    view = SwarmView()
    for sequence, (peer, first, last, state) in enumerate(claims, start=1):
        view.observe(heartbeat(peer, sequence, Held(MODEL, VERSION, first, last, state)), 0.0)
    return view


def test_a_window_counts_the_embedding_that_a_tied_head_borrows() -> None:
    assert DEMAND.size(Range(0, 31)) == 113 + 30 * LAYER + 1
    assert DEMAND.size(Range(31, 31)) == 114
    assert all(DEMAND.size(window) <= 200 for window in windows(DEMAND, 200))


def test_nothing_fits_in_too_little_memory() -> None:
    assert choose(Demand(MODEL, VERSION, (10, 10)), SwarmView(), 9, 1000, 0.0, me="a") is None


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(130, 600), min_size=4, max_size=24), st.integers(0, 2**32))
def test_nodes_that_join_one_by_one_leave_no_gap_while_their_memory_suffices(memories: list[int], seed: int) -> None:
    view = SwarmView()
    order = random.Random(seed)
    for index, memory in enumerate(memories):
        peer = f"peer-{order.random()}"
        span = choose(DEMAND, view, memory, 1000, 0.0, me=peer)
        assert span is not None
        assert DEMAND.size(span) <= memory
        view.observe(heartbeat(peer, index + 1, Held(MODEL, VERSION, span.first, span.last, SERVING)), 0.0)
    # Each takes the weakest units first, so the holes that remain are fewer than what any one more node could hold.
    if sum(memories) > 4 * sum(DEMAND.unit_bytes):
        assert view.missing(MODEL, VERSION, 32, 0.0) == []


def test_of_two_that_want_the_same_the_first_in_rank_keeps_its_choice() -> None:
    first, second = sorted(("alice", "bob"), key=lambda peer: rank(peer, MODEL))
    view = view_of((first, 0, 10, LOADING), (second, 0, 10, LOADING))
    assert choose(DEMAND, view, 260, 1000, 0.0, me=first) == Range(0, 10)
    other = choose(DEMAND, view, 260, 1000, 0.0, me=second)
    assert other is not None
    assert other.first == 11


def test_a_gap_is_filled_by_one_that_is_spare_and_by_no_other() -> None:
    # carol and dave hold the same, and both would go; once both have said so, neither may leave before the other stays.
    claims = [("alice", 0, 9, SERVING), ("carol", 10, 20, SERVING), ("dave", 10, 20, SERVING)]
    movers = {
        peer: should_move(DEMAND, Range(first, last), view_of(*claims), 260, 1000, 0.0, me=peer)
        for peer, first, last, _ in claims
    }
    assert movers == {"alice": None, "carol": Range(21, 31), "dave": Range(21, 31)}
    for peer, other in (("carol", "dave"), ("dave", "carol")):
        view = view_of(*claims[:1])
        view.observe(heartbeat(peer, 2, HELD), 0.0)
        view.observe(heartbeat(other, 2, HELD, Held(MODEL, VERSION, 21, 31, LOADING)), 0.0)
        assert should_move(DEMAND, Range(10, 20), view, 260, 1000, 0.0, me=peer) is None


def test_a_node_leaves_only_what_somebody_has_proven_to_serve() -> None:
    claims = [("alice", 0, 9, SERVING), ("carol", 10, 20, SERVING), ("dave", 10, 20, SERVING)]

    def move(proven: Proven) -> Range | None:
        return should_move(DEMAND, Range(10, 20), view_of(*claims), 260, 1000, 0.0, me="carol", proven=proven)

    assert move(lambda peer, unit: peer == "dave") == Range(21, 31)
    assert move(lambda peer, unit: peer == "dave" and unit != 15) is None


def test_what_a_distrusted_peer_claims_is_a_gap() -> None:
    claims = [("alice", 0, 15, SERVING), ("liar", 16, 31, SERVING)]
    span = choose(DEMAND, view_of(*claims), 330, 1000, 0.0, me="bob", trusts=lambda peer: peer != "liar")
    assert span is not None
    assert span.first == 16


def test_where_all_is_covered_the_busiest_part_gets_help() -> None:
    view = SwarmView()
    for twin in "ab":
        view.observe(heartbeat(f"fast {twin}", 1, Held(MODEL, VERSION, 0, 15, SERVING), layer_us=100), 0.0)
        view.observe(heartbeat(f"slow {twin}", 2, Held(MODEL, VERSION, 16, 31, SERVING), layer_us=2000), 0.0)
    span = choose(DEMAND, view, 330, 500, 0.0, me="me")
    assert span is not None
    assert span.last > 20, "it can give all its time to what is slow"
    view.observe(heartbeat("spare", 3, Held(MODEL, VERSION, 0, 15, SERVING), layer_us=500), 0.0)
    target = should_move(DEMAND, Range(0, 15), view, 330, 500, 0.0, me="spare")
    assert target is not None
    assert target.last > 20
    view.observe(heartbeat("newcomer", 4, Held(MODEL, VERSION, 20, 25, LOADING)), 0.0)
    assert should_move(DEMAND, Range(0, 15), view, 330, 500, 0.0, me="spare") is None, (
        "it waits to see what that changes"
    )


def test_nobody_moves_where_all_is_covered_or_nobody_is_spare() -> None:
    whole = [("alice", 0, 15, SERVING), ("bob", 16, 31, SERVING)]
    lone = [("alice", 0, 15, SERVING)]
    assert should_move(DEMAND, Range(0, 15), view_of(*whole), 330, 1000, 0.0, me="alice") is None
    assert should_move(DEMAND, Range(0, 15), view_of(*lone), 330, 1000, 0.0, me="alice") is None


def test_a_range_that_somebody_is_loading_is_no_gap() -> None:
    claims = [("carol", 10, 20, SERVING), ("dave", 10, 20, SERVING), ("erin", 0, 9, LOADING), ("fred", 21, 31, LOADING)]
    for mover in ("carol", "dave"):
        assert should_move(DEMAND, Range(10, 20), view_of(*claims), 260, 1000, 0.0, me=mover) is None


@pytest.mark.parametrize("state", [LOADING, SERVING])
def test_expired_claims_do_not_count(state: int) -> None:
    view = view_of(("alice", 0, 31, state))
    assert holdings(DEMAND, view, 100.0, me="bob") == {}
