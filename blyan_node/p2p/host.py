"""The network over libp2p: TCP, Noise, Yamux and GossipSub.

This and its neighbours :mod:`wire`, :mod:`gossip` and :mod:`corrections` are all that knows of libp2p.
"""

from __future__ import annotations

import functools
import ipaddress
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace

import trio
from libp2p.abc import INetConn, INetStream, INetwork, INotifee
from libp2p.crypto.secp256k1 import create_new_key_pair
from libp2p.custom_types import TProtocol
from libp2p.exceptions import BaseLibp2pError
from libp2p.network.stream.net_stream import NetStream
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStore
from libp2p.stream_muxer.exceptions import MuxedStreamEOF, MuxedStreamError
from libp2p.tools.anyio_service import background_trio_service
from libp2p.transport.tcp.tcp import TCP
from multiaddr import Multiaddr

from blyan_node.errors import ChannelClosed, ConfigError, Unreachable
from blyan_node.p2p import corrections, gossip, wire
from blyan_node.p2p.address import Address, parse_address, parse_dialable
from blyan_node.p2p.guard import Scores, briefly, run_guarded
from blyan_node.p2p.identity import peer_id_of
from blyan_node.p2p.local import Subscriptions, Watchers, background
from blyan_node.p2p.transport import (
    MAX_GOSSIP,
    Gossip,
    Handler,
    Network,
    PeerChange,
    PeerId,
    Stream,
    Validator,
)
from blyan_node.p2p.yamux_stream import YamuxStream

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 10
STREAMS_OF_A_PEER = 256
"""Incoming streams that one peer may have open; beyond that they are reset and the peer is penalised."""


@asynccontextmanager
async def open_host(secret: bytes, *, listen: str, announce: tuple[str, ...] = ()) -> AsyncIterator[Network]:
    """Open this node's access to its peers; all its connections end with the context.

    ``secret`` is the 32-byte secp256k1 private key of the node; ``listen`` a multiaddr like
    ``/ip4/127.0.0.1/tcp/0``; ``announce`` multiaddrs to tell others instead of those listened on. Raises
    AlreadyRunning if the port is taken, ConfigError for an address that cannot be used.
    """
    address = _listen_address(listen)
    public = peer_id_of(create_new_key_pair(secret).public_key.to_bytes())
    announced = tuple(_announced(text, public) for text in announce)
    stop = trio.Event()
    async with background() as nursery:
        try:
            yield await nursery.start(_run_host, secret, address, announced, stop)
        finally:
            stop.set()


