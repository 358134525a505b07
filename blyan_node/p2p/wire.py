"""What lies between TCP and a stream: the one place where security and muxer are chosen.

TCP, Noise (XX, secp256k1 identities) and Yamux 1.0.0; nothing else is offered. Handshake and negotiation are the
library's; what carries the bytes afterwards is ours (:mod:`blyan_node.p2p.noise`, :mod:`blyan_node.p2p.yamux`).
"""

from __future__ import annotations

from libp2p.abc import IMuxedConn, ISecureConn
from libp2p.crypto.keys import KeyPair
from libp2p.crypto.x25519 import create_new_key_pair as new_noise_key
from libp2p.custom_types import TProtocol
from libp2p.peer.id import ID
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.stream_muxer.muxer_multistream import MuxerMultistream
from libp2p.transport.upgrader import TransportUpgrader

from blyan_node.p2p.guard import Penalise
from blyan_node.p2p.noise import NoiseTransport
from blyan_node.p2p.yamux import Yamux
from blyan_node.p2p.yamux_frames import PROTOCOL

YAMUX = TProtocol(PROTOCOL)
NEGOTIATE_SECONDS = 10


def upgrader(key: KeyPair, penalise: Penalise) -> TransportUpgrader:
    """Return what turns a TCP connection into an authenticated, multiplexed one.

    The Noise static key lives as long as the process. Peers that break the muxer's protocol are penalised.
    """
    made = TransportUpgrader({NOISE: NoiseTransport(key, noise_privkey=new_noise_key().private_key)}, {})
    # ``muxer_opt`` of the library is ignored for Yamux: MuxerMultistream.new_conn builds the stock class by name
    made.muxer_multistream = _OurMuxer(penalise)
    return made


class _OurMuxer(MuxerMultistream):
    def __init__(self, penalise: Penalise) -> None:
        super().__init__({YAMUX: Yamux}, NEGOTIATE_SECONDS)
        self._penalise = penalise

    async def new_conn(self, conn: ISecureConn, peer_id: ID) -> IMuxedConn:
        protocol, _ = await self._selector.select(conn, conn.is_initiator, self.negotiate_timeout)
        return self._annotate_connection(Yamux(conn, peer_id, penalise=self._penalise), conn, protocol)
