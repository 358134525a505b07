"""Swarms that place themselves, in simulation: covered while capacity suffices, few moves, load near the best."""

from __future__ import annotations

import random

import pytest

from blyan_node.inference import swarm
from blyan_node.inference.placement import Demand
from tests.support.placing import Placing

DEMAND = Demand(bytes(32), bytes([1] * 32), (113, *[14] * 30, 1), shared=113)  # SmolLM2's, in units of 250 kB
WHOLE = sum(DEMAND.unit_bytes)
NEAR = 1.25

MEMORY = {4: (0.6, 1.0), 16: (0.25, 0.7), 64: (0.23, 0.6), 200: (0.21, 0.5)}
"""By nodes, from what share of the model to what share each has room for; any holds the embedding and more."""


@pytest.fixture(autouse=True)
def _heartbeats_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heartbeats that say nothing new are left out, so what was said holds."""
    monkeypatch.setattr(swarm, "LIFETIME", float("inf"))


class Swarm(Placing):
    """Uneven nodes: speeds differ by ten, memories by two or three."""

    def __init__(self, count: int, seed: int) -> None:
        super().__init__(DEMAND, random.Random(seed))
        self._share = MEMORY[count]

    def herd(self, count: int) -> int:
        """So many join at once; return the moves until it is quiet."""
        before = self.moves()
        for _ in range(count):
            self.join(int(WHOLE * self.rng.uniform(*self._share)), int(10 ** self.rng.uniform(2.5, 3.5)))
        self.settle()
        return self.moves() - before

    def flight(self, count: int) -> int:
        """So many leave at once; return the moves until it is quiet."""
        for peer in self.rng.sample(sorted(self.nodes), count):
            self.leave(peer)
        before = self.moves()
        self.settle()
        return self.moves() - before


@pytest.mark.parametrize(
    ("count", "seeds"), [(16, range(12)), (64, range(2)), pytest.param(200, range(1), marks=pytest.mark.long)]
)
def test_herds_that_come_and_go(count: int, seeds: range) -> None:
    for seed in seeds:
        swarm_ = Swarm(count, seed)
        events = [("herd", count), ("flight", 1), ("flight", count // 5), ("herd", count // 5)]
        for event, many in events[: 3 if count == 200 else 4]:  # that herd takes seconds, and is as with 64
            moves = getattr(swarm_, event)(many)
            where = f"seed {seed}, {event} of {many}"
            assert swarm_.missing() == [], where
            assert swarm_.holes == 0, f"{where}: a move left a unit to nobody"
            assert moves <= max(2, count // 4), where
            assert swarm_.overload() <= NEAR, where


def test_a_handful_of_nodes() -> None:
    """Four hold the model about three times over. When one goes, the others fill what it left.

    The load is near the best after a herd, but need not be after a loss: of three nodes each may be the only one that
    holds something, and none can move without giving that up.
    """
    for seed in range(12):
        swarm_ = Swarm(4, seed)
        assert swarm_.herd(4) <= 2
        assert swarm_.overload() <= NEAR
        for many in (swarm_.flight, swarm_.herd, swarm_.flight):
            assert many(1) <= 3
            assert swarm_.missing() == []
            assert swarm_.holes == 0


def test_one_by_one() -> None:
    swarm_ = Swarm(16, 1)
    moves = sum(swarm_.herd(1) for _ in range(16))
    assert swarm_.missing() == []
    assert swarm_.holes == 0
    assert moves <= 6
    assert swarm_.overload() <= NEAR
    moves = sum(swarm_.flight(1) + swarm_.herd(1) for _ in range(12))
    assert swarm_.missing() == []
    assert swarm_.holes == 0
    assert moves <= 12
    assert swarm_.overload() <= NEAR


def test_a_swarm_at_rest_stays_so() -> None:
    swarm_ = Swarm(16, 3)
    swarm_.herd(16)
    assert swarm_.settle() == 0.0
