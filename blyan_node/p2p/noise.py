"""Noise transport messages, read and written with little ado.

The handshake (XX, libp2p specs ``noise/README.md``) stays the library's; what follows it is ours: each message is two
bytes of length, big-endian, then up to 65,535 bytes of ChaCha20-Poly1305 (RFC 8439) under a counting nonce (Noise
Protocol Framework, revision 34, sections 5.1 and 12.3). The library reads every message in two small reads under a
lock; here the socket is read in large pieces, and what is written goes out at once.
"""

from __future__ import annotations

import struct
from typing import NoReturn

import trio
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from libp2p.abc import IRawConnection, ISecureConn
from libp2p.connection_types import ConnectionType
from libp2p.io.exceptions import ConnectionClosedError, DecryptionFailedException
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.security.base_session import BaseSession
from libp2p.security.noise.io import NoiseTransportReadWriter
from libp2p.security.noise.transport import Transport
from libp2p.security.secure_session import SecureSession
from multiaddr import Multiaddr

MOST_MESSAGE = 65535
TAG = 16
MOST_PLAINTEXT = MOST_MESSAGE - TAG
"""Most bytes in one message: 65,519."""

READ_BYTES = 256 * 1024
"""Bytes asked of the socket at once."""

_LENGTH = struct.Struct(">H")
_NONCE = struct.Struct("<4xQ")


class NoiseTransport(Transport):
    """The library's Noise over TCP, with connections of ours after the handshake."""

    async def secure_inbound(self, conn: IRawConnection) -> ISecureConn:
        """Shake hands with one who dialled us."""
        return _take_over(await super().secure_inbound(conn), conn)

    async def secure_outbound(self, conn: IRawConnection, peer_id: ID) -> ISecureConn:
        """Shake hands with the peer whom we dialled."""
        return _take_over(await super().secure_outbound(conn, peer_id), conn)


class CipherState:
    """One direction of a connection: a key and the number of messages so far (Noise, section 5.1)."""

    def __init__(self, key: bytes, count: int = 0) -> None:
        self._cipher, self._count = ChaCha20Poly1305(key), count

    def seal(self, plaintext: memoryview) -> bytes:
        """Encrypt the next message."""
        sealed = self._cipher.encrypt(_NONCE.pack(self._count), plaintext, None)
        self._count += 1
        return sealed

    def open(self, message: memoryview) -> bytes:
        """Decrypt the next message; raise InvalidTag where it was changed, repeated or left out."""
        plaintext = self._cipher.decrypt(_NONCE.pack(self._count), message, None)
        self._count += 1
        return plaintext


class NoiseConnection(BaseSession):
    """An authenticated, encrypted connection.

    One task at a time may read and one may write. A read that is cancelled has taken nothing. A write that is
    cancelled leaves a message half sent and the nonces out of step, so nothing more can be written; hence it is the
    muxer's flush task alone, which is cancelled only with its connection, that writes. (To shield the write instead
    would let a peer that does not read hold up the end of the host.)
    """

    def __init__(
        self,
        session: SecureSession,
        raw: IRawConnection,
        tcp: trio.SocketStream,
        sending: CipherState,
        receiving: CipherState,
    ) -> None:
        """``session`` names the two peers; ``raw`` owns ``tcp``, from which nothing but the handshake was read."""
        super().__init__(
            local_peer=session.local_peer,
            local_private_key=session.local_private_key,
            remote_peer=session.remote_peer,
            remote_permanent_pubkey=session.remote_permanent_pubkey,
            is_initiator=session.is_initiator,
        )
        self._raw, self._tcp = raw, tcp
        self._sending, self._receiving = sending, receiving
        self._writable = True
        # what came from the socket and was not yet decrypted lies between start and end
        self._arrived = memoryview(bytearray(READ_BYTES + _LENGTH.size + MOST_MESSAGE))
        self._start = self._end = 0
        self._plain: memoryview = memoryview(b"")

    async def read(self, n: int | None = None) -> bytes:
        """Return between 1 and ``n`` bytes; with None, all of a message.

        Raises ConnectionClosedError at the end, DecryptionFailedException for a message that is not the peer's next.
        """
        while not self._plain:
            self._plain = memoryview(await self._next_message())
        data, self._plain = self._plain[:n], self._plain[len(self._plain) if n is None else n :]
        return bytes(data)

    async def write(self, data: bytes) -> None:
        """Send all of it, in as few messages as it takes; raise ConnectionClosedError once that is impossible."""
        if not self._writable:
            raise ConnectionClosedError("a write was cut short, or is under way")
        self._writable = False
        view = memoryview(data)
        parts: list[bytes] = []
        for start in range(0, len(view), MOST_PLAINTEXT):
            sealed = self._sending.seal(view[start : start + MOST_PLAINTEXT])
            parts += (_LENGTH.pack(len(sealed)), sealed)
        try:
            await self._tcp.send_all(b"".join(parts))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise ConnectionClosedError(f"the connection is gone: {error}", transport="tcp") from error
        self._writable = True

    async def close(self) -> None:
        """Close the socket; who reads or writes is told."""
        await self._raw.close()

    def get_remote_address(self) -> tuple[str, int] | None:
        """The peer's host and port."""
        return self._raw.get_remote_address()

    def get_transport_addresses(self) -> list[Multiaddr]:
        """The addresses of the connection."""
        return self._raw.get_transport_addresses()

    def get_connection_type(self) -> ConnectionType:
        """Direct or relayed."""
        return self._raw.get_connection_type()

    async def _next_message(self) -> bytes:
        await self._gather(_LENGTH.size)
        (length,) = _LENGTH.unpack_from(self._arrived, self._start)
        await self._gather(_LENGTH.size + length)
        begin = self._start + _LENGTH.size
        try:
            plaintext = self._receiving.open(self._arrived[begin : begin + length])
        except InvalidTag as error:
            raise DecryptionFailedException("a message that is not the peer's next") from error
        self._start = begin + length
        return plaintext

    async def _gather(self, count: int) -> None:
        """Have ``count`` bytes between start and end, at most a whole message."""
        while self._end - self._start < count:
            if self._start:
                left = self._end - self._start
                self._arrived[:left] = self._arrived[self._start : self._end]
                self._start, self._end = 0, left
            try:
                got = await self._tcp.socket.recv_into(self._arrived[self._end :])
            except (OSError, trio.ClosedResourceError) as error:
                raise ConnectionClosedError(f"the connection is gone: {error}", transport="tcp") from error
            if not got:
                raise ConnectionClosedError("the peer closed the connection", transport="tcp")
            self._end += got


def _take_over(session: ISecureConn, raw: IRawConnection) -> NoiseConnection:
    """Go on from the library's handshake with the keys and the socket that it used."""
    if not isinstance(session, SecureSession) or not isinstance(session.conn, NoiseTransportReadWriter):
        _unexpected(session)
    if not isinstance(raw, RawConnection) or not isinstance(raw.stream, TrioTCPStream):
        _unexpected(raw)
    protocol = session.conn.noise_state.noise_protocol
    sending, receiving = protocol.cipher_state_encrypt, protocol.cipher_state_decrypt
    return NoiseConnection(
        session, raw, raw.stream.stream, CipherState(sending.k, sending.n), CipherState(receiving.k, receiving.n)
    )


def _unexpected(part: object) -> NoReturn:
    raise TypeError(f"{type(part).__name__} is not what py-libp2p 0.8.1 makes of Noise over TCP")
