"""The entry's side of a route: a seat on each of its stages, opened, kept through changes of the route, given up.

A session goes through epochs. Each begins with a route on which every stage that was there before is told RESUME and
keeps what it holds, and every other is opened anew, all at once. From what they hold follows what each has to do
(:mod:`blyan_node.inference.recovery`); they are told from the last to the first, so that whoever sends again finds the
next stage ready. Then the log flows, from where the first stage lacks it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import trio

from blyan_node.errors import PeerError, ProtocolViolation, Refused
from blyan_node.inference.messages import (
    OPEN,
    PROBE,
    REPLAY,
    RESUME,
    Close,
    Drawn,
    Leg,
    Open,
    Probe,
    Probed,
    Replay,
    Resume,
    Trace,
)
from blyan_node.inference.patience import Patience
from blyan_node.inference.pipeline import Pipeline
from blyan_node.inference.recovery import Standing, Task, share_out
from blyan_node.inference.stage import Stage
from blyan_node.p2p import rpc
from blyan_node.p2p.peers import Peers
from blyan_node.p2p.transport import Network, PeerId

log = logging.getLogger(__name__)


class SessionLost(PeerError):
    """A session cannot go on along its route; ``culprit`` is the peer to replace, who may have done no wrong."""

    def __init__(self, reason: str, culprit: PeerId) -> None:
        super().__init__(reason)
        self.culprit = culprit


@dataclass
class Session:
    """One generation under way: its route at this epoch, and what comes back along it."""

    opening: Open
    """What its stages are told at open; ``route``, ``stage`` and ``epoch`` differ for each."""
    legs: tuple[Leg, ...] = ()
    epoch: int = -1
    flows: bool = False  # the route is open, and the log is on its way
    grace: float = 0.0  # seconds that the next token may take
    patience: Patience = field(default_factory=Patience)
    leaving: set[PeerId] = field(default_factory=set)  # who said so in this epoch
    lost: set[PeerId] = field(default_factory=set)  # to be replaced with the next route
    traces: list[Trace] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._open_mailbox()

    @property
    def id(self) -> bytes:
        """Its name on the wire."""
        return self.opening.session

    @property
    def drawer(self) -> PeerId:
        """The last stage, from which tokens come."""
        return PeerId(self.legs[-1].peer)

    @property
    def peers(self) -> set[PeerId]:
        """Who takes part."""
        return {PeerId(leg.peer) for leg in self.legs}

    def advance(self, legs: tuple[Leg, ...]) -> None:
        """Begin the next epoch; what came in the one before is void."""
        self.legs, self.epoch = legs, self.epoch + 1
        self.lost.clear()
        self.leaving.clear()
        self.traces.clear()
        self._open_mailbox()

    def _open_mailbox(self) -> None:
        # as many as it may draw, and for each peer that it leaves or is lost
        size = self.opening.limit + 1 + 2 * len(self.legs)
        self.mailbox, self.incoming = trio.open_memory_channel[Drawn | SessionLost](size)


class Seating:
    """Opens, moves and closes the seats of this node's sessions."""

    def __init__(self, network: Network, peers: Peers, pipeline: Pipeline, stage: Stage) -> None:
        self._network, self._peers, self._pipeline, self._stage = network, peers, pipeline, stage
        self._asking: dict[PeerId, set[trio.CancelScope]] = {}
        pipeline.on_lost(self._on_lost)

    async def take(self, session: Session, legs: tuple[Leg, ...], position: int) -> int:
        """Begin an epoch along ``legs``, with all that lies below ``position`` kept wherever it is.

        Returns the position from which the first stage needs the log. Raises SessionLost for a stage that does not
        take part; ``session.lost`` names all of them.
        """
        before = session.legs
        session.advance(legs)
        for leg in before:
            if PeerId(leg.peer) not in session.peers:
                self._pipeline.post(PeerId(leg.peer), Close(session.id, session.epoch - 1))
        standings: dict[int, Standing] = {}
        failures: list[SessionLost] = []
        async with trio.open_nursery() as nursery:
            for index, leg in enumerate(legs):
                nursery.start_soon(self._join, session, index, leg in before, position, standings, failures)
        if failures:
            raise failures[0] from failures[0].__cause__
        tasks = share_out([standings[index] for index in range(len(legs))])
        for index in reversed(range(len(legs))):
            if _is_needed(standings[index], tasks[index]):
                await self._replay(session, index, tasks[index])
        return tasks[0].keep

    async def probe(self, session: Session) -> list[Probed | None]:
        """Ask all stages how far they got; None for each that does not answer."""
        answers: list[Probed | None] = [None] * len(session.legs)

        async def ask(index: int, peer: PeerId) -> None:
            probe = Probe(session.id)
            try:
                with self._while_there(peer):
                    if peer == self._network.peer_id:
                        answer = await self._stage.resuming.probe(peer, probe)
                    else:
                        answer = await rpc.call(self._network, peer, PROBE, probe)
                answers[index] = answer
            except PeerError as error:
                log.info("%s does not say how far it got: %s", peer, error)

        async with trio.open_nursery() as nursery:
            for index, leg in enumerate(session.legs):
                nursery.start_soon(ask, index, PeerId(leg.peer))
        return answers

    def close(self, session: Session) -> None:
        """Free the seats."""
        for leg in session.legs:
            self._pipeline.post(PeerId(leg.peer), Close(session.id, session.epoch))

    async def _join(
        self,
        session: Session,
        index: int,
        stays: bool,
        position: int,
        standings: dict[int, Standing],
        failures: list[SessionLost],
    ) -> None:
        peer = PeerId(session.legs[index].peer)
        try:
            with self._while_there(peer):
                standings[index] = await self._stand(session, index, stays, position)
        except PeerError as error:
            session.lost.add(peer)
            lost = SessionLost(f"{peer} did not open: {error}", peer)
            lost.__cause__ = error
            failures.append(lost)

    async def _stand(self, session: Session, index: int, stays: bool, position: int) -> Standing:
        """Have a stage take its place; what it holds. A seat that is gone is opened anew."""
        leg = session.legs[index]
        peer, mine = PeerId(leg.peer), leg.peer == self._network.peer_id
        if stays:
            resume = Resume(session.id, session.epoch, session.legs, index, position)
            try:
                if mine:
                    resumed = await self._stage.resuming.resume(peer, resume)
                else:
                    resumed = await rpc.call(self._network, peer, RESUME, resume)
                if not resumed.journal <= resumed.held <= position:
                    raise ProtocolViolation(f"it claims to hold {resumed.held} positions of {position}")
                return Standing(resumed.held, resumed.journal)
            except Refused:
                pass  # it lost the session, but may well take it up again
        opening = replace(session.opening, epoch=session.epoch, route=session.legs, stage=index)
        if mine:
            await self._stage.open(peer, opening)
        else:
            await self._peers.ensure(peer)
            await rpc.call(self._network, peer, OPEN, opening)
        return Standing()

    async def _replay(self, session: Session, index: int, task: Task) -> None:
        peer = PeerId(session.legs[index].peer)
        replay = Replay(session.id, session.epoch, task.keep, task.send_from)
        try:
            with self._while_there(peer):
                if peer == self._network.peer_id:
                    await self._stage.resuming.replay(peer, replay)
                else:
                    await rpc.call(self._network, peer, REPLAY, replay)
        except PeerError as error:
            session.lost.add(peer)
            raise SessionLost(f"{peer} did not resume: {error}", peer) from error

    @contextmanager
    def _while_there(self, peer: PeerId) -> Iterator[None]:
        """Give up what is asked of a peer as soon as it is lost, rather than at its deadline; raises PeerError then."""
        scope = trio.CancelScope()
        asking = self._asking.setdefault(peer, set())
        asking.add(scope)
        try:
            with scope:
                yield
        finally:
            asking.remove(scope)
            if not asking:
                del self._asking[peer]
        if scope.cancelled_caught:
            raise PeerError(f"lost {peer}")

    def _on_lost(self, peer: PeerId) -> None:
        for scope in self._asking.get(peer, ()):
            scope.cancel()


def _is_needed(standing: Standing, task: Task) -> bool:
    """Tell whether a stage has to be told its task: it would else keep all and send what it computes from there on."""
    return task.keep != standing.held or task.send_from != standing.held
