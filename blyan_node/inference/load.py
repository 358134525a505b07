"""How much load a swarm bears, where each peer splits its time over the units that it holds as it is needed. Pure.

A token takes ``work[u]`` of unit u, in layers; a peer does ``speed`` layers a second, on any units of its range. What
rate the swarm can keep up is a matching between work and speed in which every peer reaches an interval of units. The
greedy rule finds the largest: units from left to right, each served first by those peers whose range ends first
(Glover, 1967).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

STEPS = 30  # of bisection: to a billionth of the range


@dataclass(frozen=True)
class Claim:
    """A peer that holds units ``first`` to ``last``, inclusive, and does ``speed`` layers a second."""

    first: int
    last: int
    speed: float


class Load:
    """The load of a swarm to which one more peer may be added, somewhere; ``more`` is what is known of that one.

    ``best`` is a bound on the rate, in tokens a second, that any placement of these peers could keep up.
    """

    def __init__(self, work: Sequence[float], claims: Sequence[Claim], more: Claim) -> None:
        self._work, self._whole = work, sum(work)
        self._starting: list[dict[int, float]] = [{} for _ in work]  # by first unit: last unit, and speed of all such
        for claim in claims:
            ends = self._starting[claim.first]
            ends[claim.last] = ends.get(claim.last, 0.0) + claim.speed
        self.best = best_rate(self._whole, [(c.speed, sum(work[c.first : c.last + 1])) for c in (*claims, more)])

    def keeps_up(self, rate: float, more: Claim | None = None) -> bool:
        """Tell whether the swarm does so many tokens a second."""
        return self.borne(rate, more) >= rate * self._whole * (1 - 1e-9)

    def wanted(self, rate: float) -> float:
        """Layers a second that a rate takes."""
        return rate * self._whole

    def borne(self, rate: float, more: Claim | None = None) -> float:
        """Layers a second, of those wanted at ``rate`` tokens a second, that the swarm does, with one more peer."""
        free: list[tuple[int, float]] = []  # a heap of those that reach the unit: where they end, and time left
        total = 0.0
        for unit, work in enumerate(self._work):
            for entry in self._starting[unit].items():
                heapq.heappush(free, entry)
            if more is not None and more.first == unit:
                heapq.heappush(free, (more.last, more.speed))
            need = work * rate
            while free and need > 0:
                last, left = free[0]
                if last < unit or left <= need:
                    heapq.heappop(free)
                    if last >= unit:
                        total += left
                        need -= left
                else:
                    heapq.heapreplace(free, (last, left - need))
                    total += need
                    need = 0.0
        return total

    def most(self, more: Claim | None = None) -> float:
        """The largest rate, in tokens a second, that the swarm keeps up."""
        low, high = 0.0, self.best
        for _ in range(STEPS):
            rate = (low + high) / 2
            low, high = (rate, high) if self.keeps_up(rate, more) else (low, rate)
        return low


def best_rate(whole: float, peers: Sequence[tuple[float, float]]) -> float:
    """A bound on the rate that peers of (speed, most work that they hold) keep up, however they are placed.

    At a rate r nobody does more than its speed, nor more than r times the work of what it holds: a small memory cannot
    use a great speed.
    """
    speed, held = sum(each for each, _ in peers), 0.0
    for fast, most in sorted(peers, key=lambda peer: peer[1] / peer[0]):
        if held >= whole or fast * (whole - held) <= most * speed:
            break
        speed, held = speed - fast, held + most
    return speed / (whole - held) if held < whole else 0.0
