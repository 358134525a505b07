"""A swarm that places itself, in simulated time: real choices from a real view, no network, no weights.

Each node looks at the view now and then, announces what it means to do, waits a jitter, looks again, loads, serves: as
``inference/holder.py`` does. What it says is heard by all after a moment.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

from blyan_node.inference.load import Claim, Load, best_rate
from blyan_node.inference.messages import LOADING, SERVING, Held
from blyan_node.inference.placement import Demand, Range, choose, should_move, windows
from blyan_node.inference.swarm import SwarmView
from tests.support.swarm import heartbeat

LOOK, JITTER, HEARD, LOADS = 1.0, (0.3, 1.2), (0.02, 0.2), (1.0, 6.0)  # seconds
QUIET = 20.0  # seconds without a change after which nothing more is expected


@dataclass
class Node:
    """A simulated node. ``moves`` counts ranges that it took up after its first."""

    peer: str
    memory: int
    layer_us: int
    held: Range | None = None
    intent: Range | None = None
    moves: int = 0
    looked: int = -1  # the state of the view at the last look that changed nothing
    loading: bool = False

    def claims(self, demand: Demand) -> list[Held]:
        """What it says that it holds."""
        both = [(self.held, SERVING), (self.intent, LOADING)]
        return [Held(demand.model, demand.version, r.first, r.last, state) for r, state in both if r is not None]


@dataclass
class Placing:
    """The simulation. ``holes`` are the moments at which a unit that had been served by somebody was by nobody."""

    demand: Demand
    rng: random.Random
    nodes: dict[str, Node] = field(default_factory=dict)
    view: SwarmView = field(default_factory=SwarmView)
    now: float = 0.0
    holes: int = 0
    changes: int = 0
    _changed_at: float = 0.0
    _events: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _count: count[int] = field(default_factory=lambda: count(1))

    def join(self, memory: int, layer_us: int) -> Node:
        """A node joins, now."""
        node = Node(f"peer-{next(self._count)}-{self.rng.random()}", memory, layer_us)
        self.nodes[node.peer] = node
        self._after(self.rng.uniform(0, 0.3), lambda: self._look(node))
        return node

    def leave(self, peer: str) -> None:
        """A node is gone, without a word; the others notice at once, since its connections end."""
        del self.nodes[peer]
        self.view.forget(peer)
        self._noted()

    def settle(self, most: float = 600.0) -> float:
        """Run until nothing has changed for a while; return how long it took until then."""
        began = self._changed_at = self.now
        while self._events and self.now - self._changed_at < QUIET:
            self.now, _, act = heapq.heappop(self._events)
            assert self.now - began < most, "it never comes to rest"
            act()
        return self._changed_at - began

    # --- what is asserted ---

    def missing(self) -> list[int]:
        """Units that nobody serves."""
        served = {unit for node in self.nodes.values() if node.held for unit in node.held.units}
        return [unit for unit in range(len(self.demand.unit_bytes)) if unit not in served]

    def moves(self) -> int:
        """How often a node has taken up another range than its first."""
        return sum(node.moves for node in self.nodes.values())

    def overload(self) -> float:
        """How much busier the busiest units are than the best placement of these nodes could have them."""
        work, whole = self.demand.work, sum(self.demand.work)
        claims = [Claim(n.held.first, n.held.last, 1e6 / n.layer_us) for n in self.nodes.values() if n.held]
        most = [
            max(sum(work[span.first : span.last + 1]) for span in windows(self.demand, node.memory))
            for node in self.nodes.values()
        ]
        speeds = [1e6 / node.layer_us for node in self.nodes.values()]
        reached = Load(work, claims[1:], claims[0]).most(claims[0])
        return best_rate(whole, list(zip(speeds, most, strict=True))) / reached if reached else float("inf")

    # --- what nodes do ---

    def _look(self, node: Node) -> None:
        if node.peer not in self.nodes:
            return
        if not node.loading and node.looked != self.changes:
            wanted = self._wanted(node)
            if wanted is None or wanted == node.held:
                node.looked = self.changes
                if node.intent is not None:
                    node.intent = None
                    self._say(node)
            elif wanted == node.intent:
                node.loading = True
                self._after(self.rng.uniform(*LOADS), lambda: self._loaded(node))
            else:
                node.intent = wanted
                self._say(node)
                self._after(self.rng.uniform(*JITTER), lambda: self._look(node))
                return
        self._after(LOOK * self.rng.uniform(0.8, 1.2), lambda: self._look(node))

    def _wanted(self, node: Node) -> Range | None:
        about = (self.view, node.memory, node.layer_us, self.now)
        if node.held is None:
            return choose(self.demand, *about, me=node.peer)
        return should_move(self.demand, node.held, *about, me=node.peer)

    def _loaded(self, node: Node) -> None:
        if node.peer not in self.nodes:
            return
        before = set(self.missing())
        node.moves += node.held is not None
        node.held, node.intent, node.loading = node.intent, None, False
        self.holes += bool(set(self.missing()) - before)
        self._say(node)

    def _say(self, node: Node) -> None:
        self._changed_at = self.now
        told = heartbeat(node.peer, next(self._count), *node.claims(self.demand), layer_us=node.layer_us)

        def heard() -> None:
            if node.peer in self.nodes:
                self.view.observe(told, 0.0)
                self._noted()

        self._after(self.rng.uniform(*HEARD), heard)

    def _noted(self) -> None:
        self.changes += 1
        self._changed_at = self.now

    def _after(self, delay: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + delay, next(self._count), act))
