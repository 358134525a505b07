"""What this node holds: choose a range, announce it, fetch its blobs, load it, serve it; then store more than that.

Nobody tells a node what to hold. It looks at the view that all share, says what it means to do, waits a moment, looks
again, and does it.
"""

from __future__ import annotations

import logging
import random
import time
from dataclasses import dataclass, replace

import trio

from blyan_node.chain.catalog import ModelEntry
from blyan_node.errors import LocalError, PeerError, RuleError
from blyan_node.inference.beacons import check_beacons
from blyan_node.inference.heart import LEAST_APART, Heart
from blyan_node.inference.library import Library
from blyan_node.inference.messages import DRAINING, LOADING, SERVING, Held
from blyan_node.inference.placement import Demand, Range, choose, should_move
from blyan_node.inference.seat import Loaded
from blyan_node.inference.stage import Stage
from blyan_node.inference.swarm import SwarmView
from blyan_node.model.shard import Shard
from blyan_node.p2p.transport import PeerId
from blyan_node.relay.blobs import BlobExchange
from blyan_node.relay.blocks import Relay
from blyan_node.worker import Workers

log = logging.getLogger(__name__)

JITTER = (0.3, 1.2)  # seconds between announcing an intent and acting on it
LOOK_EVERY = 1.0
STORE_ALL_UP_TO = 8  # peers: in a net of that size everybody stores every blob
LOOKS = 16  # at most, before an intent stands whatever others announce
STALL = 60.0  # seconds without a chunk from anybody after which a fetch is given up for now
RETRY_FIRST, RETRY_MOST = 2.0, 120.0  # seconds before another try with a model that could not be held
STORE_AGAIN = 60.0  # seconds before another try to store what could not be stored
KV_SHARE = 0.25  # of the memory limit is for caches


@dataclass(frozen=True)
class Plan:
    """What this node means to hold, or holds."""

    model: ModelEntry
    span: Range
    state: int

    def held(self) -> Held:
        """The same as a heartbeat says it."""
        return Held(self.model.id, self.model.version, self.span.first, self.span.last, self.state)


