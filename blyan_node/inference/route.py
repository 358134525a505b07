"""Which peers a prompt walks through: the cheapest path over unit boundaries. Pure.

The nodes of the graph are (boundary, peer): "units below the boundary are done and the activations are at this peer".
An edge runs a span of units on a peer that serves them; it costs the way there, the compute of the span by the peer's
own measured time per layer, and the queue in front of it. Dijkstra is not needed: boundaries only grow, so one sweep
from left to right finds the shortest path.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from blyan_node.errors import ModelUnavailable
from blyan_node.inference.messages import MAX_STAGES, Leg
from blyan_node.inference.standing import Standing
from blyan_node.inference.swarm import Seen, SwarmView
from blyan_node.p2p.transport import PeerId

HOP = 0.001  # seconds that any hop costs, measured or not: framing, waking, one more batch to wait for
UNMEASURED = 0.050  # assumed round trip to a peer that was never measured
AVOID_FIRST = 2.0  # seconds that a peer is avoided after a failure; doubles with each further one
AVOID_MOST = 120.0


@dataclass
class Measurements:
    """What this node has measured of its peers: smoothed round trips in seconds, failures, challenges."""

    round_trips: dict[PeerId, float] = field(default_factory=dict)
    standing: Standing = field(default_factory=Standing)
    _failures: dict[PeerId, tuple[int, float]] = field(default_factory=dict)

    def failed(self, peer: PeerId, now: float) -> None:
        """A session failed at this peer: avoid it for a growing while."""
        count = self._failures.get(peer, (0, 0.0))[0] + 1
        self._failures[peer] = (count, now + min(AVOID_FIRST * 2 ** (count - 1), AVOID_MOST))

    def succeeded(self, peer: PeerId) -> None:
        """A session went well at this peer: forget its failures."""
        self._failures.pop(peer, None)

    def avoided(self, peer: PeerId, now: float) -> bool:
        """Tell whether the peer is to be avoided now."""
        return self._failures.get(peer, (0, 0.0))[1] > now

    def reach(self, peer: PeerId) -> float:
        """Seconds to reach a peer, one way."""
        return self.round_trips.get(peer, UNMEASURED) / 2


def plan(
    view: SwarmView,
    model: bytes,
    version: bytes,
    unit_names: tuple[str, ...],
    measurements: Measurements,
    *,
    me: PeerId,
    now: float,
    max_price: int | None = None,
) -> tuple[Leg, ...]:
    """Return the legs of the cheapest route that covers all units once, in order.

    A peer that failed lately is used only where nobody else serves a unit; one that computed a challenge wrongly, or
    that asks for more than ``max_price`` (nano-BLY for 1,000 tokens and a layer), never. Raises ModelUnavailable,
    naming the units that nobody else serves.
    """
    claims = view.serving(model, version, len(unit_names), now)
    affordable = [
        (seen, held.first, held.last)
        for seen, held in claims
        if max_price is None or seen.heartbeat.price <= max_price or seen.peer == me
    ]
    spans = [span for span in affordable if not measurements.standing.is_distrusted(span[0].peer, now)]
    reliable = [span for span in spans if not measurements.avoided(span[0].peer, now)]
    for candidates in (reliable, spans):
        if legs := _shortest(candidates, range(len(unit_names)), measurements, me, start=me):
            return legs
    served = {unit for _, first, last in spans for unit in range(first, last + 1)}
    missing = [name for unit, name in enumerate(unit_names) if unit not in served]
    why = "serves" if len(affordable) == len(claims) else f"serves at {max_price} nano-BLY or less"
    raise ModelUnavailable(
        f"no active peer {why} {_ranges(missing, unit_names)}; try again when more peers have joined"
    )


def mend(
    legs: tuple[Leg, ...],
    lost: Collection[PeerId],
    view: SwarmView,
    model: bytes,
    version: bytes,
    measurements: Measurements,
    *,
    me: PeerId,
    now: float,
) -> tuple[Leg, ...] | None:
    """Return a route in which the legs of ``lost`` peers are taken over by others, any number for each gap.

    The other legs stay as they are. A lost peer, or one that failed lately, is used only where nobody else will do;
    one that computed a challenge wrongly, never. None where there is no such route.
    """
    units = legs[-1].last + 1
    mended: list[Leg] = []
    stay = [leg for leg in legs if leg.peer not in lost]
    ends = [Leg(me, units, units)]
    for leg in (*stay, *ends):
        begin = mended[-1].last + 1 if mended else 0
        if begin < leg.first:
            busy = {one.peer for one in (*mended, *stay)}
            spans = [
                (seen, held.first, held.last)
                for seen, held in view.serving(model, version, units, now)
                if seen.peer not in busy and not measurements.standing.is_distrusted(seen.peer, now)
            ]
            trusted = [
                span for span in spans if not measurements.avoided(span[0].peer, now) and span[0].peer not in lost
            ]
            start = PeerId(mended[-1].peer) if mended else me
            gap = range(begin, leg.first)
            filled = _shortest(trusted, gap, measurements, me, start=start)
            filled = filled or _shortest(spans, gap, measurements, me, start=start)
            if not filled:
                return None
            mended += filled
        mended.append(leg)
    del mended[-1]
    return tuple(mended) if len(mended) <= MAX_STAGES else None


def _shortest(
    spans: list[tuple[Seen, int, int]], units: range, measurements: Measurements, me: PeerId, *, start: PeerId
) -> tuple[Leg, ...] | None:
    """The cheapest legs over consecutive ``units`` for an activation that is at ``start``."""
    # best[b][peer] = (cost, legs) of the cheapest way to have all units before b done with the result at peer
    best: dict[int, dict[PeerId, tuple[float, tuple[Leg, ...]]]] = {unit: {} for unit in (*units, units.stop)}
    best[units.start][start] = (0.0, ())
    # It pays to hand over only where the giver's range ends or the taker's begins.
    joints = sorted({last + 1 for _, _, last in spans} | {first for _, first, _ in spans} | {units.stop})
    for boundary in units:
        if not best[boundary]:
            continue
        for seen, first, last in spans:
            if not first <= boundary <= last:
                continue
            ways = [
                (so_far + _way(here, seen.peer, me, measurements), legs)
                for here, (so_far, legs) in best[boundary].items()
                # one seat a peer: whoever would come back later in the route can as well go on by itself
                if len(legs) < MAX_STAGES and all(leg.peer != seen.peer for leg in legs)
            ]
            if not ways:
                continue
            cost, legs = min(ways, key=lambda way: way[0])
            cost += seen.heartbeat.queue * seen.heartbeat.layer_us / 1e6
            for end in joints:
                if boundary < end <= min(last + 1, units.stop):
                    total = cost + (end - boundary) * seen.heartbeat.layer_us / 1e6
                    if seen.peer not in best[end] or total < best[end][seen.peer][0]:
                        best[end][seen.peer] = (total, (*legs, Leg(seen.peer, boundary, end - 1)))
    if not best[units.stop]:
        return None
    return min(best[units.stop].values(), key=lambda found: found[0])[1]


def _way(here: PeerId, there: PeerId, me: PeerId, measurements: Measurements) -> float:
    """Seconds from one peer to another. Only ways from ``me`` are measured; others are taken as via both ends."""
    if here == there:
        return 0.0
    return HOP + sum(measurements.reach(peer) for peer in (here, there) if peer != me)


def _ranges(missing: list[str], names: tuple[str, ...]) -> str:
    """Name runs of units briefly: ``embed..layer.7, head``."""
    runs: list[tuple[int, int]] = []
    for index in (names.index(name) for name in missing):
        if runs and runs[-1][1] == index - 1:
            runs[-1] = (runs[-1][0], index)
        else:
            runs.append((index, index))
    return ", ".join(names[a] if a == b else f"{names[a]}..{names[b]}" for a, b in runs) or "all units along one route"
