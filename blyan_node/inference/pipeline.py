"""The wire of the pipeline: one long-lived channel per ordered pair of peers carries the frames of all sessions.

A frame for this node itself is handed over directly, so a route may begin, end or lie wholly here. Handlers never wait
for the network: they put work into bounded places and return, so two peers never wait for each other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import trio

from blyan_node.errors import PeerError
from blyan_node.inference.messages import FRAMES, MAX_FRAME
from blyan_node.p2p.channel import Channels
from blyan_node.p2p.peers import Peers
from blyan_node.p2p.transport import Network, PeerId

FrameHandler = Callable[[PeerId, Any], None]
"""Takes a frame from an authenticated peer. Must not block; ignores sessions that it does not know."""

SEND_PATIENCE = 10.0


class Pipeline:
    """Sends frames to peers and hands incoming ones to the stage and the entry of this node."""

    def __init__(self, network: Network, peers: Peers) -> None:
        self.me, self._network = network.peer_id, network
        self._peers = peers
        self._handlers: dict[type, list[FrameHandler]] = {frame: [] for frame in FRAMES}
        self._on_lost: list[Callable[[PeerId], None]] = []
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

    def on_lost(self, handler: Callable[[PeerId], None]) -> None:
        """Tell ``handler`` of every peer whose channel or connection ended."""
        self._on_lost.append(handler)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Carry frames until cancelled."""
        async with self._network.watch_peers() as changes, trio.open_nursery() as nursery:
            await nursery.start(self._channels.run)
            task_status.started()
            async for change in changes:
                if not change.connected:
                    self._lost(change.peer)

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
