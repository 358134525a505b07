"""Yamux 1.0.0 on trio, behind libp2p's interfaces (frames and specs: :mod:`blyan_node.p2p.yamux_frames`).

Three tasks run a connection. The reader never writes and never waits for anything but the peer, so two peers cannot
block each other. The writer alone writes: first what was queued by way of control (window updates, pings, resets),
then a frame of each stream that has something to send, in turn, as much as goes into one write. The third task sees to
it that a peer that has vanished is noticed. Everything is driven by events; nothing polls.

What a peer can make us hold is bounded: by the windows, the number of streams, and the length of the control queue.
What breaks the protocol ends the connection, which is told to the peer (GO_AWAY) and counted against it.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import trio
from libp2p.abc import IMuxedConn, ISecureConn
from libp2p.connection_types import ConnectionType
from libp2p.io.exceptions import IOException
from libp2p.network.connection.exceptions import RawConnError
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import MuxedConnUnavailable, MuxedStreamError
from multiaddr import Multiaddr

from blyan_node.errors import ChannelClosed, ProtocolViolation
from blyan_node.p2p.guard import Penalise, briefly, survive
from blyan_node.p2p.transport import PeerId
from blyan_node.p2p.yamux_frames import (
    HEADER_BYTES,
    INITIAL_WINDOW,
    MOST_WINDOW,
    Farewell,
    Flag,
    FrameParser,
    Header,
    Kind,
    encode,
)
from blyan_node.p2p.yamux_stream import MOST_DATA, YamuxStream

logger = logging.getLogger(__name__)

MOST_CONTROL = 4096
"""Control frames that may wait; a peer that provokes more than it reads is cut off."""

WRITE_BYTES = 4 * (HEADER_BYTES + MOST_DATA)
"""Bytes after which no further frame joins a write."""

SILENT_PULSES = 3
"""A connection on which nothing came for so many pulses is lost. Pulses are counted, not seconds: while this process
itself stands still, no peer is blamed."""

LINGER_PULSES = 20
"""Pulses after which a stream that we closed, and the peer did not, is reset; the same for a peer that goes away."""

CLOSE_SECONDS = 0.5
"""Time for what was written to get out when a connection is closed."""


@dataclass(frozen=True)
class YamuxSettings:
    """What can be chosen for a connection."""

    window: int = 1024 * 1024
    """Bytes that the peer may have on its way on one stream, once that is read from."""
    streams: int = 1024
    """Streams open at once, both ways together; beyond them the peer's are refused with a reset."""
    pulse: float = 3.0
    """Seconds of silence after which the peer is pinged."""

    def __post_init__(self) -> None:
        if not INITIAL_WINDOW <= self.window <= MOST_WINDOW:
            raise ValueError(f"a window of {self.window} bytes; Yamux begins with {INITIAL_WINDOW}")


