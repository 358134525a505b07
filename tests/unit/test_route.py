"""Route planning: covers every unit once, takes the cheapest way, avoids who failed, names what is missing."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blyan_node.errors import ModelUnavailable
from blyan_node.inference.messages import LOADING, SERVING, Held, Leg
from blyan_node.inference.route import Measurements, mend, plan
from blyan_node.inference.swarm import SwarmView
from tests.support.swarm import heartbeat

MODEL, VERSION = bytes(32), bytes([1] * 32)
UNITS = ("embed", *(f"layer.{index}" for index in range(6)), "head")


def route(view: SwarmView, measurements: Measurements | None = None, now: float = 0.0) -> tuple[Leg, ...]:
    return plan(view, MODEL, VERSION, UNITS, measurements or Measurements(), me="me", now=now)


def serving(*claims: tuple[str, int, int], layer_us: dict[str, int] | None = None, state: int = SERVING) -> SwarmView:
    view = SwarmView()
    for peer, first, last in claims:
        speed = (layer_us or {}).get(peer, 1000)
        view.observe(heartbeat(peer, 1, Held(MODEL, VERSION, first, last, state), layer_us=speed), 0.0)
    return view


def test_one_peer_that_serves_all_is_a_route_of_one_stage() -> None:
    assert route(serving(("a", 0, 7), ("b", 0, 3), ("c", 4, 7))) == (Leg("a", 0, 7),)


def test_overlapping_ranges_are_cut_where_they_meet() -> None:
    legs = route(serving(("a", 0, 4), ("b", 3, 7)))
    assert [leg.peer for leg in legs] == ["a", "b"]
    assert legs[0].first == 0
    assert legs[0].last + 1 == legs[1].first
    assert legs[1].last == 7


def test_a_slow_peer_is_routed_around() -> None:
    legs = route(serving(("slow", 0, 7), ("b", 0, 3), ("c", 4, 7), layer_us={"slow": 100_000}))
    assert [leg.peer for leg in legs] == ["b", "c"]


def test_a_peer_that_failed_is_avoided_for_a_while_and_used_where_nobody_else_can() -> None:
    view, measured = serving(("a", 0, 7), ("b", 0, 7)), Measurements(round_trips={"a": 0.001, "b": 0.01})
    assert route(view, measured)[0].peer == "a"
    measured.failed("a", now=0.0)
    assert route(view, measured)[0].peer == "b"
    measured.failed("b", now=0.0)
    assert route(view, measured)[0].peer == "a"
    assert route(view, measured, now=3.0)[0].peer == "a"


def test_missing_units_are_named() -> None:
    with pytest.raises(ModelUnavailable, match=r"layer\.3\.\.head"):
        route(serving(("a", 0, 3)))
    with pytest.raises(ModelUnavailable, match=r"embed\.\.head"):
        route(serving(("a", 0, 7), state=LOADING))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7), st.integers(1, 5000)), max_size=12))
def test_a_route_covers_every_unit_once_in_order_or_units_are_missing(spans: list[tuple[int, int, int]]) -> None:
    claims = [(f"p{index}", min(a, b), max(a, b)) for index, (a, b, _) in enumerate(spans)]
    view = serving(*claims, layer_us={f"p{index}": speed for index, (_, _, speed) in enumerate(spans)})
    covered = {unit for _, first, last in claims for unit in range(first, last + 1)}
    if len(covered) < len(UNITS):
        with pytest.raises(ModelUnavailable):
            route(view)
        return
    legs = route(view)
    assert [unit for leg in legs for unit in range(leg.first, leg.last + 1)] == list(range(len(UNITS)))
    held = {peer: (first, last) for peer, first, last in claims}
    assert all(held[leg.peer][0] <= leg.first <= leg.last <= held[leg.peer][1] for leg in legs)


def mended(view: SwarmView, legs: tuple[Leg, ...], *lost: str, measured: Measurements | None = None) -> object:
    return mend(legs, lost, view, MODEL, VERSION, measured or Measurements(), me="me", now=0.0)


OLD = (Leg("a", 0, 2), Leg("b", 3, 5), Leg("c", 6, 7))


def test_only_the_lost_range_is_planned_anew() -> None:
    view = serving(("d", 0, 7))  # the survivors need not even be in view
    assert mended(view, OLD, "a") == (Leg("d", 0, 2), Leg("b", 3, 5), Leg("c", 6, 7))
    assert mended(view, OLD, "b") == (Leg("a", 0, 2), Leg("d", 3, 5), Leg("c", 6, 7))
    assert mended(view, OLD, "c") == (Leg("a", 0, 2), Leg("b", 3, 5), Leg("d", 6, 7))
    assert mended(view, OLD, "a", "b") == (Leg("d", 0, 5), Leg("c", 6, 7))
    assert mended(view, OLD) == OLD


def test_several_may_fill_a_gap_but_nobody_two() -> None:
    view = serving(("d", 0, 3), ("e", 4, 5))
    assert mended(view, OLD, "b") == (Leg("a", 0, 2), Leg("d", 3, 3), Leg("e", 4, 5), Leg("c", 6, 7))
    assert mended(serving(("d", 0, 7)), OLD, "a", "c") is None
    assert mended(serving(("a", 0, 7), ("c", 0, 7)), OLD, "b") is None


def test_a_lost_peer_takes_its_range_again_only_where_nobody_else_can() -> None:
    assert mended(serving(("b", 3, 5)), OLD, "b") == OLD
    slow = serving(("b", 3, 5), ("d", 0, 7), layer_us={"d": 10**6})
    assert mended(slow, OLD, "b") == (Leg("a", 0, 2), Leg("d", 3, 5), Leg("c", 6, 7))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=8),
    st.sets(st.sampled_from(["a", "b", "c"]), min_size=1),
)
def test_a_mended_route_keeps_the_survivors_and_covers_every_unit_once(
    spans: list[tuple[int, int]], lost: set[str]
) -> None:
    view = serving(*((f"p{index}", min(span), max(span)) for index, span in enumerate(spans)))
    legs = mend(OLD, lost, view, MODEL, VERSION, Measurements(), me="me", now=0.0)
    if legs is None:
        return
    assert [unit for leg in legs for unit in range(leg.first, leg.last + 1)] == list(range(len(UNITS)))
    assert len({leg.peer for leg in legs}) == len(legs)
    assert [leg for leg in OLD if leg.peer not in lost] == [leg for leg in legs if leg in OLD]
