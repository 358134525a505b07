"""The entry side of a prompt's journey: from text to a route, through it, and back to text.

Top to bottom: :meth:`Entry.generate` renders and tokenizes; plans a route and opens a session on each of its stages;
sends the token ids to stage 0; reads the tokens that the last stage draws; turns them into text. The entry's token log
is the only authority on what was generated: when a stage is lost, a new route takes the whole log as its prompt and
goes on from there, and since draws are keyed by (seed, position), no emitted token changes.
"""

from __future__ import annotations

import logging
import secrets
import statistics
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import dataclass, field

import trio

from blyan_node.chain.catalog import ModelEntry
from blyan_node.errors import GenerationFailed, ModelUnavailable, Overloaded, PeerError, Refused, RequestError
from blyan_node.inference.generation import Event, Finished, Generate, Hop, Piece, Sampling, Started
from blyan_node.inference.heart import Heart
from blyan_node.inference.library import Known, Library
from blyan_node.inference.messages import MILLION, OPEN, Close, Drawn, Failed, Leg, Open, Tokens, Trace
from blyan_node.inference.pipeline import Pipeline
from blyan_node.inference.route import Measurements, plan
from blyan_node.inference.stage import Stage
from blyan_node.inference.swarm import SwarmView
from blyan_node.inference.text import TextStream
from blyan_node.p2p import rpc
from blyan_node.p2p.peers import Peers
from blyan_node.p2p.transport import Network, PeerId
from blyan_node.worker import Lane

log = logging.getLogger(__name__)

CHUNK = 128  # positions of a prompt that travel together: long prompts let the steps of others in between
DEFAULT_COMPLETION = 512  # tokens, where the caller sets no bound
ATTEMPTS = 5
STALL = 30.0  # seconds without a token, besides those that the prompt may take
PREFILL_RATE = 20.0  # positions per second that the slowest route is granted
PATIENCE = 30.0  # seconds that a generation under way waits for somebody to take over lost layers, or for room
ROOM_AGAIN = 0.5  # seconds between two looks for room
MAX_SESSIONS = 1024


class SessionLost(PeerError):
    """A session cannot go on along its route; ``culprit`` is the peer to avoid."""

    def __init__(self, reason: str, culprit: PeerId) -> None:
        super().__init__(reason)
        self.culprit = culprit


@dataclass
class Session:
    """One attempt at a generation: a route that is open, and what comes back along it."""

    id: bytes
    legs: tuple[Leg, ...]
    mailbox: trio.MemorySendChannel[Drawn | SessionLost]
    incoming: trio.MemoryReceiveChannel[Drawn | SessionLost]
    traces: list[Trace] = field(default_factory=list)

    @property
    def drawer(self) -> PeerId:
        """The last stage, from which tokens come."""
        return PeerId(self.legs[-1].peer)


