"""The entry side of a prompt's journey: from text to a route, through it, and back to text.

Top to bottom: :meth:`Entry.generate` renders and tokenizes; plans a route and has a seat on each of its stages; sends
the token ids to stage 0; reads the tokens that the last stage draws; turns them into text. The entry's token log is the
only authority on what was generated: when a stage is lost, others take over its range, the log says from where each
stage has to go on, and since draws are keyed by (seed, position), no emitted token changes.
"""

from __future__ import annotations

import logging
import secrets
import statistics
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractAsyncContextManager, aclosing

import trio

from blyan_node.chain.catalog import ModelEntry
from blyan_node.errors import GenerationFailed, ModelUnavailable, Overloaded, PeerError, Refused, RequestError
from blyan_node.inference.generation import Event, Finished, Generate, Hop, Piece, Sampling, Started
from blyan_node.inference.heart import Heart
from blyan_node.inference.library import Known, Library
from blyan_node.inference.messages import MILLION, Drawn, Failed, Leg, Open, Tokens
from blyan_node.inference.patience import suspects
from blyan_node.inference.pipeline import Pipeline
from blyan_node.inference.route import Measurements, mend, plan
from blyan_node.inference.seating import Seating, Session, SessionLost
from blyan_node.inference.stage import Stage
from blyan_node.inference.swarm import SwarmView
from blyan_node.inference.text import TextStream
from blyan_node.p2p.peers import Peers
from blyan_node.p2p.transport import Network, PeerId
from blyan_node.worker import Lane

log = logging.getLogger(__name__)

