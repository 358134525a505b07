"""The network in one process, for tests under the virtual clock: latency, partitions, stalls and deaths at will.

It behaves as the libp2p host does, down to windows and scores; only the wire is missing. Gossip floods from
neighbour to neighbour among the subscribers, each message once.
"""

from __future__ import annotations

import logging
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import coincurve
import trio

from blyan_node.errors import AlreadyRunning, ChannelClosed, Unreachable
from blyan_node.p2p.address import Address, parse_address, parse_dialable
from blyan_node.p2p.guard import VIOLATION, Scores, run_guarded
from blyan_node.p2p.identity import peer_id_of
from blyan_node.p2p.local import Subscriptions, Watchers, background
from blyan_node.p2p.transport import MAX_GOSSIP, Gossip, Handler, Network, PeerChange, PeerId, Stream, Validator

logger = logging.getLogger(__name__)

WINDOW = 256 * 1024
CONNECT_SECONDS = 10
STREAMS_OF_A_PEER = 256
MESSAGES_REMEMBERED = 4096


class MemoryHub:
    """The ether between the networks of one test.

    ``latency`` is the seconds that anything takes one way; it may be changed at any time.
    """

    def __init__(self, *, latency: float = 0.0) -> None:
        self.latency = latency
        self._nodes: dict[tuple[str, int], MemoryNetwork] = {}
        self._side: dict[PeerId, int] = {}
        self._stalled: set[PeerId] = set()
        self.changed = trio.lowlevel.ParkingLot()
        self._next_port = 10_000

    @asynccontextmanager
    async def open(self, secret: bytes, *, listen: str = "/ip4/127.0.0.1/tcp/0") -> AsyncIterator[Network]:
        """Open a network, as :func:`blyan_node.p2p.host.open_host` does."""
        peer = peer_id_of(coincurve.PublicKey.from_secret(secret).format())
        where = parse_address(listen)
        if where.port == 0:
            self._next_port += 1
            where = Address(where.kind, where.host, self._next_port)
        key = (where.host, where.port)
        if key in self._nodes:
            raise AlreadyRunning(f"port {where.port} on {where.host} is in use")
        async with background() as nursery:
            node = MemoryNetwork(self, peer, where, nursery)
            self._nodes[key] = node
            try:
                yield node
            finally:
                if self._nodes.get(key) is node:
                    self.kill(peer)

    def partition(self, *groups: Iterable[PeerId]) -> None:
        """Cut every connection between groups, and let none be made; who is in no group is in one of the rest."""
        self._side = {peer: side for side, group in enumerate(groups, 1) for peer in group}
        for node in list(self._nodes.values()):
            for other in list(node.links.values()):
                if not self.reaches(node.peer_id, other.peer_id):
                    node.unlink(other)

    def heal(self) -> None:
        """End the partition. Nobody redials by itself."""
        self._side = {}

    def kill(self, peer: PeerId) -> None:
        """Take a node off the net at once, as a power cut does; its network object is dead."""
        for key, node in list(self._nodes.items()):
            if node.peer_id == peer:
                del self._nodes[key]
                for other in list(node.links.values()):
                    node.unlink(other)

    def stall(self, peer: PeerId) -> None:
        """Deliver nothing to or from a peer, whose connections stay: a stopped process, a black hole."""
        self._stalled.add(peer)

    def resume(self, peer: PeerId) -> None:
        """Deliver again, beginning with what was held up."""
        self._stalled.discard(peer)
        self.changed.unpark_all()

    def reaches(self, one: PeerId, other: PeerId) -> bool:
        """Whether two peers are on the same side."""
        return self._side.get(one, 0) == self._side.get(other, 0)

    def find(self, address: Address) -> MemoryNetwork | None:
        """The node that listens at an address."""
        return self._nodes.get((address.host, address.port))

    async def travel(self, one: PeerId, other: PeerId) -> None:
        """Take the time that something takes from peer to peer: for ever, while one of them is stalled."""
        await trio.sleep(self.latency)
        while self.is_stalled(one, other):
            await self.changed.park()

    def is_stalled(self, one: PeerId, other: PeerId) -> bool:
        """Whether nothing goes from peer to peer now; ``changed`` wakes those who wait for that."""
        return bool({one, other} & self._stalled)