class Holder:
    """Keeps one shard loaded, where the swarm needs it most."""

    def __init__(
        self,
        me: PeerId,
        relay: Relay,
        library: Library,
        exchange: BlobExchange,
        view: SwarmView,
        heart: Heart,
        stage: Stage,
        workers: Workers,
        *,
        memory: int,
        dtype: str,
        device: str,
    ) -> None:
        self._me, self._relay, self._library, self._exchange = me, relay, library, exchange
        self._view, self._heart, self._stage, self._workers = view, heart, stage, workers
        self._memory, self._dtype, self._device = memory, dtype, device
        self.plan: Plan | None = None
        self.draining = False
        self._serving: Plan | None = None  # what the loaded shard is
        self._failures: dict[bytes, tuple[int, float]] = {}  # by version: how often, and when it may be tried again

    def held(self) -> tuple[Held, ...]:
        """For the heartbeat."""
        return (self.plan.held(),) if self.plan else ()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Hold what is needed until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._store_more)
            task_status.started()
            while True:
                seen = self._relay.changed.count
                if (chosen := await self._look()) is not None:
                    await self._try(*chosen)
                await self._relay.changed.after(seen, most=LOOK_EVERY)

    async def drain(self) -> None:
        """Say that this node leaves: nobody plans a route through it any more, and who has not heard is refused."""
        self.draining = True
        self._stage.loaded = None
        self._announce(self.plan)
        await trio.sleep(2 * LEAST_APART)  # the heartbeat that says so is out by then

    def reload(self) -> None:
        """Serve nobody with what is in memory: it is not what was loaded. The next look loads it again."""
        self._stage.unload()
        self._serving = None
        self._announce(None)

    async def _look(self) -> tuple[ModelEntry, Range] | None:
        """One look at the swarm: a range to take up where this node has none, or where a gap calls for a move."""
        models = self._library.models()
        if not models or self.draining:
            return None
        now = trio.current_time()
        if self.plan is None or self.plan.model not in models:
            return await self._settle()
        model, held = self.plan.model, self.plan.span
        demand = self._demand(model)
        target = should_move(demand, held, self._view, self._budget, self._stage.layer_us, now, me=self._me)
        if target is None or not self._may_try(model, now):
            return None
        log.info("moving from %s to %s: nobody holds some of it", held, target)
        return model, target

    async def _settle(self) -> tuple[ModelEntry, Range] | None:
        """Announce an intent, wait a jitter, look again; until two looks agree."""
        intent: tuple[ModelEntry, Range] | None = None
        for _ in range(LOOKS):
            wanted = self._choose()
            if wanted == intent or self.draining:
                return wanted
            intent = wanted
            self._announce(Plan(*intent, LOADING) if intent else self._serving)
            await trio.sleep(random.uniform(*JITTER))
        return intent

    def _may_try(self, model: ModelEntry, now: float) -> bool:
        return self._failures.get(model.version, (0, 0.0))[1] <= now

    def _can_be_had(self, model: ModelEntry, now: float) -> bool:
        """Is each unit here or with an active peer? Anybody can publish a model that nobody has."""
        have = self._library.stored(model) | self._view.stored(model.id, len(model.units), now, but=self._me)
        return len(have) == len(model.units)

    def _choose(self) -> tuple[ModelEntry, Range] | None:
        """The model whose weakest unit is weakest, of those to be had, and the range of it to hold."""
        now = trio.current_time()
        models = [m for m in self._library.models() if self._may_try(m, now) and self._can_be_had(m, now)]
        if not models:
            return None
        weakest = min(
            models,
            key=lambda model: (
                len(self._view.serving(model.id, model.version, len(model.units), now)) / len(model.units)
            ),
        )
        span = choose(self._demand(weakest), self._view, self._budget, self._stage.layer_us, now, me=self._me)
        if span is None:
            log.warning(
                "not one unit of %s fits in %d MB: raise memory_limit to serve it", weakest.name, self._budget >> 20
            )
            return None
        return weakest, span

    @property
    def _budget(self) -> int:
        return int(self._memory * (1 - KV_SHARE))

    def _demand(self, model: ModelEntry) -> Demand:
        """What placement needs to know of a model."""
        spec = self._library.spec(model)
        sizes = tuple(spec.unit_bytes(unit, self._dtype) for unit in spec.units)
        return Demand(model.id, model.version, sizes, sizes[0] if spec.tied_head else 0)

    def _announce(self, plan: Plan | None) -> None:
        self.plan = replace(plan, state=DRAINING) if plan and self.draining else plan
        self._heart.urgent.beat()

    async def _try(self, model: ModelEntry, span: Range) -> None:
        """Take up a range; where that fails go on with what is served, if anything, and try again later."""
        try:
            await self._take_up(model, span)
        except (RuleError, LocalError, PeerError, OSError, RuntimeError, MemoryError) as error:
            # bad weights, a full disk, peers that promised too much, torch's own
            log.error("cannot hold units %d..%d of %s: %s", span.first, span.last, model.name, error)
            count, now = self._failures.get(model.version, (0, 0.0))[0] + 1, trio.current_time()
            self._failures[model.version] = (count, now + min(RETRY_FIRST * 2 ** (count - 1), RETRY_MOST))
            self._announce(self._serving)
        else:
            self._failures.pop(model.version, None)

    async def _take_up(self, model: ModelEntry, span: Range) -> None:
        """Fetch what is missing of a range, load it, serve it."""
        if self._stage.loaded is None:
            self._announce(Plan(model, span, LOADING))
        spec = self._library.spec(model)
        needed = {blob for unit in spec.units[span.first : span.last + 1] for blob in spec.blobs_for(unit)}
        began = time.monotonic()
        for unit in sorted(spec.units.index(name) for name in needed):
            await self._fetch_unit(model, unit)
        await self._exchange.fetch(model.tokenizer, lambda: self._library.holders(model), patience=STALL)
        log.info("have the weights of units %d..%d after %.1f s", span.first, span.last, time.monotonic() - began)
        paths = {name: self._exchange.blobs.path(model.layers[spec.units.index(name)]) for name in needed}
        await self._exchange.verify(model.tokenizer, *(model.layers[spec.units.index(name)] for name in needed))
        layers = sum(unit.startswith("layer.") for unit in spec.units[span.first : span.last + 1])
        size = self._demand(model).size(span)
        shard = await self._workers.compute.run(
            Shard.load,
            spec,
            span.first,
            span.last,
            paths,
            dtype=self._dtype,
            device=self._device,
            cache_tokens=(self._memory - size - self._stage.journals.limit)
            // max(1, layers * spec.kv_bytes(self._dtype)),
        )
        await check_beacons(model, shard, self._exchange, self._workers.compute)
        if self.draining:
            return
        self._stage.loaded = Loaded(model.id, model.version, span.first, span.last, shard, size)
        self._serving = Plan(model, span, SERVING)
        self._announce(self._serving)
        log.info("serving %s..%s of %s", spec.units[span.first], spec.units[span.last], model.name)

    async def _fetch_unit(self, model: ModelEntry, unit: int) -> None:
        ref = model.layers[unit]
        if not self._exchange.blobs.has(ref):
            await self._exchange.fetch(ref, lambda: self._storing(model, unit), patience=STALL)

    def _storing(self, model: ModelEntry, unit: int) -> list[PeerId]:
        peers = self._view.storing(model.id, unit, trio.current_time())
        random.shuffle(peers)
        return peers

    async def _store_more(self) -> None:
        """Store units beyond those served, so that either side of a split can fill its gaps from disk.

        Politely: not while sessions run here, and a quarter of the time at most.
        """
        while True:
            await trio.sleep(LOOK_EVERY)
            for model, unit in self._wanted():
                while self._stage.seats or self.plan is None or self.plan.state != SERVING:  # noqa: ASYNC110 as in _serve
                    await trio.sleep(LOOK_EVERY)  # serving comes first
                began = trio.current_time()
                try:
                    await self._fetch_unit(model, unit)
                except (RuleError, LocalError, PeerError) as error:
                    log.warning("storing no more than is served for now: %s", error)
                    await trio.sleep(STORE_AGAIN)
                    break
                self._heart.urgent.beat()
                await trio.sleep(3 * (trio.current_time() - began))

    def _wanted(self) -> list[tuple[ModelEntry, int]]:
        """The units that this node should have on disk and has not."""
        now = trio.current_time()
        if len(self._view.active(now)) > STORE_ALL_UP_TO:
            return []
        return [
            (model, unit)
            for model in self._library.models()
            for unit in sorted(
                self._view.stored(model.id, len(model.units), now, but=self._me) - self._library.stored(model)
            )
        ]