class Entry:
    """Answers prompts with the help of the swarm."""

    def __init__(
        self,
        network: Network,
        peers: Peers,
        pipeline: Pipeline,
        view: SwarmView,
        heart: Heart,
        library: Library,
        stage: Stage,
        disk: Lane,
        *,
        context_limit: int,
    ) -> None:
        self._disk = disk
        self._network, self._peers, self._pipeline, self._view = network, peers, pipeline, view
        self._heart, self._library, self._stage, self._context_limit = heart, library, stage, context_limit
        self.measurements = Measurements()
        self.sessions: dict[bytes, Session] = {}
        pipeline.on(Drawn, self._on_drawn)
        pipeline.on(Failed, self._on_failed)
        pipeline.on_lost(self._on_lost)

    def generate(self, request: Generate) -> AbstractAsyncContextManager[AsyncIterator[Event]]:
        """Run one generation; iterate over its events, leave the context to cancel it on every stage.

        Raises RequestError for a request that cannot be, ModelUnavailable where no route covers the model, Overloaded
        where all routes are full, GenerationFailed, with the partial text, where it could not be brought to its end.
        """
        return aclosing(self._generate(request))

    async def _generate(self, request: Generate) -> AsyncGenerator[Event, None]:
        if len(self.sessions) >= MAX_SESSIONS:
            raise Overloaded(f"this node is running {MAX_SESSIONS} generations; try again soon")
        model = self._library.select(request.model)
        known = await self._library.know(model)
        tokens = await self._disk.run(_tokenize, known, request)
        limit = _limit(known, request, len(tokens), self._context_limit)
        prompt_tokens, began, first_at = len(tokens), trio.current_time(), 0.0
        text = TextStream(known.tokenizer.stream(), request.stop)
        reason, failures, started = "length", 0, False
        hops: tuple[Hop, ...] = ()
        patient_until = began + PATIENCE

        while True:
            before = len(tokens)
            try:
                legs = await self._plan(model, known, patience=PATIENCE if started else 0.0)
                async with self._open(model, known, legs, before, limit, request.sampling) as session:
                    if not started:
                        started = True
                        yield Started(model.name, prompt_tokens, self._hops(known, session))
                    await self._send_prompt(session, tokens)
                    grace = STALL + len(tokens) / PREFILL_RATE
                    while len(tokens) < limit:
                        token = await self._next(session, known, len(tokens), grace)
                        first_at, grace = first_at or trio.current_time(), STALL
                        patient_until = trio.current_time() + PATIENCE
                        if token in known.tokenizer.eos_ids:
                            reason = "stop"
                            break
                        tokens.append(token)
                        if piece := text.push(token):
                            yield Piece(piece, len(tokens) - prompt_tokens)
                        if text.stopped:
                            reason = "stop"
                            break
                    hops = self._hops(known, session)
                    for leg in session.legs:
                        self.measurements.succeeded(PeerId(leg.peer))
                break
            except ModelUnavailable as error:
                if not started:
                    raise
                raise GenerationFailed(
                    f"layers were lost and nobody took them over: {error}", partial=text.text
                ) from error
            except PeerError as error:
                if started and isinstance(error, Refused) and trio.current_time() < patient_until:
                    await trio.sleep(ROOM_AGAIN)  # full, not broken: others come to their end
                    continue
                failures = 1 if len(tokens) > before else failures + 1  # a route that brought tokens was a good one
                log.warning("generation lost its route (%s), attempt %d", error, failures)
                if failures == ATTEMPTS:
                    if isinstance(error, Refused) and not started:
                        raise Overloaded(f"no route had room for this generation: {error}") from error
                    raise GenerationFailed(f"{failures} routes failed; the last: {error}", partial=text.text) from error
        if rest := text.finish():
            yield Piece(rest, len(tokens) - prompt_tokens)
        reason = "stop" if text.stopped else reason
        now = trio.current_time()
        yield Finished(
            reason,
            text.text,
            prompt_tokens,
            len(tokens) - prompt_tokens,
            1000 * ((first_at or now) - began),
            1000 * (now - began),
            hops,
        )

    # --- a route ---

    @asynccontextmanager
    async def _open(
        self, model: ModelEntry, known: Known, legs: tuple[Leg, ...], prompt: int, limit: int, sampling: Sampling
    ) -> AsyncIterator[Session]:
        """Reserve a place on each stage of a route at once; on the way out, free them again."""
        mailbox, incoming = trio.open_memory_channel[Drawn | SessionLost](limit + 1)
        session = Session(secrets.token_bytes(16), legs, mailbox, incoming)
        self.sessions[session.id] = session
        try:
            refusals: list[SessionLost] = []
            async with trio.open_nursery() as nursery:
                for index in range(len(legs)):
                    request = _opening(session, index, model, known, prompt, limit, sampling)
                    nursery.start_soon(self._open_stage, request, refusals)
            if refusals:
                for refusal in refusals:
                    self.measurements.failed(refusal.culprit, trio.current_time())
                raise refusals[0].__cause__ or refusals[0]
            try:
                yield session
            except SessionLost as lost:
                self.measurements.failed(lost.culprit, trio.current_time())
                raise
        finally:
            del self.sessions[session.id]
            for leg in legs:
                self._pipeline.post(PeerId(leg.peer), Close(session.id))

    async def _plan(self, model: ModelEntry, known: Known, *, patience: float) -> tuple[Leg, ...]:
        """The best route now; where there is none, wait up to ``patience`` seconds for peers to fill the gap."""
        deadline = trio.current_time() + patience
        while True:
            seen, now = self._heart.changed.count, trio.current_time()
            for peer in self._view.active(now):
                if rtt := self._pipeline.round_trip(peer):
                    self.measurements.round_trips[peer] = rtt
            me, units = self._network.peer_id, known.spec.units
            try:
                return plan(self._view, model.id, model.version, units, self.measurements, me=me, now=now)
            except ModelUnavailable:
                if now >= deadline:
                    raise
            await self._heart.changed.after(seen, most=min(1.0, deadline - now))

    async def _open_stage(self, request: Open, refusals: list[SessionLost]) -> None:
        peer = PeerId(request.route[request.stage].peer)
        try:
            if peer == self._network.peer_id:
                await self._stage.open(peer, request)
            else:
                await self._peers.ensure(peer)
                await rpc.call(self._network, peer, OPEN, request)
        except PeerError as error:
            lost = SessionLost(f"{peer} did not open: {error}", peer)
            lost.__cause__ = error
            refusals.append(lost)

    # --- along it ---

    async def _send_prompt(self, session: Session, tokens: list[int]) -> None:
        """Send the whole log to stage 0, in chunks; the last one asks for a token."""
        first = PeerId(session.legs[0].peer)
        for start in range(0, len(tokens), CHUNK):
            ids = tuple(tokens[start : start + CHUNK])
            try:
                await self._pipeline.send(first, Tokens(session.id, 0, start, ids, start + CHUNK < len(tokens)))
            except PeerError as error:
                raise SessionLost(str(error), first) from error

    async def _next(self, session: Session, known: Known, position: int, grace: float) -> int:
        """The token at ``position``. Raises SessionLost, also where none comes for ``grace`` seconds."""
        with trio.move_on_after(grace) as waited:
            item = await session.incoming.receive()
        if waited.cancelled_caught:
            raise SessionLost(f"no token came for {grace:.0f} s", PeerId(session.legs[0].peer))
        if isinstance(item, SessionLost):
            raise item
        if item.position != position:
            raise SessionLost(f"a token for position {item.position} where {position} was due", session.drawer)
        if item.token >= known.spec.vocab_size:
            raise SessionLost(f"token {item.token} of a vocabulary of {known.spec.vocab_size}", session.drawer)
        session.traces.append(item.trace)
        return item.token

    def _on_drawn(self, peer: PeerId, frame: Drawn) -> None:
        session = self.sessions.get(frame.session)
        if session is not None and session.drawer == peer:
            _post(session, frame)

    def _on_failed(self, peer: PeerId, frame: Failed) -> None:
        session = self.sessions.get(frame.session)
        named = {leg.peer for leg in session.legs} if session is not None else set()
        if session is not None and peer in named:
            culprit = frame.culprit if frame.culprit in named else peer
            _post(session, SessionLost(f"{peer}: {frame.reason}", PeerId(culprit)))

    def _on_lost(self, peer: PeerId) -> None:
        for session in self.sessions.values():
            if any(leg.peer == peer for leg in session.legs):
                _post(session, SessionLost(f"lost {peer}", peer))

    def _hops(self, known: Known, session: Session) -> tuple[Hop, ...]:
        """What is known of each stage by now: medians over the decode steps (the first trace is the prefill's)."""
        traces = [trace for trace in session.traces if len(trace) == len(session.legs)]
        traces = traces[1:] or traces
        hops = []
        for index, leg in enumerate(session.legs):
            compute = statistics.median(trace[index][0] for trace in traces) / 1000 if traces else 0.0
            if index:
                reach = statistics.median(trace[index - 1][1] for trace in traces) / 1000 if traces else 0.0
            else:
                reach = 500 * self._pipeline.round_trip(PeerId(leg.peer))
            names = known.spec.units[leg.first : leg.last + 1]
            layers = sum(name.startswith("layer.") for name in names)
            hops.append(Hop(leg.peer, names[0], names[-1], layers, compute, reach))
        return tuple(hops)


