"""The view of the swarm: the newest word of each peer counts, for a while; claims that cannot be count for nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blyan_node import codec
from blyan_node.chain.keys import Key, digest
from blyan_node.errors import ModelUnavailable, RuleError
from blyan_node.inference.messages import LOADING, SERVING, Held, Leg, Signed, Stored
from blyan_node.inference.placement import Demand, Range, choose, holdings, should_move
from blyan_node.inference.route import Measurements, plan
from blyan_node.inference.swarm import DOMAIN, LIFETIME, MAX_PEERS, MEMORY, SwarmView, bits_of, sign, verify
from blyan_node.p2p.identity import peer_id_of
from blyan_node.p2p.transport import PeerId
from tests.support.swarm import heartbeat

MODEL, VERSION = bytes(32), bytes([1] * 32)
UNITS = ("embed", "layer.0", "layer.1", "head")
DEMAND = Demand(MODEL, VERSION, (10, 10, 10, 10))
KEY = Key(bytes([9] * 32))
ME = peer_id_of(KEY.public)


def held(first: int, last: int, state: int = SERVING) -> Held:
    return Held(MODEL, VERSION, first, last, state)


def test_the_newest_sequence_counts() -> None:
    view = SwarmView()
    assert view.observe(heartbeat("a", 2, held(0, 3)), 0.0)
    assert not view.observe(heartbeat("a", 2), 1.0)
    assert not view.observe(heartbeat("a", 1), 1.0)
    assert view.missing(MODEL, VERSION, 4, 1.0) == []
    assert view.observe(heartbeat("a", 3), 1.0)
    assert view.missing(MODEL, VERSION, 4, 1.0) == [0, 1, 2, 3]


def test_a_peer_is_active_for_its_lifetime_and_not_once_it_is_known_to_be_gone() -> None:
    view = SwarmView()
    view.observe(heartbeat("a", 1), 0.0)
    assert view.is_active(PeerId("a"), LIFETIME)
    assert not view.is_active(PeerId("a"), LIFETIME + 0.1)
    view.forget(PeerId("a"))
    assert not view.active(0.0)
    assert not view.observe(heartbeat("a", 1), 1.0)  # a late copy of its last word does not bring it back
    assert view.observe(heartbeat("a", 2), 1.0)
    assert view.is_active(PeerId("a"), 1.0)


def test_a_peer_whose_clock_went_back_is_heard_again_in_the_end() -> None:
    view = SwarmView()
    view.observe(heartbeat("a", 2**63 - 1), 0.0)
    assert not view.observe(heartbeat("a", 5), MEMORY)
    assert view.observe(heartbeat("a", 5), MEMORY + 1)


def test_the_view_is_bounded_and_the_living_are_not_displaced() -> None:
    view = SwarmView()
    for number in range(MAX_PEERS):
        assert view.observe(heartbeat(f"p{number}", 1), 0.0)
    assert not view.observe(heartbeat("late", 1), LIFETIME)
    assert view.observe(heartbeat("p7", 2), LIFETIME)
    assert view.observe(heartbeat("late", 1), LIFETIME + 1)
    assert len(view.active(LIFETIME + 1)) == 2


@pytest.mark.parametrize(("first", "last"), [(0, 4), (2, 4096), (4, 4), (4096, 4096)])
def test_a_range_beyond_the_model_is_no_claim(first: int, last: int) -> None:
    view = SwarmView()
    view.observe(heartbeat("liar", 1, held(first, last)), 0.0)
    assert view.missing(MODEL, VERSION, 4, 0.0) == [0, 1, 2, 3]
    assert holdings(DEMAND, view, 0.0, me=PeerId("me")) == {}
    with pytest.raises(ModelUnavailable):
        plan(view, MODEL, VERSION, UNITS, Measurements(), me=PeerId("me"), now=0.0)
    view.observe(heartbeat("good", 1, held(0, 3)), 0.0)
    legs = plan(view, MODEL, VERSION, UNITS, Measurements(), me=PeerId("me"), now=0.0)
    assert legs == (Leg("good", 0, 3),)


def test_nobody_moves_for_a_range_beyond_the_model() -> None:
    view = SwarmView()
    view.observe(heartbeat("liar", 1, held(0, 4096)), 0.0)
    view.observe(heartbeat("b", 1, held(0, 1)), 0.0)
    assert should_move(DEMAND, Range(0, 1), view, 20, 1000, 0.0, me=PeerId("me")) in (None, Range(2, 3))
    assert choose(DEMAND, view, 20, 1000, 0.0, me=PeerId("me")) is not None


def test_no_peer_is_twice_in_a_route() -> None:
    # the middle is so much faster elsewhere that leaving "a" and coming back would be cheapest
    view = SwarmView()
    view.observe(heartbeat("a", 1, held(0, 3), layer_us=10**6), 0.0)
    view.observe(heartbeat("b", 1, held(1, 2), layer_us=1), 0.0)
    legs = plan(view, MODEL, VERSION, UNITS, Measurements(), me=PeerId("me"), now=0.0)
    assert len({leg.peer for leg in legs}) == len(legs)


def signed(**changes: object) -> bytes:
    return sign(replace(heartbeat(ME, 1, held(0, 1)), **changes), KEY)  # type: ignore[arg-type]


def test_a_heartbeat_is_its_peers_own_and_of_this_network() -> None:
    assert verify(signed(), bytes(32)) == heartbeat(ME, 1, held(0, 1))
    for wrong in (signed(peer="somebody"), signed(network=bytes([5] * 32)), signed()[:-1], b"", bytes(9000)):
        with pytest.raises(RuleError):
            verify(wrong, bytes(32))
    body = codec.pack(heartbeat(ME, 1))
    for signature in (bytes(65), Key(bytes([8] * 32)).sign(digest(DOMAIN, body))):
        with pytest.raises(RuleError):
            verify(codec.pack(Signed(body, signature)), bytes(32))


@pytest.mark.parametrize(
    "changes",
    [
        {"held": (held(3, 2),)},
        {"held": (Held(MODEL, VERSION, 0, 5000, SERVING),)},
        {"held": (held(0, 1, state=7),)},
        {"held": (held(0, 1),) * 5},
        {"layer_us": 0},
        {"layer_us": 10**12},
        {"queue": 2**63 - 1},
        {"addresses": ("x" * 300,)},
        {"stored": (Stored(MODEL, bytes(513)),)},
    ],
)
def test_claims_out_of_bounds_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(RuleError):
        verify(signed(**changes), bytes(32))


@given(st.frozensets(st.integers(0, 200)), st.integers(0, 300))
def test_stored_units_are_found_in_their_bits(units: frozenset[int], unit: int) -> None:
    view = SwarmView()
    view.observe(replace(heartbeat("a", 1), stored=(Stored(MODEL, bits_of(units)),)), 0.0)
    assert (view.storing(MODEL, unit, 0.0) == ["a"]) == (unit in units)


def test_only_what_is_served_counts_as_served() -> None:
    view = SwarmView()
    view.observe(heartbeat("a", 1, held(0, 3, LOADING)), 0.0)
    assert view.serving(MODEL, VERSION, 4, 0.0) == []
    assert [seen.peer for seen, _ in view.holding(MODEL, VERSION, 4, 0.0)] == ["a"]
