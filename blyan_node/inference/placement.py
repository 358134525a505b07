"""Who holds what, without a coordinator: each node picks its own range from the view that all share. Pure.

The rules, in order: a unit that nobody holds, or only one peer, is worth most, the leftmost first; where all are held
twice, the range that lets the swarm bear most load (see load.py). A node announces what it intends before it loads,
waits a jitter and looks again; between those that want the same at once, the one that comes first in rendezvous-hash
order (Thaler and Ravishankar, 1998) keeps its choice. Moves all raise one and the same number, so they cannot go round
in circles.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

from blyan_node.inference.load import Claim, Load
from blyan_node.inference.messages import LOADING, SERVING
from blyan_node.inference.swarm import SwarmView
from blyan_node.p2p.transport import PeerId

GOAL = 1.05  # times the best possible load: what nodes place themselves for
BUSY = 1.15  # times the best possible load: where it is more, nodes move
COPIES = 2  # peers that hold each unit, before load decides: so that the loss of any one loses nothing
LOOK_UP = 0.05  # of a layer: what embedding a token costs

Trusts = Callable[[PeerId], bool]
"""Tells whether what a peer claims counts at all."""

Proven = Callable[[PeerId, int], bool]
"""Tells whether a peer has lately shown that it serves a unit."""


def trusts_all(_peer: PeerId) -> bool:
    """Count what everybody claims."""
    return True


def proven_all(_peer: PeerId, _unit: int) -> bool:
    """Take everybody's word for what it serves."""
    return True


@dataclass(frozen=True)
class Range:
    """Units ``first`` to ``last``, inclusive."""

    first: int
    last: int

    def __contains__(self, unit: int) -> bool:
        return self.first <= unit <= self.last

    @property
    def units(self) -> range:
        """All of them."""
        return range(self.first, self.last + 1)


@dataclass(frozen=True)
class Demand:
    """What placement needs to know of a model: its id and version, and per unit the bytes that serving it takes.

    ``shared`` is what the last unit needs besides, unless the first is held too: a tied head needs the embedding.
    """

    model: bytes
    version: bytes
    unit_bytes: tuple[int, ...]
    shared: int = 0

    @cached_property
    def work(self) -> tuple[float, ...]:
        """What a token takes of each unit, in layers, by its weights; the embedding is only looked up."""
        *_, layer, head = (1, *self.unit_bytes[1:]) if len(self.unit_bytes) > 2 else (1, 1, 1)
        return (LOOK_UP, *[1.0] * (len(self.unit_bytes) - 2), (head + self.shared) / layer)

    def size(self, span: Range) -> int:
        """Bytes of memory that a range takes."""
        borrowed = self.shared if span.last == len(self.unit_bytes) - 1 and span.first > 0 else 0
        return self._below[span.last + 1] - self._below[span.first] + borrowed

    @cached_property
    def _below(self) -> tuple[int, ...]:
        """Bytes of all units below each."""
        return tuple(accumulate(self.unit_bytes, initial=0))


def rank(peer: PeerId, model: bytes) -> bytes:
    """Rendezvous order of peers for a model: the smaller goes first."""
    return hashlib.sha256(model + peer.encode()).digest()


def windows(demand: Demand, memory: int) -> Iterator[Range]:
    """For each first unit the longest range that fits; empty where not one unit does."""
    units, last = len(demand.unit_bytes), -1
    for first in range(units):
        last = max(last, first - 1)
        while last + 1 < units and demand.size(Range(first, last + 1)) <= memory:
            last += 1
        while last >= first and demand.size(Range(first, last)) > memory:  # a tied head that has to borrow now
            last -= 1
        if last >= first:
            yield Range(first, last)


@dataclass(frozen=True)
class Holding:
    """What a peer is counted on for; whether it serves anything now, and whether it means to go on with that."""

    claim: Claim
    serves: bool
    stays: bool


def holdings(
    demand: Demand, view: SwarmView, now: float, *, me: PeerId, trusts: Trusts = trusts_all
) -> dict[PeerId, Holding]:
    """What peers other than ``me`` hold, or mean to hold.

    Of newcomers, and of those that mean to move, only those that go before ``me`` in rank count where they mean to be,
    so that of two that want the same the later yields and two never wait for each other. One that is not trusted, or
    is leaving, counts nowhere.
    """
    units, mine = len(demand.unit_bytes), rank(me, demand.model)
    found: dict[PeerId, Holding] = {}
    for seen, held in view.holding(demand.model, demand.version, units, now):
        if seen.peer == me or not trusts(seen.peer) or held.state not in (SERVING, LOADING):
            continue
        claim = Claim(held.first, held.last, 1e6 / max(1, seen.heartbeat.layer_us))
        known = found.get(seen.peer)
        if held.state == SERVING:
            found[seen.peer] = Holding(known.claim if known else claim, serves=True, stays=known is None)
        elif rank(seen.peer, demand.model) < mine:
            found[seen.peer] = Holding(claim, serves=known is not None, stays=False)
        elif known is not None:
            found[seen.peer] = replace(known, stays=False)
    return found