def _post(session: Session, item: Drawn | SessionLost) -> None:
    """Put an item into a session's mailbox, which holds as many as the session may draw: what exceeds it is a fault."""
    try:
        session.mailbox.send_nowait(item)
    except trio.WouldBlock:
        log.warning("dropped a frame for a session whose mailbox is full")


def _opening(
    session: Session, index: int, model: ModelEntry, known: Known, prompt: int, limit: int, sampling: Sampling
) -> Open:
    return Open(
        session=session.id,
        epoch=0,
        model=model.id,
        version=model.version,
        route=session.legs,
        stage=index,
        limit=limit,
        temperature=round(sampling.temperature * MILLION),
        top_p=round(sampling.top_p * MILLION),
        seed=sampling.seed,
        stop_tokens=tuple(sorted(known.tokenizer.eos_ids)),
        prompt=prompt,
    )


def _tokenize(known: Known, request: Generate) -> list[int]:
    """The token ids of a prompt. Template and tokenizer came from a peer: bounded in what they do, but not fast."""
    if isinstance(request.prompt, str):
        tokens = known.tokenizer.encode(request.prompt)
    else:
        # The template writes the special tokens itself.
        tokens = known.tokenizer.encode(known.tokenizer.render(request.prompt), special=False)
    if not tokens:
        raise RequestError("the prompt is empty", param="prompt")
    return list(tokens)


def _limit(known: Known, request: Generate, prompt: int, context_limit: int) -> int:
    """Positions that the session may fill: prompt and completion. Raises RequestError where none is left."""
    context = min(known.spec.context_length, context_limit)
    if prompt >= context:
        raise RequestError(
            f"the prompt has {prompt} tokens, and the context of this model here is {context}: shorten it",
            param="messages",
        )
    wanted = DEFAULT_COMPLETION if request.max_tokens is None else request.max_tokens
    return min(prompt + wanted, context)