async def _run_host(
    secret: bytes,
    listen: Multiaddr,
    announced: tuple[str, ...],
    stop: trio.Event,
    *,
    task_status: trio.TaskStatus[Network] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Run a host until told to stop.

    It is shielded from cancellation: a cancelled swarm leaves its connections half closed and their sockets open.
    """
    corrections.apply()
    gossip.apply()
    key = create_new_key_pair(secret)
    me, peerstore = ID.from_pubkey(key.public_key), PeerStore()
    peerstore.add_key_pair(me, key)
    swarm = Swarm(
        me,
        peerstore,
        wire.upgrader(key, lambda peer, points, reason: network.penalise(peer, points, reason)),
        [TCP()],
        retry_config=corrections.retry_config(),
        connection_config=corrections.connection_config(),
    )
    swarm.auto_connector = corrections.NoAutoConnector(swarm)
    host = corrections.QuietHost(swarm, disable_identify_address_discovery=True)
    router = gossip.SturdyGossipSub()
    with trio.CancelScope(shield=True):
        async with trio.open_nursery() as nursery:
            network = Libp2pNetwork(host, swarm, nursery, announced)
            pubsub = gossip.SturdyPubsub(host, router, network.deliver, network.penalise)
            network.attach(pubsub)
            async with host.run([]), background_trio_service(pubsub), background_trio_service(router):
                try:
                    await pubsub.wait_until_ready()
                    if not await swarm.listen(listen):
                        raise ConfigError(f"cannot listen on {listen}")
                    task_status.started(network)
                    await stop.wait()
                finally:
                    # H2: leaving host.run() before this leaks tasks, and the listener goes on accepting
                    with briefly(CONNECT_SECONDS):
                        await host.close()
            nursery.cancel_scope.cancel()


class Libp2pStream:
    """A stream of our muxer. A cancelled send resets it: what was cut off is unknown."""

    def __init__(self, raw: INetStream) -> None:
        if not isinstance(raw, NetStream) or not isinstance(raw.muxed_stream, YamuxStream):
            raise TypeError(f"{type(raw).__name__} is not a stream of py-libp2p's swarm over our muxer")
        # bytes pass the library by: each of its calls takes two locks; closing it must know of
        self._raw, self._stream = raw, raw.muxed_stream
        self._peer = PeerId(str(raw.muxed_conn.peer_id))
        self._closed = False

    @property
    def peer(self) -> PeerId:
        """The authenticated remote peer."""
        return self._peer

    async def send_all(self, data: bytes | memoryview) -> None:
        """Send all of it; see :class:`blyan_node.p2p.transport.Stream`."""
        try:
            await self._stream.write(bytes(data))
        except MuxedStreamError as error:
            raise self._ended(error) from error

    async def receive_some(self, most: int) -> bytes:
        """Receive between 1 and ``most`` bytes; b"" at the end of the peer's data."""
        try:
            return await self._stream.read(most)
        except MuxedStreamEOF:
            return b""
        except MuxedStreamError as error:
            raise self._ended(error) from error

    async def close_write(self) -> None:
        """Say that no more will be sent; reading goes on."""
        await self._stream.close_write()

    async def aclose(self) -> None:
        """Close both ways, politely; never raises."""
        if not self._closed:
            self._closed = True
            await self._raw.close()

    async def reset(self) -> None:
        """Abandon the stream at once, both ways; never raises."""
        self._closed = True
        await self._raw.reset()

    def _ended(self, error: Exception) -> ChannelClosed:
        return ChannelClosed(f"the stream with {self._peer} ended: {error}")


class Libp2pNetwork(INotifee):
    """:class:`blyan_node.p2p.transport.Network` on a running host."""

    def __init__(
        self, host: corrections.QuietHost, swarm: Swarm, nursery: trio.Nursery, announced: tuple[str, ...]
    ) -> None:
        self._host = host
        self._swarm = swarm
        self._nursery = nursery
        self._announced = announced
        self._pubsub: gossip.SturdyPubsub | None = None
        self._peer_id = PeerId(str(host.get_id()))
        self._scores = Scores()
        self._subscriptions = Subscriptions()
        self._watchers = Watchers()
        self._told: set[PeerId] = set()
        self._streams: dict[PeerId, int] = {}
        # H1: an exception that leaves a stream handler, the library's own included, ends the host
        swarm.set_stream_handler(self._guarded_streams)
        swarm.register_notifee(self)

    def attach(self, pubsub: gossip.SturdyPubsub) -> None:
        """Complete the network with its gossip, which needs :meth:`deliver` and :meth:`penalise` first."""
        self._pubsub = pubsub

    @property
    def peer_id(self) -> PeerId:
        """This node."""
        return self._peer_id

    def addresses(self) -> tuple[str, ...]:
        """Where this node can be dialled."""
        if self._announced:
            return self._announced
        listened = (parse_address(str(address)) for address in self._host.get_transport_addrs())
        return tuple(str(replace(address, host=_reachable(address), peer=self._peer_id)) for address in listened)

    def neighbours(self) -> frozenset[PeerId]:
        """The peers with an open connection."""
        return frozenset(
            PeerId(str(peer))
            for peer, connections in self._swarm.connections.items()
            if any(not connection.is_closed for connection in connections)
        )

    async def connect(self, address: str) -> PeerId:
        """Dial a multiaddr that ends in ``/p2p/PEER_ID``; see :class:`blyan_node.p2p.transport.Network`."""
        target, peer = parse_dialable(address)
        if peer == self._peer_id:
            raise Unreachable(f"{address} is this node itself")
        self._scores.check(peer)
        if peer in self.neighbours():
            return peer
        identity = ID.from_string(peer)
        corrections.forget_failed_dials(self._swarm, identity)
        try:
            # H7, H9: this very address, not the first that the library knows; a silent server must not hold us
            with trio.fail_after(CONNECT_SECONDS):
                await self._swarm.dial_addr(Multiaddr(str(target)), identity)
        except trio.TooSlowError as error:
            raise Unreachable(f"{address} did not answer within {CONNECT_SECONDS} s") from error
        except (BaseLibp2pError, OSError) as error:
            raise Unreachable(f"cannot connect to {address}: {_root(error)}") from error
        return peer

    async def disconnect(self, peer: PeerId) -> None:
        """Close the connection to a peer, if there is one."""
        await self._swarm.close_peer(ID.from_string(peer))

    async def open_stream(self, peer: PeerId, protocol: str) -> Stream:
        """Open a stream to a neighbour; see :class:`blyan_node.p2p.transport.Network`."""
        if peer not in self.neighbours():
            raise Unreachable(f"not connected to {peer}")
        try:
            with trio.fail_after(CONNECT_SECONDS):
                raw = await self._host.new_stream(ID.from_string(peer), [TProtocol(protocol)])
        except trio.TooSlowError as error:
            raise Unreachable(f"{peer} opened no stream within {CONNECT_SECONDS} s") from error
        except BaseLibp2pError as error:
            raise Unreachable(f"{peer} opened no stream for {protocol}: {_root(error)}") from error
        return Libp2pStream(raw)

    def set_handler(self, protocol: str, handler: Handler) -> None:
        """Serve a protocol; see :class:`blyan_node.p2p.transport.Network`."""

        async def serve(raw: INetStream) -> None:
            await handler(Libp2pStream(raw))

        self._host.set_stream_handler(TProtocol(protocol), serve)

    async def publish(self, topic: str, data: bytes) -> None:
        """Gossip to all subscribers of a topic; see :class:`blyan_node.p2p.transport.Network`."""
        if len(data) > MAX_GOSSIP:
            raise ValueError(f"{len(data)} bytes of gossip; at most {MAX_GOSSIP} are carried")
        await self._gossip().publish(topic, data)

    def subscribe(
        self, topic: str, validator: Validator, *, capacity: int
    ) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[Gossip]]:
        """Subscribe to a topic; see :class:`blyan_node.p2p.transport.Network`."""
        return self._subscribed(topic, validator, capacity)

    @asynccontextmanager
    async def _subscribed(
        self, topic: str, validator: Validator, capacity: int
    ) -> AsyncIterator[trio.MemoryReceiveChannel[Gossip]]:
        async with self._subscriptions.open(topic, validator, capacity) as queue:
            await self._gossip().subscribe(topic)
            try:
                yield queue
            finally:
                with briefly(1):
                    await self._gossip().unsubscribe(topic)

    def watch_peers(self) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[PeerChange]]:
        """Deliver changes of the neighbourhood; see :class:`blyan_node.p2p.transport.Network`."""
        return self._watchers.open(sorted(self._told))

    def penalise(self, peer: PeerId, points: int, reason: str) -> None:
        """Count a fault of a peer; see :class:`blyan_node.p2p.transport.Network`."""
        logger.info("%d points against %s: %s", points, peer, reason)
        if self._scores.add(peer, points):
            logger.warning("%s reached the limit of faults (%s): disconnected, and refused for a while", peer, reason)
            self._nursery.start_soon(self.disconnect, peer)

    def block(self, peers: frozenset[PeerId]) -> None:
        """Refuse exactly these peers; see :class:`blyan_node.p2p.transport.Network`."""
        self._scores.blocked = peers
        for peer in sorted(peers & self.neighbours()):
            self._nursery.start_soon(self.disconnect, peer)

    def deliver(self, topic: str, origin: PeerId, data: bytes) -> bool:
        """Take a gossiped message; False if the topic's validator finds it wrong."""
        return self._subscriptions.offer(topic, origin, data)

    def _gossip(self) -> gossip.SturdyPubsub:
        if self._pubsub is None:
            raise RuntimeError("attach() comes first")
        return self._pubsub

    async def _guarded_streams(self, raw: INetStream) -> None:
        """Negotiate and serve one incoming stream, whatever comes of it."""
        peer = PeerId(str(raw.muxed_conn.peer_id))
        open_now = self._streams.get(peer, 0)
        if open_now >= STREAMS_OF_A_PEER:
            self.penalise(peer, 1, f"more than {STREAMS_OF_A_PEER} streams at once")
            await raw.reset()
            return
        self._streams[peer] = open_now + 1
        try:
            serve = functools.partial(self._serve_stream, raw)
            await run_guarded(serve, Libp2pStream(raw), "a stream", self.penalise)
        finally:
            self._streams[peer] -= 1
            if not self._streams[peer]:
                del self._streams[peer]

    async def _serve_stream(self, raw: INetStream, _stream: Stream) -> None:
        """Let the library find the protocol and its handler; what the handler raises comes through."""
        try:
            await self._host._swarm_stream_handler(raw)
        except BaseLibp2pError as error:  # failed negotiations, streams that end early: everyday life
            raise ChannelClosed(str(error) or type(error).__name__) from error

    def _reconcile(self, connection: INetConn) -> PeerId:
        """Tell the watchers if a peer came or went with this connection."""
        peer = PeerId(str(connection.muxed_conn.peer_id))
        connected = peer in self.neighbours()
        if connected and peer not in self._told:
            self._told.add(peer)
            self._watchers.tell(PeerChange(peer, True))
        elif not connected and peer in self._told:
            self._told.remove(peer)
            self._watchers.tell(PeerChange(peer, False))
        return peer

    async def connected(self, network: INetwork, conn: INetConn) -> None:  # noqa: ARG002
        """A connection was made (libp2p's notification)."""
        await trio.lowlevel.checkpoint()
        if self._scores.refused(PeerId(str(conn.muxed_conn.peer_id))):
            self._nursery.start_soon(conn.close)
            return
        self._reconcile(conn)

    async def disconnected(self, network: INetwork, conn: INetConn) -> None:  # noqa: ARG002
        """A connection ended (libp2p's notification)."""
        await trio.lowlevel.checkpoint()
        self._reconcile(conn)

    async def opened_stream(self, network: INetwork, stream: INetStream) -> None:
        """Not of interest here."""

    async def closed_stream(self, network: INetwork, stream: INetStream) -> None:
        """Not of interest here."""

    async def listen(self, network: INetwork, multiaddr: Multiaddr) -> None:
        """Not of interest here."""

    async def listen_close(self, network: INetwork, multiaddr: Multiaddr) -> None:
        """Not of interest here."""


