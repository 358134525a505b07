"""Who holds what, without a coordinator: each node picks its own range from the view that all share. Pure.

The rules, in order: a unit that nobody holds is worth most; then the unit with the least throughput behind it. A node
announces what it intends before it loads, waits a jitter and looks again; between two that want the same at once, the
one that comes first in rendezvous-hash order (Thaler and Ravishankar, 1998) keeps its choice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from blyan_node.inference.messages import LOADING, SERVING
from blyan_node.inference.swarm import SwarmView
from blyan_node.p2p.transport import PeerId


@dataclass(frozen=True)
class Range:
    """Units ``first`` to ``last``, inclusive."""

    first: int
    last: int

    def __contains__(self, unit: int) -> bool:
        return self.first <= unit <= self.last


@dataclass(frozen=True)
class Demand:
    """What placement needs to know of a model: its id and version, and per unit the bytes that serving it takes.

    ``shared`` is what the last unit needs besides, unless the first is held too: a tied head needs the embedding.
    """

    model: bytes
    version: bytes
    unit_bytes: tuple[int, ...]
    shared: int = 0

    def size(self, span: Range) -> int:
        """Bytes of memory that a range takes."""
        borrowed = self.shared if span.last == len(self.unit_bytes) - 1 and span.first > 0 else 0
        return sum(self.unit_bytes[span.first : span.last + 1]) + borrowed


def rank(peer: PeerId, model: bytes) -> bytes:
    """Rendezvous order of peers for a model: the smaller goes first."""
    return hashlib.sha256(model + peer.encode()).digest()


def windows(demand: Demand, memory: int) -> Iterator[Range]:
    """For each first unit the longest range that fits; empty where not one unit does."""
    units = len(demand.unit_bytes)
    for first in range(units):
        last = first - 1
        while last + 1 < units and demand.size(Range(first, last + 1)) <= memory:
            last += 1
        if last >= first:
            yield Range(first, last)


def coverage(
    demand: Demand, view: SwarmView, now: float, *, me: PeerId, intents: Literal["all", "earlier", "none"]
) -> list[float]:
    """Throughput (layers per second) behind each unit, of others than ``me``.

    ``intents`` says whether what is only being loaded counts: of all, of none, or of the peers that go before ``me``
    in rank, so that of two that want the same the later yields and two never wait for each other.
    """
    behind = [0.0] * len(demand.unit_bytes)
    mine = rank(me, demand.model)
    for seen, held in view.holding(demand.model, demand.version, len(behind), now):
        intended = intents == "all" or (intents == "earlier" and rank(seen.peer, demand.model) < mine)
        if seen.peer == me or not (held.state == SERVING or (held.state == LOADING and intended)):
            continue
        for unit in range(held.first, held.last + 1):
            behind[unit] += 1e6 / max(1, seen.heartbeat.layer_us)
    return behind


def choose(demand: Demand, view: SwarmView, memory: int, layer_us: int, now: float, *, me: PeerId) -> Range | None:
    """Pick the range that most raises the weakest coverage; None where not one unit fits in ``memory`` bytes.

    It holds the leftmost of the weakest units, so that ranges grow into a tiling without holes; of those that do, the
    one that leaves the best coverage (compared weakest unit first), then the one that overlaps least with others'.
    """
    behind = coverage(demand, view, now, me=me, intents="earlier")
    own = 1e6 / max(1, layer_us)
    fitting = list(windows(demand, memory))
    reachable = [unit for unit in range(len(behind)) if any(unit in span for span in fitting)]
    if not reachable:
        return None
    weakest = min(reachable, key=lambda unit: behind[unit])

    def merit(span: Range) -> tuple[Sequence[float], float, int]:
        after = sorted(value + own if unit in span else value for unit, value in enumerate(behind))
        return after, -sum(behind[span.first : span.last + 1]), -span.first

    return max((span for span in fitting if weakest in span), key=merit)


def should_move(
    demand: Demand, held: Range, view: SwarmView, memory: int, layer_us: int, now: float, *, me: PeerId
) -> Range | None:
    """The range to move to, where a gap calls for it and nothing is lost by it; else None.

    A node moves only to fill units that nobody holds, only where all that it leaves is served by others, and only
    where it goes first, in rendezvous order, among those that could go: so one moves, not all.
    """
    behind = coverage(demand, view, now, me=me, intents="all")
    with_me = [value + (1.0 if unit in held else 0.0) for unit, value in enumerate(behind)]
    if all(with_me):
        return None
    target = choose(demand, view, memory, layer_us, now, me=me)
    if target is None or target == held:
        return None
    served = coverage(demand, view, now, me=me, intents="none")
    if any(served[unit] == 0 for unit in range(held.first, held.last + 1) if unit not in target):
        return None
    if not any(with_me[unit] == 0 for unit in range(target.first, target.last + 1)):
        return None
    mine = rank(me, demand.model)
    for seen, other in view.serving(demand.model, demand.version, len(behind), now):
        spare = all(
            served[unit] > 1e6 / max(1, seen.heartbeat.layer_us) or unit in held
            for unit in range(other.first, other.last + 1)
        )
        if seen.peer != me and spare and rank(seen.peer, demand.model) < mine:
            return None
    return target
