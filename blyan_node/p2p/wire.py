"""What lies between TCP and a stream: the one place where security and muxer are chosen.

TCP, Noise (XX, secp256k1 identities) and Yamux 1.0.0; nothing else is offered. An own Noise I/O or an own Yamux
replaces what :func:`secure_transports` and :func:`_mux` return, and nothing else changes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import trio
from libp2p.abc import IMuxedConn, ISecureConn, ISecureTransport
from libp2p.crypto.keys import KeyPair
from libp2p.crypto.x25519 import create_new_key_pair as new_noise_key
from libp2p.custom_types import TProtocol
from libp2p.peer.id import ID
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.stream_muxer.muxer_multistream import MuxerMultistream
from libp2p.stream_muxer.yamux import yamux
from libp2p.transport.upgrader import TransportUpgrader

from blyan_node.p2p.guard import briefly

logger = logging.getLogger(__name__)

YAMUX = TProtocol(yamux.PROTOCOL_ID)
NEGOTIATE_SECONDS = 10


def secure_transports(key: KeyPair) -> Mapping[TProtocol, ISecureTransport]:
    """The security protocols offered: Noise only. The Noise static key lives as long as the process."""
    return {NOISE: NoiseTransport(key, noise_privkey=new_noise_key().private_key)}


def _mux(connection: ISecureConn, peer: ID) -> IMuxedConn:
    """The multiplexer of a connection on which Yamux was agreed."""
    return SteadyYamux(connection, peer, is_initiator=connection.is_initiator)


def upgrader(key: KeyPair) -> TransportUpgrader:
    """Return what turns a TCP connection into an authenticated, multiplexed one."""
    made = TransportUpgrader(secure_transports(key), {}, NEGOTIATE_SECONDS)
    # ``muxer_opt`` of the library is ignored for Yamux: MuxerMultistream.new_conn builds the stock class by name
    made.muxer_multistream = _OurMuxer({YAMUX: SteadyYamux}, NEGOTIATE_SECONDS)
    return made


class _OurMuxer(MuxerMultistream):
    async def new_conn(self, conn: ISecureConn, peer_id: ID) -> IMuxedConn:
        protocol, _ = await self._selector.select(conn, conn.is_initiator, self.negotiate_timeout)
        return self._annotate_connection(_mux(conn, peer_id), conn, protocol)


class SteadyYamux(yamux.Yamux):
    """The stock Yamux, unable to break its own connection or the host."""

    async def _write_frame(self, data: bytes) -> None:
        """Write a frame whole: a write cut by cancellation leaves Noise's nonces out of step for good."""
        async with self._write_lock:
            with trio.CancelScope(shield=True):
                await self.secured_conn.write(data)

    async def start(self) -> None:
        """Run the connection; what a peer's malformed frames raise in it ends the connection, not the host."""
        try:
            await super().start()
        except* trio.Cancelled:
            raise
        except* Exception as group:  # noqa: BLE001 whatever the library stumbles over in a peer's frames
            logger.info("connection with %s ends: %s", self.peer_id, group.exceptions[0])
            with briefly(1):
                await self.close()


def lost(connection: IMuxedConn) -> bool:
    """Whether a connection is gone: the stock streams then report an end of data that nobody sent."""
    return connection.is_closed or (isinstance(connection, yamux.Yamux) and connection.event_shutting_down.is_set())
