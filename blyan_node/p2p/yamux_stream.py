"""One stream of a Yamux connection (see :mod:`blyan_node.p2p.yamux`)."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Self

import trio
from libp2p.abc import IMuxedStream
from libp2p.stream_muxer.exceptions import MuxedStreamClosed, MuxedStreamEOF, MuxedStreamReset

from blyan_node.errors import ProtocolViolation
from blyan_node.p2p.yamux_frames import HEADER_BYTES, INITIAL_WINDOW, MOST_WINDOW, Flag, Kind, encode

if TYPE_CHECKING:
    from blyan_node.p2p.yamux import Yamux

MOST_DATA = 65519 - HEADER_BYTES
"""Most data in a frame that we send: with its header it fills one Noise message."""

UNSENT = 64 * 1024
"""While a stream holds at most so much that is not yet on its way, who writes need not wait."""


class YamuxStream(IMuxedStream):
    """A stream: reliable, in order, each direction closed by itself.

    A read that is cancelled has taken nothing. A write that is cancelled resets the stream, for what was cut off is
    unknown; the connection goes on.
    """

    def __init__(self, connection: Yamux, number: int, window: int) -> None:
        """``window`` is what the peer may have on its way once we have begun to read, in bytes."""
        self.muxed_conn: Yamux = connection
        self.number = number
        self.allowance = INITIAL_WINDOW
        """Bytes that we may still send."""
        self.queued = False
        """Whether the connection is about to ask for what is unsent."""
        self._window = window
        self._granted = self._expected = INITIAL_WINDOW
        self._consumed = 0
        self._received = bytearray()
        self._unsent: deque[memoryview] = deque()
        self._unsent_bytes = 0
        self._broken = ""
        self._ending = self._ended = self._peer_ended = self._deaf = self._unwanted = False
        self._readers, self._writers = trio.lowlevel.ParkingLot(), trio.lowlevel.ParkingLot()

    # ---- for those who use the stream

    async def read(self, n: int | None = None) -> bytes:
        """Return what there is, up to ``n`` bytes, waiting for at least one.

        Raises MuxedStreamEOF at the end of the peer's data, MuxedStreamReset where the stream or the connection
        broke, MuxedStreamClosed after :meth:`close`.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self._received:
            if self._deaf and not self._broken:
                raise MuxedStreamClosed("the stream was closed here")
            if self._peer_ended:
                raise MuxedStreamEOF("the end of the peer's data")
            if self._broken:
                raise MuxedStreamReset(self._broken)
            await self._readers.park()
        if n is None or n < 0 or n >= len(self._received):
            data = bytes(self._received)
            self._received.clear()
        else:
            data = bytes(memoryview(self._received)[:n])
            del self._received[:n]
        self._credit(len(data))
        return data

    async def write(self, data: bytes) -> None:
        """Send all of it, waiting for the peer's window for as long as it takes.

        Writes of several tasks do not mix. Raises MuxedStreamReset where the stream or the connection broke,
        MuxedStreamClosed after :meth:`close_write`.
        """
        try:
            await trio.lowlevel.checkpoint_if_cancelled()
            await self._until_little_is_unsent()
            if self._ending:
                raise MuxedStreamClosed("the stream was closed for writing here")
            if data:
                self._unsent.append(memoryview(data))
                self._unsent_bytes += len(data)
                self.muxed_conn.ready(self)
                await self._until_little_is_unsent()
        except trio.Cancelled:
            self.abandon("a write was cancelled")
            raise

    async def close_write(self) -> None:
        """Say that no more will be sent, once all is; reading goes on."""
        self._end()
        await trio.lowlevel.checkpoint_if_cancelled()

    async def close(self) -> None:
        """Close both ways: what was written is still sent, what comes is not wanted."""
        self._deaf = True
        self._unwanted = bool(self._received)
        self._received.clear()
        self._end()
        self._refuse()
        self._readers.unpark_all()
        if not self.is_done and not self._broken:
            self.muxed_conn.linger(self)
        await trio.lowlevel.checkpoint_if_cancelled()

    async def reset(self) -> None:
        """Abandon the stream at once, both ways."""
        self.abandon("the stream was reset here")
        await trio.lowlevel.checkpoint_if_cancelled()

    def set_deadline(self, ttl: int) -> None:
        """Not supported: deadlines are trio's scopes."""
        raise NotImplementedError("use trio.fail_after")

    def get_remote_address(self) -> tuple[str, int] | None:
        """The peer's host and port."""
        return self.muxed_conn.get_remote_address()

    async def __aenter__(self) -> Self:
        return self

    # ---- for the connection

    @property
    def is_done(self) -> bool:
        """Whether both sides have said all."""
        return self._ended and self._peer_ended

    @property
    def is_broken(self) -> bool:
        """Whether the stream was reset, here or there, or lost."""
        return bool(self._broken)

    def take(self) -> list[bytes | memoryview]:
        """Return the next frame to send, in parts: at most MOST_DATA of what is unsent and allowed, or the end."""
        parts: list[bytes | memoryview] = []
        if self._broken:
            return parts
        size = min(self._unsent_bytes, self.allowance, MOST_DATA)
        if size:
            parts.append(encode(Kind.DATA, Flag.NONE, self.number, size))
            self.allowance -= size
            self._unsent_bytes -= size
            while size:
                piece = self._unsent.popleft()
                if len(piece) > size:
                    self._unsent.appendleft(piece[size:])
                    piece = piece[:size]
                size -= len(piece)
                parts.append(piece)
            if self._unsent_bytes <= UNSENT:
                self._writers.unpark_all()
        if self._ending and not self._ended and not self._unsent_bytes:
            # not as a flag of the data: js-libp2p would end the stream before it reads them
            parts.append(encode(Kind.WINDOW, Flag.FIN, self.number, 0))
            self._ended = True
            self._refuse()
        return parts

    @property
    def has_more(self) -> bool:
        """Whether :meth:`take` would return something."""
        if self._broken:
            return False
        return self.allowance > 0 if self._unsent_bytes else self._ending and not self._ended

    def expect(self, length: int) -> None:
        """Learn that so much data follows; raise ProtocolViolation where the peer may not send it."""
        if self._peer_ended:
            raise ProtocolViolation("data after the end of a stream")
        if length > self._expected:
            raise ProtocolViolation(f"{length} bytes of data where the window allows {self._expected}")
        self._expected -= length

    def deliver(self, data: memoryview) -> None:
        """Take data that :meth:`expect` announced."""
        if self._broken:
            return
        if self._deaf:
            self._unwanted = True
            self._refuse()
            return
        self._received += data
        self._readers.unpark_all()

    def allow(self, length: int) -> None:
        """Send so much more; raise ProtocolViolation for a window that cannot be."""
        if self.allowance + length > MOST_WINDOW:
            raise ProtocolViolation("a window of more than four gigabytes")
        self.allowance += length
        self.muxed_conn.ready(self)

    def end_received(self) -> None:
        """The peer has said all."""
        self._peer_ended = True
        self._readers.unpark_all()

    def break_(self, why: str, *, lost: bool = False) -> None:
        """Nothing more goes in or out.

        What came before the peer's end can still be read, and, where the connection was lost rather than the stream
        reset, all that came.
        """
        if self._broken:
            return
        self._broken = why
        self._unsent.clear()
        self._unsent_bytes = 0
        if not self._peer_ended and not lost:
            self._received.clear()
        self._readers.unpark_all()
        self._writers.unpark_all()

    def abandon(self, why: str) -> None:
        """Reset the stream from this side."""
        if self._broken or self.is_done:
            return
        self.break_(why)
        self.muxed_conn.push(encode(Kind.WINDOW, Flag.RST, self.number, 0))
        self.muxed_conn.release(self)

    def _end(self) -> None:
        if not self._ending:
            self._ending = True
            self.muxed_conn.ready(self)

    def _refuse(self) -> None:
        """Tell a peer that sends to a closed stream that nobody listens, once all of ours has been sent."""
        if self._unwanted and self._ended and not self._peer_ended:
            self.abandon("the stream was closed here")

    async def _until_little_is_unsent(self) -> None:
        while self._unsent_bytes > UNSENT:
            await self._writers.park()
        if self._broken:
            raise MuxedStreamReset(self._broken)

    def _credit(self, count: int) -> None:
        """Let the peer send as much more as was read, told at half a window; the first time, enlarge the window.

        So a stream that nobody reads holds no more than the initial window.
        """
        self._consumed += count
        if self._peer_ended or self._broken or 2 * self._consumed < self._granted:
            return
        more = self._consumed + max(0, self._window - self._granted)
        self._granted = max(self._granted, self._window)
        self._expected += more
        self._consumed = 0
        self.muxed_conn.push(encode(Kind.WINDOW, Flag.NONE, self.number, more))