class _Pipe:
    """One direction of a stream: bytes under way, at most WINDOW of them; a writer waits while there are more."""

    def __init__(self, hub: MemoryHub, source: PeerId, target: PeerId) -> None:
        self._hub, self._source, self._target = hub, source, target
        self._chunks: deque[tuple[float, bytes]] = deque()
        self._size = 0
        self._ended = False
        self._broken = ""
        self._changed = trio.lowlevel.ParkingLot()

    async def send(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        for start in range(0, len(data), WINDOW):
            piece = data[start : start + WINDOW]
            while not self._broken and not self._ended and self._size and self._size + len(piece) > WINDOW:
                await self._changed.park()
            self._check()
            if self._ended:
                raise ChannelClosed("the stream was closed for sending")
            self._chunks.append((trio.current_time() + self._hub.latency, piece))
            self._size += len(piece)
            self._changed.unpark_all()

    async def receive(self, most: int) -> bytes:
        await trio.lowlevel.checkpoint()
        while True:
            self._check()
            if self._chunks:
                due, chunk = self._chunks[0]
                if due > trio.current_time():
                    with trio.CancelScope(deadline=due):
                        await self._changed.park()
                    continue
                if self._hub.is_stalled(self._source, self._target):
                    await self._hub.changed.park()
                    continue
                self._chunks.popleft()
                if len(chunk) > most:
                    self._chunks.appendleft((due, chunk[most:]))
                self._size -= min(len(chunk), most)
                self._changed.unpark_all()
                return chunk[:most]
            if self._ended:
                return b""
            await self._changed.park()

    def end(self) -> None:
        self._ended = True
        self._changed.unpark_all()

    def break_(self, why: str) -> None:
        if not self._broken:
            self._broken = why
            self._changed.unpark_all()
            self._hub.changed.unpark_all()

    def _check(self) -> None:
        if self._broken:
            raise ChannelClosed(self._broken)


class MemoryStream:
    """One end of a stream; see :class:`blyan_node.p2p.transport.Stream`."""

    def __init__(self, peer: PeerId, incoming: _Pipe, outgoing: _Pipe, ends: set[MemoryStream]) -> None:
        """``ends`` are the open streams of the connection at this end, which this one joins and leaves."""
        self._peer, self._incoming, self._outgoing, self._ends = peer, incoming, outgoing, ends
        ends.add(self)

    @property
    def peer(self) -> PeerId:
        """The remote peer."""
        return self._peer

    async def send_all(self, data: bytes | memoryview) -> None:
        """Send all of it."""
        await self._outgoing.send(bytes(data))

    async def receive_some(self, most: int) -> bytes:
        """Receive between 1 and ``most`` bytes; b"" at the end of the peer's data."""
        return await self._incoming.receive(most)

    async def close_write(self) -> None:
        """Say that no more will be sent; reading goes on."""
        await trio.lowlevel.checkpoint()
        self._outgoing.end()

    async def aclose(self) -> None:
        """Close both ways, politely."""
        await trio.lowlevel.checkpoint()
        self._outgoing.end()
        self._incoming.break_("the stream was closed")
        self._ends.discard(self)

    async def reset(self) -> None:
        """Abandon the stream at once, both ways."""
        await trio.lowlevel.checkpoint()
        self.break_("the stream was reset")

    def break_(self, why: str) -> None:
        """End both directions without ceremony."""
        self._outgoing.break_(why)
        self._incoming.break_(why)
        self._ends.discard(self)


class MemoryNetwork:
    """:class:`blyan_node.p2p.transport.Network` on a :class:`MemoryHub`."""

    def __init__(self, hub: MemoryHub, peer_id: PeerId, where: Address, nursery: trio.Nursery) -> None:
        self._hub, self._peer_id, self._where, self._nursery = hub, peer_id, where, nursery
        self._handlers: dict[str, Handler] = {}
        self._scores = Scores()
        self._subscriptions = Subscriptions()
        self._watchers = Watchers()
        self._streams: dict[PeerId, set[MemoryStream]] = {}
        self._seen: OrderedDict[tuple[PeerId, int], None] = OrderedDict()
        self._published = 0
        self.links: dict[PeerId, MemoryNetwork] = {}

    @property
    def peer_id(self) -> PeerId:
        """This node."""
        return self._peer_id

    def addresses(self) -> tuple[str, ...]:
        """Where this node can be dialled."""
        return (f"{self._where}/p2p/{self._peer_id}",)

    def neighbours(self) -> frozenset[PeerId]:
        """The peers with an open connection."""
        return frozenset(self.links)

    async def connect(self, address: str) -> PeerId:
        """Dial a node of the hub."""
        where, peer = parse_dialable(address)
        if peer == self._peer_id:
            raise Unreachable(f"{address} is this node itself")
        self._scores.check(peer)
        if peer in self.links:
            return peer
        with trio.move_on_after(CONNECT_SECONDS):
            await self._hub.travel(self._peer_id, peer)
            await self._hub.travel(self._peer_id, peer)
            other = self._hub.find(where)
            if other is None or other.peer_id != peer or not self._hub.reaches(self._peer_id, peer):
                raise Unreachable(f"cannot connect to {address}: nobody, or another peer, is there")
            self._scores.check(peer)  # again: it may have been blocked meanwhile
            if other.refuses(self._peer_id) or self._hub.find(self._where) is not self:
                raise Unreachable(f"cannot connect to {address}: refused")
            if peer not in self.links:
                self.link(other)
            return peer
        raise Unreachable(f"{address} did not answer within {CONNECT_SECONDS} s")

    async def disconnect(self, peer: PeerId) -> None:
        """Close the connection to a peer, if there is one."""
        await trio.lowlevel.checkpoint()
        if peer in self.links:
            self.unlink(self.links[peer])

    async def open_stream(self, peer: PeerId, protocol: str) -> Stream:
        """Open a stream to a neighbour."""
        with trio.move_on_after(CONNECT_SECONDS):
            await self._hub.travel(self._peer_id, peer)
            other = self.links.get(peer)
            if other is None:
                raise Unreachable(f"not connected to {peer}")
            there, back = _Pipe(self._hub, self._peer_id, peer), _Pipe(self._hub, peer, self._peer_id)
            if not other.accept(protocol, self._peer_id, there, back):
                raise Unreachable(f"{peer} opened no stream for {protocol}: not served")
            return MemoryStream(peer, back, there, self._streams[peer])
        raise Unreachable(f"{peer} opened no stream within {CONNECT_SECONDS} s")

    def set_handler(self, protocol: str, handler: Handler) -> None:
        """Serve a protocol."""
        self._handlers[protocol] = handler

    async def publish(self, topic: str, data: bytes) -> None:
        """Gossip to all subscribers of a topic."""
        if len(data) > MAX_GOSSIP:
            raise ValueError(f"{len(data)} bytes of gossip; at most {MAX_GOSSIP} are carried")
        await trio.lowlevel.checkpoint()
        self._published += 1
        self._is_new((self._peer_id, self._published))
        self._flood(topic, Gossip(self._peer_id, data), self._published, None)

    def subscribe(
        self, topic: str, validator: Validator, *, capacity: int
    ) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[Gossip]]:
        """Subscribe to a topic."""
        return self._subscriptions.open(topic, validator, capacity)

    def watch_peers(self) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[PeerChange]]:
        """Deliver changes of the neighbourhood."""
        return self._watchers.open(sorted(self.links))

    def penalise(self, peer: PeerId, points: int, reason: str) -> None:
        """Count a fault of a peer."""
        logger.info("%d points against %s: %s", points, peer, reason)
        if self._scores.add(peer, points):
            logger.warning("%s reached the limit of faults (%s): disconnected, and refused for a while", peer, reason)
            self._nursery.start_soon(self.disconnect, peer)

    def block(self, peers: frozenset[PeerId]) -> None:
        """Refuse exactly these peers; see :class:`blyan_node.p2p.transport.Network`."""
        self._scores.blocked = peers
        for peer in sorted(peers & self.neighbours()):
            self._nursery.start_soon(self.disconnect, peer)

    def refuses(self, peer: PeerId) -> bool:
        """Whether connections with a peer are refused now."""
        return self._scores.refused(peer)

    def link(self, other: MemoryNetwork) -> None:
        """Connect two nodes."""
        for node, peer in ((self, other), (other, self)):
            node.links[peer.peer_id] = peer
            node._streams[peer.peer_id] = set()
            node._watchers.tell(PeerChange(peer.peer_id, True))

    def unlink(self, other: MemoryNetwork) -> None:
        """Cut two nodes off from each other; their streams break."""
        for node, peer in ((self, other), (other, self)):
            del node.links[peer.peer_id]
            for stream in list(node._streams.pop(peer.peer_id)):
                stream.break_(f"the connection with {stream.peer} is gone")
            node._watchers.tell(PeerChange(peer.peer_id, False))

    def accept(self, protocol: str, peer: PeerId, incoming: _Pipe, outgoing: _Pipe) -> bool:
        """Serve an incoming stream; False if the protocol is not served, or the peer has too many."""
        handler, streams = self._handlers.get(protocol), self._streams[peer]
        if handler is None or len(streams) >= 2 * STREAMS_OF_A_PEER:
            return False
        stream = MemoryStream(peer, incoming, outgoing, streams)
        self._nursery.start_soon(run_guarded, handler, stream, protocol, self.penalise)
        return True

    def _is_new(self, message: tuple[PeerId, int]) -> bool:
        if message in self._seen:
            return False
        self._seen[message] = None
        if len(self._seen) > MESSAGES_REMEMBERED:
            self._seen.popitem(last=False)
        return True

    def _flood(self, topic: str, message: Gossip, number: int, came_from: PeerId | None) -> None:
        for peer in self.links:
            if peer not in (came_from, message.origin):
                self._nursery.start_soon(self._pass_on, peer, topic, message, number)

    async def _pass_on(self, peer: PeerId, topic: str, message: Gossip, number: int) -> None:
        await self._hub.travel(self._peer_id, peer)
        other = self.links.get(peer)
        if other is not None:
            other.hear(self._peer_id, topic, message, number)

    def hear(self, forwarder: PeerId, topic: str, message: Gossip, number: int) -> None:
        """Take a gossiped message from a neighbour."""
        if topic not in self._subscriptions or not self._is_new((message.origin, number)):
            return
        if self._subscriptions.offer(topic, message.origin, message.data):
            self._flood(topic, message, number, forwarder)
        else:
            self.penalise(forwarder, VIOLATION, f"forwarded a message on {topic} that is wrong")