def _root(error: BaseException) -> str:
    """What the innermost cause of an error says."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error) or type(error).__name__


def _listen_address(listen: str) -> Multiaddr:
    """Check a listen address, and that its port is free."""
    address = parse_address(listen)
    if address.kind not in ("ip4", "ip6") or address.peer is not None:
        raise ConfigError(f"listen on an address like /ip4/0.0.0.0/tcp/4001, not {listen!r}")
    if address.port:
        corrections.check_port(address.host, address.port)
    return Multiaddr(str(address))


def _reachable(address: Address) -> str:
    """Where others reach what listens on an address: for "all interfaces", the one of the default route.

    Connecting a UDP socket (to an address of RFC 5737 or RFC 3849) sends nothing; it only chooses the interface.
    """
    if not ipaddress.ip_address(address.host).is_unspecified:
        return address.host
    family, anywhere = (socket.AF_INET, "192.0.2.1") if address.kind == "ip4" else (socket.AF_INET6, "2001:db8::1")
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((anywhere, 9))
        except OSError:
            return "127.0.0.1" if address.kind == "ip4" else "::1"
        host: str = probe.getsockname()[0]
        return host


def _announced(text: str, me: PeerId) -> str:
    """Complete an announced address with our peer id."""
    address = parse_address(text)
    if address.peer not in (None, me):
        raise ConfigError(f"the announced address {text!r} is another peer's")
    return str(replace(address, peer=me))