class Yamux(IMuxedConn):
    """One connection; see the module."""

    def __init__(
        self, conn: ISecureConn, peer_id: ID, *, penalise: Penalise, settings: YamuxSettings | None = None
    ) -> None:
        self.secured_conn = conn
        self.peer_id = peer_id
        self.event_started = trio.Event()
        self.on_close: Callable[[], Awaitable[None]] | None = None  # set by the swarm, which hears of it otherwise too
        self._penalise = penalise
        self._settings = settings or YamuxSettings()
        self._streams: dict[int, YamuxStream] = {}
        self._next_number = 1 if conn.is_initiator else 2
        self._accepted: deque[YamuxStream] = deque()
        self._acceptors = trio.lowlevel.ParkingLot()
        self._control: deque[bytes] = deque()
        self._ready: deque[YamuxStream] = deque()
        self._writer = trio.lowlevel.ParkingLot()
        self._lingering: dict[YamuxStream, int] = {}
        self._receiving: YamuxStream | None = None
        self._ending_after: Header | None = None
        self._heard = False
        self._pulses = 0
        self._leave_at = math.inf
        self._scope = trio.CancelScope()
        self._failure: ProtocolViolation | None = None
        self._farewell = Farewell.NORMAL
        self._closing = False
        self._ended, self._finished = trio.Event(), trio.Event()

    # ---- libp2p's interface

    @property
    def is_initiator(self) -> bool:
        """Whether we dialled."""
        return self.secured_conn.is_initiator

    @property
    def is_established(self) -> bool:
        """Whether streams can be opened."""
        return self.event_started.is_set() and not self.is_closed

    @property
    def is_closed(self) -> bool:
        """Whether the connection has ended, or is about to."""
        return self._closing or self._ended.is_set()

    async def start(self) -> None:
        """Run the connection until it ends. Whatever it runs into ends it, never the host."""
        self.event_started.set()
        peer = PeerId(str(self.peer_id))
        try:
            await survive(self._run, f"connection with {peer}", peer, self._blame)
        finally:
            self._end()
            with briefly(CLOSE_SECONDS):
                await self._say_farewell()
            with briefly(CLOSE_SECONDS):
                await self.secured_conn.close()
            self._finished.set()

    async def close(self) -> None:
        """End the connection, once what was written is out, but soon."""
        if self._closing:
            await trio.lowlevel.checkpoint()
            return
        self._closing = True
        self._writer.unpark_all()
        if not self.event_started.is_set():
            self._end()
            await self.secured_conn.close()
            return
        try:
            with trio.move_on_after(CLOSE_SECONDS):
                await self._finished.wait()
        finally:
            self._scope.cancel()
        await self._finished.wait()

    async def open_stream(self) -> YamuxStream:
        """Open a stream.

        Raises MuxedConnUnavailable where the connection ends, MuxedStreamError where too many streams are open.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        if self.is_closed or self._leave_at < math.inf:
            raise MuxedConnUnavailable("the connection ends")
        if len(self._streams) >= self._settings.streams:
            raise MuxedStreamError(f"{self._settings.streams} streams are open already")
        if self._next_number > MOST_WINDOW:
            raise MuxedStreamError("the connection has no stream numbers left")
        stream = self._add(self._next_number)
        self._next_number += 2
        self.push(encode(Kind.WINDOW, Flag.SYN, stream.number, 0))
        return stream

    async def accept_stream(self) -> YamuxStream:
        """Wait for a stream that the peer opens; raise MuxedConnUnavailable when the connection has ended."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while True:
            while self._accepted:
                stream = self._accepted.popleft()
                if not stream.is_broken:
                    return stream
            if self._ended.is_set():
                raise MuxedConnUnavailable("the connection ended")
            await self._acceptors.park()

    def get_transport_addresses(self) -> list[Multiaddr]:
        """The addresses of the connection."""
        return self.secured_conn.get_transport_addresses()

    def get_connection_type(self) -> ConnectionType:
        """Direct or relayed."""
        return self.secured_conn.get_connection_type()

    def get_remote_address(self) -> tuple[str, int] | None:
        """The peer's host and port."""
        return self.secured_conn.get_remote_address()

    @property
    def open_streams(self) -> int:
        """How many streams are open."""
        return len(self._streams)

    # ---- for the streams

    def ready(self, stream: YamuxStream) -> None:
        """Have a stream's data sent, or its end, if there is any."""
        if not stream.queued and stream.has_more:
            stream.queued = True
            self._ready.append(stream)
            self._writer.unpark()

    def push(self, frame: bytes) -> None:
        """Queue a control frame."""
        if self._ended.is_set():
            return
        self._control.append(frame)
        if len(self._control) > MOST_CONTROL and self._failure is None:
            self._failure = ProtocolViolation("the peer provokes more frames than it reads")
            self._scope.cancel()
        self._writer.unpark()

    def linger(self, stream: YamuxStream) -> None:
        """Wait for the peer to close a stream that we closed, but not for ever."""
        self._lingering[stream] = self._pulses + LINGER_PULSES

    def release(self, stream: YamuxStream) -> None:
        """Forget a stream."""
        self._lingering.pop(stream, None)
        if self._streams.get(stream.number) is stream:
            del self._streams[stream.number]
            if not self._streams and self._leave_at < math.inf:
                self._scope.cancel()

    # ---- the tasks

    async def _run(self) -> None:
        with self._scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch)
                nursery.start_soon(self._read)
                await self._write()
                nursery.cancel_scope.cancel()
        if self._failure is not None:
            raise self._failure

    async def _read(self) -> None:
        parser = FrameParser()
        try:
            while True:
                for part in parser.feed(await self.secured_conn.read()):
                    if isinstance(part, Header):
                        self._on_header(part)
                    elif self._receiving is not None:
                        self._receiving.deliver(part)
                    if not parser.remaining:
                        self._on_end_of_frame()
                self._heard = True
        except (IOException, RawConnError) as error:
            raise ChannelClosed(str(error) or "the connection is gone") from error

    async def _write(self) -> None:
        """Send what there is, until the connection is to be closed and nothing is left."""
        try:
            while True:
                if batch := self._next_batch():
                    await self.secured_conn.write(b"".join(batch))
                elif self._closing:
                    return
                else:
                    await self._writer.park()
        except (IOException, RawConnError) as error:
            raise ChannelClosed(str(error) or "the connection is gone") from error

    async def _watch(self) -> None:
        """Ping where nothing comes; raise ChannelClosed where nothing came in spite of it."""
        silent = 0
        while silent < SILENT_PULSES:
            self._heard = False
            await trio.sleep(self._settings.pulse)
            self._pulses += 1
            silent = 0 if self._heard else silent + 1
            if silent:
                self.push(encode(Kind.PING, Flag.SYN, 0, self._pulses % MOST_WINDOW))
            for stream in [stream for stream, until in self._lingering.items() if until <= self._pulses]:
                stream.abandon("the peer did not close the stream")
            if self._pulses >= self._leave_at:
                raise ChannelClosed("the peer said that it goes")
        raise ChannelClosed(f"nothing came for {SILENT_PULSES * self._settings.pulse:g} s")

    def _next_batch(self) -> list[bytes | memoryview]:
        parts: list[bytes | memoryview] = list(self._control)
        self._control.clear()
        size = HEADER_BYTES * len(parts)
        while self._ready and size < WRITE_BYTES:
            stream = self._ready.popleft()
            frame = stream.take()
            size += sum(map(len, frame))
            parts += frame
            if stream.has_more:
                self._ready.append(stream)
            else:
                stream.queued = False
                if stream.is_done:
                    self.release(stream)
        return parts

    # ---- what the peer sends

    def _on_header(self, header: Header) -> None:
        if header.kind == Kind.PING:
            if header.flags & Flag.SYN:
                self.push(encode(Kind.PING, Flag.ACK, 0, header.length))
            return
        if header.kind == Kind.GO_AWAY:
            self._on_go_away(header.length)
            return
        if header.flags & Flag.SYN:
            self._on_syn(header.stream)
        self._ending_after = header
        self._receiving = stream = self._streams.get(header.stream)
        if stream is None:
            # released here while the peer was still sending; what it may have on its way is bounded
            if header.kind == Kind.DATA and header.length > self._settings.window:
                raise ProtocolViolation(f"{header.length} bytes of data for stream {header.stream}, which is not open")
        elif header.kind == Kind.DATA:
            stream.expect(header.length)
        else:
            stream.allow(header.length)

    def _on_end_of_frame(self) -> None:
        """Do what the flags of a frame ask for, once its data is there."""
        header, stream = self._ending_after, self._receiving
        self._ending_after = self._receiving = None
        if header is None or stream is None:
            return
        if header.flags & Flag.RST:
            stream.break_("the peer reset the stream")
            self.release(stream)
        elif header.flags & Flag.FIN:
            stream.end_received()
            if stream.is_done:
                self.release(stream)

    def _on_syn(self, number: int) -> None:
        if number % 2 == self._next_number % 2 or number == 0:
            raise ProtocolViolation(f"the peer may not open stream {number}")
        if number in self._streams:
            raise ProtocolViolation(f"stream {number} is open already")
        most = self._settings.streams
        if len(self._streams) >= most or len(self._accepted) >= most or self._closing or self._leave_at < math.inf:
            self.push(encode(Kind.WINDOW, Flag.RST, number, 0))
            return
        self._accepted.append(self._add(number))
        self._acceptors.unpark()
        self.push(encode(Kind.WINDOW, Flag.ACK, number, 0))

    def _on_go_away(self, reason: int) -> None:
        """Let the streams end that are open; where the peer had reason to complain, or there are none, end at once."""
        if reason != Farewell.NORMAL or not self._streams:
            raise ChannelClosed(f"the peer went away (reason {reason})")
        self._leave_at = self._pulses + LINGER_PULSES

    # ---- the end

    def _add(self, number: int) -> YamuxStream:
        stream = self._streams[number] = YamuxStream(self, number, self._settings.window)
        return stream

    def _blame(self, peer: PeerId, points: int, reason: str) -> None:
        """Count a violation against the peer, and be about to tell it."""
        self._farewell = Farewell.PROTOCOL_ERROR
        self._penalise(peer, points, reason)

    def _end(self) -> None:
        """Wake everybody who waits for something of this connection."""
        if self._ended.is_set():
            return
        self._ended.set()
        for stream in list(self._streams.values()):
            stream.break_("the connection was lost", lost=True)
        self._streams.clear()
        self._lingering.clear()
        self._control.clear()
        self._ready.clear()
        self._acceptors.unpark_all()

    async def _say_farewell(self) -> None:
        try:
            await self.secured_conn.write(encode(Kind.GO_AWAY, Flag.NONE, 0, self._farewell))
        except (IOException, RawConnError) as error:
            logger.debug("no farewell to %s: %s", self.peer_id, error)
