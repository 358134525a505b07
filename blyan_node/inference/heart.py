"""Sends this node's heartbeat and folds those of others into the view."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import trio

from blyan_node.chain.keys import Key
from blyan_node.errors import PeerError, RuleError
from blyan_node.inference.messages import HEARTBEAT_TOPIC, Heartbeat
from blyan_node.inference.swarm import INTERVAL, SwarmView, sign, verify
from blyan_node.p2p.peers import Peers
from blyan_node.p2p.transport import Gossip, Network, PeerChange, PeerId
from blyan_node.pulse import Pulse

log = logging.getLogger(__name__)

Describe = Callable[[int], Heartbeat]
"""Builds the heartbeat of now; takes its sequence number."""

LEAST_APART = 0.25  # seconds between two heartbeats, however much changes


class Heart:
    """One node's heartbeat, and its ear for those of others.

    A change beats ``urgent``; else one goes out every INTERVAL seconds. ``changed`` beats with the view.
    """

    def __init__(self, network: Network, peers: Peers, key: Key, view: SwarmView, network_id: bytes) -> None:
        self._network, self._peers, self._key, self._view = network, peers, key, view
        self._network_id = network_id
        self.urgent = Pulse()
        self.changed = Pulse()

    async def run(self, describe: Describe, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Beat and listen until cancelled."""
        async with (
            self._network.subscribe(HEARTBEAT_TOPIC, self._plausible, capacity=4096) as heard,
            self._network.watch_peers() as changes,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(self._beat, describe)
            nursery.start_soon(self._watch, changes, nursery)
            task_status.started()
            async for message in heard:
                self._hear(message)

    async def _beat(self, describe: Describe) -> None:
        while True:
            seen = self.urgent.count
            heartbeat = describe(time.time_ns())
            self._observe(heartbeat)
            await self._network.publish(HEARTBEAT_TOPIC, sign(heartbeat, self._key))
            await trio.sleep(LEAST_APART)
            await self.urgent.after(seen, most=INTERVAL - LEAST_APART)

    async def _watch(self, changes: trio.MemoryReceiveChannel[PeerChange], nursery: trio.Nursery) -> None:
        """A new neighbour should not wait for our heartbeat; one that went away is looked for."""
        async for change in changes:
            if change.connected:
                self.urgent.beat()
            else:
                nursery.start_soon(self._look_for, change.peer)

    async def _look_for(self, peer: PeerId) -> None:
        """A connection ended: a peer that cannot be reached again is gone, whatever its last heartbeat promised."""
        if not self._view.is_active(peer, trio.current_time()):
            return
        try:
            await self._peers.ensure(peer)
        except PeerError:
            log.info("lost %s", peer)
            self._view.forget(peer)
            self.changed.beat()

    def _plausible(self, origin: PeerId, data: bytes) -> bool:
        try:
            return verify(data, self._network_id).peer == origin
        except RuleError as error:
            log.info("refused a heartbeat from %s: %s", origin, error)
            return False

    def _hear(self, message: Gossip) -> None:
        self._observe(verify(message.data, self._network_id))

    def _observe(self, heartbeat: Heartbeat) -> None:
        peer = PeerId(heartbeat.peer)
        if self._view.observe(heartbeat, trio.current_time()):
            if peer != self._network.peer_id:
                self._peers.learn(peer, heartbeat.addresses)
            self.changed.beat()
