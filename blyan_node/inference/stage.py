"""The serving side of a prompt's journey: receive, batch, compute, send on.

A stage holds one shard. Each session has a seat on it: its cache, its place in the route, and the inputs that wait.
One task gathers whatever is ready, of all sessions, into a batch, runs the layers once on the compute lane, and sends
each result to where its session goes next; the last stage draws the token. What was sent is remembered in a journal,
and a seat outlives the loss of the peers beside it, for its entry to mend the route
(:mod:`blyan_node.inference.resuming`).
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from functools import partial

import trio

from blyan_node.errors import Overloaded, PeerError, Refused, RuleError
from blyan_node.inference.journal import Journals
from blyan_node.inference.messages import (
    OPEN,
    Activations,
    Close,
    Drawn,
    Failed,
    Open,
    Opened,
    Tokens,
)
from blyan_node.inference.pipeline import Pipeline
from blyan_node.inference.resuming import Floor, Resuming
from blyan_node.inference.seat import Input, Loaded, Seat, check_route, sampling_of
from blyan_node.model.activation import DTYPES, Activation
from blyan_node.model.sampler import check_sampling
from blyan_node.model.shard import Result, Shard, Work
from blyan_node.p2p import rpc
from blyan_node.p2p.transport import Network, PeerId
from blyan_node.pulse import Pulse
from blyan_node.worker import Lane

log = logging.getLogger(__name__)

MAX_SEATS = 1024
BATCH_TOKENS = 1024  # positions that one step computes at most, over all sessions
IDLE = 120.0  # seconds without a frame after which a session's seat is free again
SHARE = 3  # times what it leaves free is the most that one peer's sessions may take (Choudhury and Hahne, 1998)
MAX_CLOSED = 4096  # sessions known to have been closed before they were opened


class Stage:
    """Serves sessions on the shard that is loaded, if any."""

    def __init__(self, network: Network, pipeline: Pipeline, compute: Lane, *, journal_limit: int) -> None:
        self._network, self._pipeline, self._compute = network, pipeline, compute
        self.loaded: Loaded | None = None
        """What new sessions get; those under way keep the shard that they began on."""
        self.seats: dict[bytes, Seat] = {}
        self.layer_us = 1000  # smoothed microseconds per layer and decode step; a guess until measured
        self._ready, self._stepped = Pulse(), Pulse()
        self._arrivals = 0
        self._closed: OrderedDict[tuple[PeerId, bytes], int] = OrderedDict()  # up to which epoch
        self.journals = Journals(journal_limit)
        floor = Floor(self.seats, self._settled, self._ready.beat, self._fail, self._post)
        self.resuming = Resuming(pipeline, self.journals, floor)
        pipeline.on(Tokens, self._on_tokens)
        pipeline.on(Activations, self._on_activations)
        pipeline.on(Drawn, self._on_drawn)
        pipeline.on(Close, self._on_close)
        pipeline.on_lost(self._on_lost)
        pipeline.on_room(self._ready.beat)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled."""
        rpc.serve(self._network, OPEN, self.open, concurrency=64)
        self.resuming.serve(self._network)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._expire)
            task_status.started()
            seen = 0
            while True:
                seen = await self._ready.after(seen)
                while batch := self._gather():
                    await self._step(batch)
                    self._stepped.beat()

    def memory_used(self) -> int:
        """Bytes of the weights that are loaded and of all sessions' caches and journals: what the limit is for."""
        weights = self.loaded.size if self.loaded else 0
        return weights + self.journals.size + sum(seat.cache_bytes for seat in self.seats.values())

    @property
    def is_waiting(self) -> bool:
        """Tell whether sessions wait for a step."""
        return any(seat.inputs for seat in self.seats.values())

    def unload(self) -> None:
        """Drop the shard and end the sessions on it: what it computes is wrong."""
        loaded, self.loaded = self.loaded, None
        for seat in list(self.seats.values()):
            if loaded is not None and seat.shard is loaded.shard:
                self._fail(seat, "the weights here are damaged")

    # --- opening and closing ---

    async def open(self, peer: PeerId, request: Open) -> Opened:
        """Reserve a seat, or raise Refused with the reason, ProtocolViolation for a route that cannot be."""
        await self._give_way(peer, request)
        if request.epoch <= self._closed.get((peer, request.session), -1):
            raise Refused("the session was closed before this request to open it arrived")
        if len(self.seats) >= MAX_SEATS:
            raise Refused(f"all {MAX_SEATS} places are taken")
        if request.stage >= len(request.route) or request.route[request.stage].peer != self._pipeline.me:
            raise Refused("the route does not name this peer at that stage")
        leg, loaded = request.route[request.stage], self.loaded
        if loaded is None or (loaded.model, loaded.version) != (request.model, request.version):
            raise Refused("that model or version is not served here")
        if not loaded.first <= leg.first <= leg.last <= loaded.last:
            raise Refused(f"units {leg.first}..{leg.last} are not served here")
        check_route(request.route, len(loaded.shard.spec.units))
        self._check_share(peer, loaded.shard, request.limit)
        try:
            check_sampling(sampling_of(request))
            cache = loaded.shard.open(request.session, request.limit, leg.first, leg.last)
        except (RuleError, Overloaded) as error:
            raise Refused(str(error)) from error
        except (RuntimeError, MemoryError) as error:  # torch's own
            log.error("no memory for a cache of %d tokens: %s", request.limit, error)
            raise Refused("there is no memory for this session") from error
        self.seats[request.session] = Seat(request, peer, loaded.shard, cache, touched=trio.current_time())
        return Opened(request.epoch)

    async def _give_way(self, peer: PeerId, request: Open) -> None:
        """Leave an older seat of the session, in which the entry gives this stage other units to run."""
        seat = self.seats.get(request.session)
        if seat is None:
            return
        if seat.entry != peer or request.epoch <= seat.open.epoch:
            raise Refused("the session is open already")
        await self._settled(seat)
        self._leave(seat)

    async def _settled(self, seat: Seat) -> None:
        """Wait until no step uses a seat's cache."""
        seen = self._stepped.count
        while seat.computing:
            seen = await self._stepped.after(seen)

    def _check_share(self, peer: PeerId, shard: Shard, tokens: int) -> None:
        """Let no peer take all seats or all the cache: something is left for whoever comes next.

        One session is allowed to everybody, and to this node itself whatever there is.
        """
        seats = [seat for seat in self.seats.values() if seat.entry == peer]
        if peer == self._pipeline.me or not seats:
            return
        reserved = sum(seat.open.limit for seat in seats if seat.shard is shard)
        if len(seats) >= SHARE * (MAX_SEATS - len(self.seats)):
            raise Refused(f"this peer's sessions have their share of the {MAX_SEATS} places")
        if reserved + tokens > SHARE * (shard.free_tokens() - tokens):
            raise Refused(f"this peer's sessions have their share of the cache: {reserved} tokens")

    def _on_close(self, peer: PeerId, frame: Close) -> None:
        seat = self.seats.get(frame.session)
        if seat is None:  # it may have overtaken its Open, which comes by a stream of its own
            self._closed[peer, frame.session] = frame.epoch
            if len(self._closed) > MAX_CLOSED:
                self._closed.popitem(last=False)
        elif seat.entry == peer and seat.open.epoch <= frame.epoch:
            self._leave(seat)

    def _leave(self, seat: Seat) -> None:
        if self._is_seated(seat):
            del self.seats[seat.open.session]
            self.journals.drop(seat.open.session)
            seat.inputs.clear()
            if not seat.computing:
                seat.cache.close()

    def _is_seated(self, seat: Seat) -> bool:
        return self.seats.get(seat.open.session) is seat

    def _fail(self, seat: Seat, reason: str, culprit: str = "") -> None:
        """End a session here, unless it has ended, and have its entry told."""
        if self._is_seated(seat):
            self._leave(seat)
            self._tell(seat, reason, culprit)

    def _miss(self, seat: Seat, peer: PeerId, reason: str) -> None:
        """Have the entry told, once, that a peer beside this seat is lost; the seat waits for a mended route."""
        if self._is_seated(seat) and peer not in seat.blamed:
            seat.blamed.add(peer)
            self._tell(seat, reason, peer)

    def _tell(self, seat: Seat, reason: str, culprit: str) -> None:
        self._pipeline.post(seat.entry, Failed(seat.open.session, seat.open.epoch, reason[:400], culprit))

    def _on_lost(self, peer: PeerId) -> None:
        for seat in list(self.seats.values()):
            if seat.entry == peer:
                self._leave(seat)
            elif peer in seat.beside:
                self._miss(seat, peer, f"lost {peer}")

    async def _expire(self) -> None:
        while True:
            await trio.sleep(IDLE / 4)
            now = trio.current_time()
            for seat in [seat for seat in self.seats.values() if now - seat.touched > IDLE]:
                self._fail(seat, f"nothing was heard for {IDLE:.0f} s")

    # --- frames in ---

    def _on_tokens(self, peer: PeerId, frame: Tokens) -> None:
        seat = self._seat_for(frame, peer, first=True)
        if seat is not None:
            self._enqueue(
                seat, peer, Input(frame.epoch, frame.position, len(frame.ids), frame.more, frame.ids, None, ())
            )

    def _on_activations(self, peer: PeerId, frame: Activations) -> None:
        seat = self._seat_for(frame, peer, first=False)
        if seat is None:
            return
        spec = seat.shard.spec
        activation = Activation(frame.dtype, (frame.count, spec.hidden_size), frame.data)
        try:
            if frame.dtype not in DTYPES or len(frame.trace) != seat.open.stage:
                raise RuleError(f"activations of dtype {frame.dtype!r} after {len(frame.trace)} stages")
            activation.check(spec, frame.dtype, frame.count)
        except RuleError as error:
            self._fail(seat, str(error), culprit=peer)
            return
        self._enqueue(
            seat, peer, Input(frame.epoch, frame.position, frame.count, frame.more, None, activation, frame.trace)
        )

    def _on_drawn(self, peer: PeerId, frame: Drawn) -> None:
        """Stage 0 feeds the token that the last stage drew into the next round."""
        seat = self.seats.get(frame.session)
        if seat is None or seat.open.epoch != frame.epoch or seat.open.stage != 0 or seat.drawer != peer:
            return  # this node is the entry of that session, or it is over
        if frame.token not in seat.open.stop_tokens and frame.position + 1 < seat.open.limit:
            self._enqueue(seat, peer, Input(frame.epoch, frame.position, 1, False, (frame.token,), None, ()))

    def _seat_for(self, frame: Tokens | Activations, peer: PeerId, *, first: bool) -> Seat | None:
        """The seat that a frame is for; None where it is over, stale, or the frame is not that peer's to send.

        A forged frame costs its sender nothing: an entry that names the wrong peers could have had it sent.
        """
        seat = self.seats.get(frame.session)
        if seat is None or seat.open.epoch != frame.epoch or (seat.open.stage == 0) != first or seat.before != peer:
            return None
        return seat

    def _enqueue(self, seat: Seat, peer: PeerId, item: Input) -> None:
        if item.position != seat.expected or item.position + item.count > seat.open.limit:
            self._fail(seat, f"position {item.position} where {seat.expected} was expected", culprit=peer)
            return
        if item.tokens is not None and max(item.tokens) >= seat.shard.spec.vocab_size:
            self._fail(seat, "a token beyond the vocabulary", culprit=peer)
            return
        self._arrivals += 1
        item.number = self._arrivals
        seat.expected += item.count
        seat.touched = trio.current_time()
        seat.inputs.append(item)
        self._ready.beat()

    # --- compute ---

    def _gather(self) -> list[tuple[Seat, Input]]:
        """At most one input of each session: the oldest, then small ones before large, up to BATCH_TOKENS positions.

        All of a batch run over the same units of one shard as the oldest: sessions whose routes cut it elsewhere get
        their own. What is bound for a peer that is slow to take it waits here.
        """
        ready = [seat for seat in self.seats.values() if self._is_ready(seat)]
        if not ready:
            return []
        oldest = min(ready, key=lambda seat: seat.inputs[0].number)
        together = [seat for seat in ready if seat.span == oldest.span]
        together.sort(key=lambda seat: (seat is not oldest, seat.inputs[0].count))
        batch: list[tuple[Seat, Input]] = []
        room = BATCH_TOKENS
        for seat in together:
            if (room := room - seat.inputs[0].count) < 0 and batch:
                break
            batch.append((seat, seat.inputs.popleft()))
        return batch

    def _is_ready(self, seat: Seat) -> bool:
        """Tell whether a seat's next input may be computed: what comes of it has to be sent on, after all before it."""
        return bool(seat.inputs) and not seat.replay and not any(map(self._pipeline.is_congested, seat.after))

    async def _step(self, batch: list[tuple[Seat, Input]]) -> None:
        """Run one batch and send every result to where its session goes next."""
        shard = batch[0][0].shard
        works = [
            Work(
                cache=seat.cache,
                position=item.position,
                tokens=item.tokens,
                activation=item.activation,
                sampling=seat.sampling if seat.is_last and not item.more else None,
            )
            for seat, item in batch
        ]
        began = time.perf_counter()
        for seat, _ in batch:
            seat.computing = True
        try:
            results = await self._compute.run(shard.step, works)
        except RuleError as error:
            if len(batch) == 1:
                self._fail(batch[0][0], str(error))
                return
            for seat, item in batch:  # find the one whose input is wrong: the others must not suffer for it
                if self._is_seated(seat):
                    await self._step([(seat, item)])
            return
        except (RuntimeError, MemoryError) as error:  # torch's own: out of memory, a lost device
            log.exception("a step failed")
            for seat, _ in batch:
                self._fail(seat, f"the step failed: {error}")
            return
        finally:
            for seat, _ in batch:
                seat.computing = False
                if not self._is_seated(seat):
                    seat.cache.close()
        spent = int((time.perf_counter() - began) * 1e6)
        if all(item.count == 1 for _, item in batch):
            layers = max(1, *(seat.leg.last - seat.leg.first for seat, _ in batch))
            self.layer_us = max(1, round(0.9 * self.layer_us + 0.1 * spent / layers))
        for (seat, item), result in zip(batch, results, strict=True):
            if self._is_seated(seat):
                self._send_on(seat, item, result, spent)

    def _send_on(self, seat: Seat, item: Input, result: Result, spent: int) -> None:
        session, epoch = seat.open.session, seat.open.epoch
        if isinstance(result, Activation):
            self.journals.append(session, item.position, result)
        if item.epoch != epoch:
            return  # the session has gone on along another route meanwhile
        if isinstance(result, Activation):
            following = PeerId(seat.open.route[seat.open.stage + 1].peer)
            trace = (*item.trace, (spent, self._microseconds_to(following)))
            had = max(seat.send_from - item.position, 0)  # rows that the next stage has already
            if had < item.count:
                data = result.rows(had, item.count).data
                position, count = item.position + had, item.count - had
                self._post(seat, Activations(session, epoch, position, count, item.more, result.dtype, data, trace))
        elif result is not None:  # the last stage has nothing to say about a chunk in the middle of a prompt
            self._post(seat, Drawn(session, epoch, item.position + item.count, result.id, (*item.trace, (spent, 0))))

    def _post(self, seat: Seat, frame: Activations | Drawn) -> None:
        for target in sorted(seat.after):
            self._pipeline.post(target, frame, partial(self._on_undelivered, seat, frame.epoch, target))

    def _on_undelivered(self, seat: Seat, epoch: int, target: PeerId, error: PeerError) -> None:
        if seat.open.epoch == epoch:
            self._miss(seat, target, f"could not reach {target}: {error}")

    def _microseconds_to(self, peer: PeerId) -> int:
        return round(self._pipeline.round_trip(peer) / 2 * 1e6)
