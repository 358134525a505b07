"""The seam between the program and the network: one interface, two implementations, one contract suite.

:mod:`blyan_node.p2p.host` implements it with libp2p over TCP; :mod:`blyan_node.p2p.memory` in one process, for tests
under the virtual clock. Everything above speaks to :class:`Network` only.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import NewType, Protocol

import trio

PeerId = NewType("PeerId", str)
"""A libp2p peer id in base58; of a secp256k1 key, so it begins with ``16Uiu2``."""


class Stream(Protocol):
    """A reliable byte stream to one peer. All methods raise ChannelClosed once the peer or the connection is gone."""

    @property
    def peer(self) -> PeerId:
        """The authenticated remote peer."""
        ...

    async def send_all(self, data: bytes | memoryview) -> None:
        """Send all of it, waiting while the peer's window is full."""
        ...

    async def receive_some(self, most: int) -> bytes:
        """Receive between 1 and ``most`` bytes; b"" at the end of the peer's data."""
        ...

    async def close_write(self) -> None:
        """Say that no more will be sent; reading goes on."""
        ...

    async def aclose(self) -> None:
        """Close both ways, politely; never raises."""
        ...

    async def reset(self) -> None:
        """Abandon the stream at once, both ways; never raises."""
        ...


Handler = Callable[[Stream], Awaitable[None]]
"""Serves one incoming stream. It may raise: the guard logs, scores the peer and resets the stream."""

Validator = Callable[[PeerId, bytes], bool]
"""Judges a gossiped message (origin, data) in isolation. False penalises the sender: say it only of what is wrong."""


@dataclass(frozen=True)
class Gossip:
    """A message delivered by gossip: its authenticated origin (which need not be a neighbour) and its bytes."""

    origin: PeerId
    data: bytes


@dataclass(frozen=True)
class PeerChange:
    """A neighbour appeared (``connected``) or went away."""

    peer: PeerId
    connected: bool


class Network(Protocol):
    """One node's access to its peers."""

    @property
    def peer_id(self) -> PeerId:
        """This node."""
        ...

    def addresses(self) -> tuple[str, ...]:
        """Where this node can be dialled: multiaddrs that end in ``/p2p/PEER_ID``."""
        ...

    def neighbours(self) -> frozenset[PeerId]:
        """The peers with an open connection."""
        ...

    async def connect(self, address: str) -> PeerId:
        """Dial a multiaddr that ends in ``/p2p/PEER_ID``, or do nothing where connected.

        Raises Unreachable, within ten seconds; ConfigError for a malformed address.
        """
        ...

    async def disconnect(self, peer: PeerId) -> None:
        """Close the connection to a peer, if there is one."""
        ...

    async def open_stream(self, peer: PeerId, protocol: str) -> Stream:
        """Open a stream to a neighbour. Raises Unreachable where not connected or the protocol is not served."""
        ...

    def set_handler(self, protocol: str, handler: Handler) -> None:
        """Serve a protocol: each incoming stream runs the handler in a task of its own, inside the guard."""
        ...

    async def publish(self, topic: str, data: bytes) -> None:
        """Gossip at most MAX_GOSSIP bytes to all subscribers of a topic. Raises ValueError above that."""
        ...

    def subscribe(
        self, topic: str, validator: Validator, *, capacity: int
    ) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[Gossip]]:
        """Subscribe to a topic (once per topic). Own messages are not delivered.

        Up to ``capacity`` messages wait; when full the newest is dropped and counted: gossip is a hint, what matters
        is fetched.
        """
        ...

    def watch_peers(self) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[PeerChange]]:
        """Deliver changes of the neighbourhood from now on, current neighbours first."""
        ...

    def penalise(self, peer: PeerId, points: int, reason: str) -> None:
        """Count a fault of a peer; at 100 points, which decay, it is disconnected and refused for a while."""
        ...

    def block(self, peers: frozenset[PeerId]) -> None:
        """Refuse connections with exactly these peers from now on, both ways, and end those there are.

        A later call replaces the set, so an empty one lifts it; who is no longer in it can connect at once.
        """
        ...


MAX_GOSSIP = 256 * 1024
"""Largest gossiped message, in bytes: announce small things, fetch large ones."""