def choose(
    demand: Demand,
    view: SwarmView,
    memory: int,
    layer_us: int,
    now: float,
    *,
    me: PeerId,
    trusts: Trusts = trusts_all,
) -> Range | None:
    """Pick the range that helps most; None where not one unit fits in ``memory`` bytes."""
    others = [holding.claim for holding in holdings(demand, view, now, me=me, trusts=trusts).values()]
    return best_range(demand, others, memory, 1e6 / max(1, layer_us))


def best_range(demand: Demand, others: Sequence[Claim], memory: int, speed: float) -> Range | None:
    """The range that helps most, given what others hold; None where not one unit fits.

    While some unit is held by fewer than COPIES, it holds the leftmost of those that the fewest hold, and as many of
    such units as can be: so ranges grow into tilings without holes. (To cover as many units as possible, wherever, was
    tried first, and left holes that only a larger node could fill.) Of equals, and where all are held by enough, it is
    the one with which the swarm bears most, then the leftmost.
    """
    fitting = list(windows(demand, memory))
    count = _count(demand, others)
    reachable = [unit for unit in range(len(count)) if any(unit in span for span in fitting)]
    if not reachable:
        return None
    rarest = min(reachable, key=lambda unit: count[unit])
    scarce = count[rarest] < COPIES
    swarm = Load(demand.work, others, Claim(0, len(count) - 1, speed))
    rate = swarm.best / GOAL

    def merit(span: Range) -> tuple[int, float, int]:
        new = count[span.first : span.last + 1].count(count[rarest]) if scarce else 0
        borne = swarm.borne(rate, Claim(span.first, span.last, speed)) / swarm.wanted(rate)
        return new, round(borne, 6), -span.first

    return max((span for span in fitting if rarest in span or not scarce), key=merit)


def should_move(
    demand: Demand,
    held: Range,
    view: SwarmView,
    memory: int,
    layer_us: int,
    now: float,
    *,
    me: PeerId,
    trusts: Trusts = trusts_all,
    proven: Proven = proven_all,
) -> Range | None:
    """The range to move to, where that is a clear gain and nothing is lost by it; else None.

    Nothing is lost where each unit that is left is served by another that stays and that ``proven`` vouches for.
    """
    found = holdings(demand, view, now, me=me, trusts=trusts)
    newcomers = [
        Claim(other.first, other.last, 1e6 / max(1, seen.heartbeat.layer_us))
        for seen, other in view.holding(demand.model, demand.version, len(demand.unit_bytes), now)
        if other.state == LOADING and seen.peer != me and trusts(seen.peer) and not _serves(found, seen.peer)
    ]
    others = [holding.claim for peer, holding in found.items() if holding.serves] + newcomers
    if newcomers and all(_count(demand, [*others, Claim(held.first, held.last, 1.0)])):
        return None  # they are about to change things
    target = better_range(demand, held, others, memory, 1e6 / max(1, layer_us))
    if target is None:
        return None
    left = [unit for unit in range(held.first, held.last + 1) if unit not in target]
    staying = {peer: holding.claim for peer, holding in found.items() if holding.stays}
    kept = {
        unit
        for unit in left
        if any(claim.first <= unit <= claim.last and proven(peer, unit) for peer, claim in staying.items())
    }
    return target if len(kept) == len(left) else None


def _serves(found: dict[PeerId, Holding], peer: PeerId) -> bool:
    return peer in found and found[peer].serves


def better_range(demand: Demand, held: Range, others: Sequence[Claim], memory: int, speed: float) -> Range | None:
    """The range that a node had better hold than the one it holds, by a clear gain; None where there is none.

    It fills a gap; or the swarm bears BUSY times less than it could, and the move makes good a quarter of what is
    lacking, or of what the node can do. Each such move brings the swarm nearer to the same goal by so
    much, so there are few.
    """
    mine, count = Claim(held.first, held.last, speed), _count(demand, others)
    alone = [unit for unit in range(held.first, held.last + 1) if not count[unit]]
    if any(not others and unit not in held for unit, others in enumerate(count)):
        filling = [
            span
            for span in _keeping(demand, memory, alone)
            if any(not count[unit] and unit not in held for unit in span.units)
        ]
        after = [(sum(not count[unit] for unit in span.units), -span.first, span) for span in filling]
        return max(after, key=lambda each: each[:2])[2] if after else None
    swarm = Load(demand.work, others, mine)
    if swarm.keeps_up(swarm.best / BUSY, mine):
        return None
    rate = swarm.best / GOAL
    before, nowhere = swarm.borne(rate, mine), swarm.borne(rate)
    clear = min((swarm.wanted(rate) - before) / 4, speed / 4)
    if nowhere + speed < before + clear:  # what it does here, nobody else could: no place is so much better
        return None
    gain, target = max(
        ((swarm.borne(rate, Claim(span.first, span.last, speed)), span) for span in _keeping(demand, memory, alone)),
        key=lambda each: (each[0], -each[1].first),
        default=(0.0, held),
    )
    return target if target != held and gain >= before + clear else None


def _keeping(demand: Demand, memory: int, units: Sequence[int]) -> list[Range]:
    """The windows that hold all of these units."""
    return [span for span in windows(demand, memory) if all(unit in span for unit in units)]


def _count(demand: Demand, claims: Sequence[Claim]) -> list[int]:
    """How many peers hold each unit."""
    count = [0] * len(demand.unit_bytes)
    for claim in claims:
        for unit in range(claim.first, claim.last + 1):
            count[unit] += 1
    return count