CHUNK = 128  # positions of a prompt that travel together: long prompts let the steps of others in between
DEFAULT_COMPLETION = 512  # tokens, where the caller sets no bound
ATTEMPTS = 5  # to find a route that brings a token, in a row
RETRY_FIRST = 0.1  # seconds before the third attempt, in which the view may learn who is gone; doubles with each
PATIENCE = 30.0  # seconds that a generation under way waits for somebody to take over lost layers
MAX_SESSIONS = 1024


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
        self._heart, self._library, self._context_limit = heart, library, context_limit
        self._seating = Seating(network, peers, pipeline, stage)
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
        session = Session(_opening(model, known, limit, request.sampling))
        self.sessions[session.id] = session
        try:
            while True:
                try:
                    if not session.flows:
                        await self._set_flowing(session, known, tokens, patience=PATIENCE if started else 0.0)
                        if not started:
                            started = True
                            yield Started(model.name, prompt_tokens, self._hops(known, session))
                    if len(tokens) >= limit:
                        break
                    token = await self._next(session, known, len(tokens))
                except ModelUnavailable as error:
                    if not started:
                        raise
                    raise GenerationFailed(
                        f"layers were lost and nobody took them over: {error}", partial=text.text
                    ) from error
                except PeerError as error:
                    failures += self._give_up(session, error)
                    log.warning("a generation goes on along another route, attempt %d: %s", failures, error)
                    if failures == ATTEMPTS:
                        if isinstance(error.__cause__, Refused) and not started:
                            raise Overloaded(f"no route had room for this generation: {error}") from error
                        raise GenerationFailed(
                            f"{failures} routes failed; the last: {error}", partial=text.text
                        ) from error
                    await trio.sleep(RETRY_FIRST * 2 ** (failures - 2) if failures > 1 else 0)
                    continue
                failures, first_at = 0, first_at or trio.current_time()  # a route that brings tokens is a good one
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
            for peer in session.peers:
                self.measurements.succeeded(peer)
        finally:
            del self.sessions[session.id]
            self._seating.close(session)
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

    async def _set_flowing(self, session: Session, known: Known, tokens: list[int], *, patience: float) -> None:
        """Begin an epoch: a route on which all that was lost is replaced, and the log under way along it."""
        legs = await self._plan(session, known, patience=patience)
        # the last position passes in any case: a token is drawn from it
        start = await self._seating.take(session, legs, len(tokens) - 1)
        await self._send_log(session, tokens, start)
        session.grace = session.patience.prefill(len(tokens))
        session.flows = True

    async def _plan(self, session: Session, known: Known, *, patience: float) -> tuple[Leg, ...]:
        """The best route now that keeps the survivors of the last one, or else the best of all.

        Where there is none, wait up to ``patience`` seconds for peers to fill the gap; raise ModelUnavailable then.
        """
        me, units, opening = self._network.peer_id, known.spec.units, session.opening
        deadline = trio.current_time() + patience
        while True:
            seen, now = self._heart.changed.count, trio.current_time()
            for peer in self._view.active(now):
                if rtt := self._pipeline.round_trip(peer):
                    self.measurements.round_trips[peer] = rtt
            whose = (self._view, opening.model, opening.version)
            if session.legs and (legs := mend(session.legs, session.lost, *whose, self.measurements, me=me, now=now)):
                return legs
            try:
                return plan(*whose, units, self.measurements, me=me, now=now)
            except ModelUnavailable:
                if now >= deadline:
                    raise
            await self._heart.changed.after(seen, most=min(1.0, deadline - now))

    def _give_up(self, session: Session, error: PeerError) -> bool:
        """Note who is to be replaced, and avoid those who failed; False where somebody just leaves."""
        session.flows = False
        if isinstance(error, SessionLost):
            session.lost.add(error.culprit)
        for peer in session.lost - session.leaving:
            self.measurements.failed(peer, trio.current_time())
        return not (isinstance(error, SessionLost) and error.culprit in session.leaving)

    # --- along it ---

    async def _send_log(self, session: Session, tokens: list[int], start: int) -> None:
        """Send the log from ``start`` on to stage 0, in chunks; the last one asks for a token."""
        first = PeerId(session.legs[0].peer)
        for begin in range(start, len(tokens), CHUNK):
            ids = tuple(tokens[begin : begin + CHUNK])
            more = begin + CHUNK < len(tokens)
            try:
                await self._pipeline.send(first, Tokens(session.id, session.epoch, begin, ids, more))
            except PeerError as error:
                raise SessionLost(str(error), first) from error

    async def _next(self, session: Session, known: Known, position: int) -> int:
        """The token at ``position``. Raises SessionLost, also where none comes for as long as the session allows."""
        began, item = trio.current_time(), None
        with trio.move_on_after(session.grace):
            item = await session.incoming.receive()
        if item is None:
            item = await self._wait_on(session, position)
        if isinstance(item, SessionLost):
            raise item
        if item.position != position:
            raise SessionLost(f"a token for position {item.position} where {position} was due", session.drawer)
        if item.token >= known.spec.vocab_size:
            raise SessionLost(f"token {item.token} of a vocabulary of {known.spec.vocab_size}", session.drawer)
        if session.traces:  # the first token of an epoch has the prompt or a recovery before it
            session.patience.took(trio.current_time() - began)
        session.traces.append(item.trace)
        session.grace = session.patience.step()
        return item.token

    async def _wait_on(self, session: Session, position: int) -> Drawn | SessionLost:
        """A token is overdue: find out who holds it up, and wait on only for what stands in front of that stage."""
        answers = await self._seating.probe(session)
        session.patience.stalls += 1
        computed = [answer.computed if answer else None for answer in answers]
        late = suspects(computed, position, session.patience.stalls)
        waiting = answer.waiting if (answer := answers[late[0]]) else 0
        with trio.move_on_after(session.patience.queue(waiting)):
            return await session.incoming.receive()
        culprits = [PeerId(session.legs[index].peer) for index in late]
        session.lost.update(culprits)
        return SessionLost(f"no token came for {session.grace:.0f} s: {', '.join(culprits)} held it up", culprits[0])

    def _on_drawn(self, peer: PeerId, frame: Drawn) -> None:
        session = self.sessions.get(frame.session)
        if session is not None and session.epoch == frame.epoch and session.drawer == peer:
            _post(session, frame)

    def _on_failed(self, peer: PeerId, frame: Failed) -> None:
        session = self.sessions.get(frame.session)
        if session is not None and session.epoch == frame.epoch and peer in session.peers:
            culprit = frame.culprit if frame.culprit in session.peers else peer
            _post(session, SessionLost(f"{peer}: {frame.reason}", PeerId(culprit)))

    def _on_lost(self, peer: PeerId) -> None:
        for session in self.sessions.values():
            if peer in session.peers:
                _post(session, SessionLost(f"lost {peer}", peer))

    async def run(self) -> None:
        """Move sessions off peers that say they leave, while these still serve them; until cancelled."""
        seen = 0
        while True:
            seen = await self._heart.changed.after(seen)
            now, me = trio.current_time(), self._network.peer_id
            leaving = self._view.leaving(now) - {me}
            for session in self.sessions.values():
                for peer in session.peers & leaving - session.leaving:
                    opening = session.opening
                    whose = (self._view, opening.model, opening.version)
                    if mend(session.legs, {peer}, *whose, self.measurements, me=me, now=now):
                        session.leaving.add(peer)
                        _post(session, SessionLost(f"{peer} is leaving", peer))

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


def _opening(model: ModelEntry, known: Known, limit: int, sampling: Sampling) -> Open:
    """What all stages of a new session are told; the route comes with each epoch."""
    return Open(
        session=secrets.token_bytes(16),
        epoch=0,
        model=model.id,
        version=model.version,
        route=(),
        stage=0,
        limit=limit,
        temperature=round(sampling.temperature * MILLION),
        top_p=round(sampling.top_p * MILLION),
        seed=sampling.seed,
        stop_tokens=tuple(sorted(known.tokenizer.eos_ids)),
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
