"""The wire of the pipeline: one long-lived channel per ordered pair of peers carries the frames of all sessions.

A frame for this node itself is handed over directly, so a route may begin, end or lie wholly here. Handlers never wait
for the network: they put work into bounded places and return, so two peers never wait for each other.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import trio

from blyan_node.errors import PeerError
from blyan_node.inference.messages import FRAMES, MAX_FRAME, Activations
from blyan_node.p2p.channel import Channels
from blyan_node.p2p.peers import Peers
from blyan_node.p2p.transport import Network, PeerId

FrameHandler = Callable[[PeerId, Any], None]
"""Takes a frame from an authenticated peer. Must not block; ignores sessions that it does not know."""

Undelivered = Callable[[PeerError], None]
"""Told that a posted frame did not get away."""

log = logging.getLogger(__name__)

SEND_PATIENCE = 10.0
CONGESTED_FRAMES = 64
CONGESTED_BYTES = 8 * 1024 * 1024
OUTBOX_FRAMES = 4096


def _forgotten(error: PeerError) -> None:
    log.debug("a frame did not get away: %s", error)


@dataclass
class _Outbox:
    """Frames that wait to be sent to one peer, and the bytes of their activations."""

    waiting: deque[tuple[Any, Undelivered]] = field(default_factory=deque)
    size: int = 0

    @property
    def congested(self) -> bool:
        return len(self.waiting) >= CONGESTED_FRAMES or self.size >= CONGESTED_BYTES


class Pipeline:
    """Sends frames to peers and hands incoming ones to the stage and the entry of this node."""

    def __init__(self, network: Network, peers: Peers) -> None:
        self.me, self._network = network.peer_id, network
        self._peers = peers
        self._handlers: dict[type, list[FrameHandler]] = {frame: [] for frame in FRAMES}
        self._on_lost: list[Callable[[PeerId], None]] = []
        self._on_room: list[Callable[[], None]] = []
        self._outboxes: dict[PeerId, _Outbox] = {}
        self._nursery: trio.Nursery | None = None
        self._channels = Channels(
            network,
            "/blyan/pipeline/1",
            FRAMES,
            largest=MAX_FRAME + 4096,
            on_message=self._receive,
            on_lost=self._lost,
        )

    def on(self, frame: type, handler: FrameHandler) -> None:
        """Hand frames of this type to ``handler``, besides those registered before."""
        self._handlers[frame].append(handler)

    def on_room(self, handler: Callable[[], None]) -> None:
        """Tell ``handler`` when a peer that was congested is so no more."""
        self._on_room.append(handler)

    def on_lost(self, handler: Callable[[PeerId], None]) -> None:
        """Tell ``handler`` of every peer whose channel or connection ended."""
        self._on_lost.append(handler)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Carry frames until cancelled."""
        async with self._network.watch_peers() as changes, trio.open_nursery() as nursery:
            await nursery.start(self._channels.run)
            self._nursery = nursery
            try:
                task_status.started()
                async for change in changes:
                    if not change.connected:
                        self._lost(change.peer)
            finally:
                self._nursery = None

    async def send(self, peer: PeerId, frame: Any) -> None:
        """Send a frame, waiting while the peer's queue is full. Raises PeerError where the peer cannot be reached."""
        if peer == self.me:
            await trio.lowlevel.checkpoint()
            self._hand_over(peer, frame)
            return
        with trio.move_on_after(SEND_PATIENCE):
            await self._peers.ensure(peer)
            await self._channels.send(peer, frame)
            return
        raise PeerError(f"{peer} took no frame for {SEND_PATIENCE:.0f} s")

    def post(self, peer: PeerId, frame: Any, undelivered: Undelivered = _forgotten) -> None:
        """Have a frame sent, in order with what was posted before, and go on at once.

        A peer that is slow to take its frames holds up nobody else. ``undelivered`` is told where it takes none.
        """
        if peer == self.me:
            self._hand_over(peer, frame)
            return
        outbox = self._outboxes.get(peer)
        if outbox is None:
            if self._nursery is None:
                undelivered(PeerError("this node is stopping"))
                return
            outbox = self._outboxes[peer] = _Outbox()
            self._nursery.start_soon(self._empty, peer, outbox)
        if len(outbox.waiting) >= OUTBOX_FRAMES:
            undelivered(PeerError(f"{OUTBOX_FRAMES} frames wait for {peer}"))
            return
        outbox.waiting.append((frame, undelivered))
        outbox.size += _size(frame)

    def is_congested(self, peer: PeerId) -> bool:
        """Tell whether so much waits for this peer that no more should be computed for it."""
        outbox = self._outboxes.get(peer)
        return outbox is not None and outbox.congested

    async def _empty(self, peer: PeerId, outbox: _Outbox) -> None:
        """Send what waits for a peer; where it takes none, all of it has failed."""
        try:
            while outbox.waiting:
                frame, undelivered = outbox.waiting[0]
                await self.send(peer, frame)
                was_congested = outbox.congested
                outbox.waiting.popleft()
                outbox.size -= _size(frame)
                if was_congested and not outbox.congested:
                    self._tell_room()
        except PeerError as error:
            del self._outboxes[peer]  # what is posted by those told now is another attempt
            for _, undelivered in outbox.waiting:
                undelivered(error)
            self._tell_room()
        else:
            del self._outboxes[peer]

    def _tell_room(self) -> None:
        for handler in self._on_room:
            handler()

    def round_trip(self, peer: PeerId) -> float:
        """Seconds there and back on the channel to a peer; 0 to oneself or where it is not measured yet."""
        return 0.0 if peer == self.me else self._channels.round_trip(peer) or 0.0

    async def _receive(self, peer: PeerId, frame: Any) -> None:
        self._hand_over(peer, frame)

    def _hand_over(self, peer: PeerId, frame: Any) -> None:
        for handler in self._handlers[type(frame)]:
            handler(peer, frame)

    def _lost(self, peer: PeerId) -> None:
        for handler in self._on_lost:
            handler(peer)


def _size(frame: Any) -> int:
    return len(frame.data) if isinstance(frame, Activations) else 0
