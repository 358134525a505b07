"""Long-lived channels of typed messages between peers, one for each direction.

The sender opens a stream and keeps it. It carries frames of u32 length (of what follows), u8 type and the packed
message; type PING carries a u32 number instead. In the other direction of the same stream flow only frames of type
PING that repeat the newest number: at once when one came, and every PULSE in any case. So each side hears from the
other every PULSE while the other lives, even one whose handler is slow and whose inbox is full.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from blyan_node.codec import pack, unpack
from blyan_node.errors import ChannelClosed, PeerError, ProtocolViolation
from blyan_node.p2p.buffer import FrameBuffer
from blyan_node.p2p.framing import FrameReader, frame
from blyan_node.p2p.guard import briefly, survive
from blyan_node.p2p.transport import Network, PeerId, Stream

logger = logging.getLogger(__name__)

PULSE = 0.5
"""Seconds between pings."""

SILENT_PULSES = 4
"""A channel on which nothing came for so many pulses is lost. Pulses are counted, not seconds: while this process
itself stands still, no peer is blamed."""

PING = 255
"""Type of pings and their echoes; types below are indexes into the table of messages."""

COALESCE = 256 * 1024
"""Bytes written to the stream at once, at most, unless one frame is larger."""

QUEUED_FRAMES = 256
QUEUED_BYTES = 4 * 1024 * 1024
"""Bounds of each outbound queue; a queue holds at least one frame, however large."""

INBOX_FRAMES = 64
INBOX_BYTES = 1024 * 1024

_NUMBER = struct.Struct(">I")
_PING_TYPE = bytes([PING])
_SMOOTHING = 1 / 8  # as TCP smooths round trips (RFC 6298)

OnMessage = Callable[[PeerId, Any], Awaitable[None]]
OnLost = Callable[[PeerId], None]


class Channels:
    """The channels of one protocol with all peers.

    Messages to a peer wait in a bounded queue of their own (:meth:`send` waits when it is full), so a peer that
    stalls holds up nobody else; its channel is lost when the transport gives up or pings stay unanswered.

    Messages from a peer are handed to ``on_message`` one at a time, in order. While it runs, up to INBOX_FRAMES more
    are kept, then the stream is not read: this is how the peer's sending is slowed down. When a channel is lost, what
    it was handing over is cancelled; at a proper end, everything that came is handed over first. **The caller must
    guarantee** that ``on_message`` never waits, without a deadline, for a :meth:`send` to a peer whose own
    ``on_message`` may be waiting for a send back here: with all four queues full neither would go on. Hand such
    messages to a task of your own with a bounded queue, and shed or refuse work when that is full.

    ``on_lost`` is called once for each channel that ends, whichever side opened it and whatever the reason, except
    when :meth:`run` is cancelled. What was queued on a lost channel is gone.
    """

    def __init__(
        self,
        network: Network,
        protocol: str,
        table: tuple[type, ...],
        *,
        largest: int,
        on_message: OnMessage,
        on_lost: OnLost,
    ) -> None:
        """``table`` lists the message dataclasses, whose index is their type; ``largest`` bounds a packed message."""
        if len(table) > PING:
            raise ValueError(f"at most {PING} types of messages")
        self._network, self._protocol = network, protocol
        self._table, self._types = table, {cls: bytes([index]) for index, cls in enumerate(table)}
        self._largest = largest
        self._on_message, self._on_lost = on_message, on_lost
        self._outgoing: dict[PeerId, _Outgoing] = {}
        self._incoming: dict[PeerId, _Incoming] = {}
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve the protocol until cancelled; then the channels are closed."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                self._network.set_handler(self._protocol, self._serve)
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._nursery = None
            for incoming in self._incoming.values():
                incoming.scope.cancel()

    async def send(self, peer: PeerId, message: Any) -> None:
        """Queue a message to a peer, opening the channel if there is none; wait while the queue is full.

        Returns when the message is queued: whether it arrives is the protocol's own business. Raises Unreachable if
        the peer is no neighbour or does not serve the protocol, ChannelClosed if the channel was lost meanwhile.
        """
        kind, data = self._types[type(message)], pack(message)
        if len(data) > self._largest:
            raise ValueError(f"a message of {len(data)} bytes; {self._protocol} allows {self._largest}")
        outgoing = self._outgoing.get(peer)
        if outgoing is None:
            if self._nursery is None:
                raise RuntimeError("run() comes first")
            outgoing = self._outgoing[peer] = _Outgoing(peer)
            self._nursery.start_soon(self._run_outgoing, outgoing)
        await outgoing.decided.wait()
        if outgoing.failure is not None:
            raise type(outgoing.failure)(str(outgoing.failure))
        await outgoing.queue.put(frame(kind, data))

    def round_trip(self, peer: PeerId) -> float | None:
        """Seconds to the peer and back, smoothed; None before the first echo, or without an open channel to it."""
        outgoing = self._outgoing.get(peer)
        return None if outgoing is None else outgoing.round_trip

    async def _run_outgoing(self, outgoing: _Outgoing) -> None:
        peer = outgoing.peer
        try:
            stream = await self._network.open_stream(peer, self._protocol)
        except PeerError as error:
            outgoing.failure = error
            del self._outgoing[peer]
            return
        except BaseException:
            outgoing.failure = ChannelClosed("the channels are being closed")
            raise
        finally:
            outgoing.decided.set()
        try:
            what = f"channel {self._protocol} to {peer}"
            await survive(lambda: outgoing.pump(stream), what, peer, self._network.penalise)
        finally:
            del self._outgoing[peer]
            outgoing.queue.close()
            with briefly(1):
                await stream.reset()
        self._on_lost(peer)

    async def _serve(self, stream: Stream) -> None:
        """Serve an incoming channel; a new one from the same peer takes the place of the old."""
        if self._nursery is None:
            raise ChannelClosed(f"{self._protocol} is not served any more")
        incoming = _Incoming(stream, self._decode, self._on_message, self._largest)
        before = self._incoming.get(stream.peer)
        self._incoming[stream.peer] = incoming
        if before is not None:
            before.scope.cancel()
            await before.ended.wait()
        try:
            with incoming.scope:
                await incoming.pump()
        finally:
            if self._incoming[stream.peer] is incoming:
                del self._incoming[stream.peer]
            incoming.ended.set()
            if self._nursery is not None:
                self._on_lost(stream.peer)

    def _decode(self, content: bytes) -> Any:
        """Decode a frame; raise ProtocolViolation or CodecError for one that is none."""
        if content[0] >= len(self._table):
            raise ProtocolViolation(f"message type {content[0]} is unknown")
        return unpack(self._table[content[0]], content[1:], most=self._largest)


class _Pulse:
    """Counts the pulses in which nothing was heard."""

    def __init__(self) -> None:
        self.heard = True
        self.reading = True  # False while our own inbox is full: then the silence is ours

    async def watch(self, each: Callable[[], None]) -> None:
        """Call ``each`` at every pulse; raise ChannelClosed after too many silent ones."""
        silent = 0
        while silent < SILENT_PULSES:
            each()
            await trio.sleep(PULSE)
            silent = 0 if self.heard or not self.reading else silent + 1
            self.heard = False
        raise ChannelClosed(f"nothing came for {PULSE * SILENT_PULSES:g} s")


class _Outgoing:
    """A channel that we opened, or are about to: the queue, its writer, and the reader of echoes."""

    def __init__(self, peer: PeerId) -> None:
        self.peer = peer
        self.queue = FrameBuffer(frames=QUEUED_FRAMES, size=QUEUED_BYTES)
        self.decided = trio.Event()
        self.failure: PeerError | None = None
        self.round_trip: float | None = None
        self._pulse = _Pulse()
        self._number = 0
        self._ping_due = False
        self._ping_sent = 0.0

    async def pump(self, stream: Stream) -> None:
        """Run the channel until it is lost, which raises."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._write, stream)
            nursery.start_soon(self._read_echoes, stream)
            nursery.start_soon(self._pulse.watch, self._ping)

    def _ping(self) -> None:
        self._ping_due = True
        self.queue.wake()

    async def _write(self, stream: Stream) -> None:
        """The only writer: what is queued goes out together."""
        while True:
            batch = await self.queue.take(COALESCE) if len(self.queue) or not self._ping_due else []
            if self._ping_due:
                self._ping_due = False
                self._number = (self._number + 1) & 0xFFFFFFFF
                self._ping_sent = trio.current_time()
                batch.append(frame(_PING_TYPE, _NUMBER.pack(self._number)))
            if batch:
                await stream.send_all(b"".join(batch))

    async def _read_echoes(self, stream: Stream) -> None:
        reader, answered = FrameReader(stream), 0
        while (content := await reader.next(1 + _NUMBER.size)) is not None:
            number = _ping_number(content)
            self._pulse.heard = True
            if number == self._number != answered:
                answered = number
                elapsed = trio.current_time() - self._ping_sent
                known = self.round_trip
                self.round_trip = elapsed if known is None else known + _SMOOTHING * (elapsed - known)
        raise ChannelClosed("the peer closed the channel")


class _Incoming:
    """A channel that the peer opened: its reader, the one who hands over messages, and the echo."""

    def __init__(self, stream: Stream, decode: Callable[[bytes], Any], on_message: OnMessage, largest: int) -> None:
        self.scope = trio.CancelScope()
        self.ended = trio.Event()
        self._stream, self._decode, self._on_message, self._largest = stream, decode, on_message, largest
        self._inbox = FrameBuffer(frames=INBOX_FRAMES, size=INBOX_BYTES)
        self._pulse = _Pulse()
        self._number = 0
        self._pinged = trio.Event()

    async def pump(self) -> None:
        """Run the channel until the peer ends it, or it is lost, which raises."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._echo)
            nursery.start_soon(self._pulse.watch, lambda: None)
            async with trio.open_nursery() as working:
                working.start_soon(self._hand_over)
                await self._read()
            nursery.cancel_scope.cancel()

    async def _read(self) -> None:
        reader = FrameReader(self._stream)
        try:
            while (content := await reader.next(1 + self._largest)) is not None:
                self._pulse.heard = True
                if content[:1] == _PING_TYPE:
                    self._number = _ping_number(content)
                    self._pinged.set()
                elif not content:
                    raise ProtocolViolation("an empty frame")
                else:
                    self._pulse.reading = False
                    await self._inbox.put(content)
                    self._pulse.reading = True
        finally:
            self._pulse.reading = False  # at the end of the data silence is as it should be
            self._inbox.close()

    async def _hand_over(self) -> None:
        while (batch := await self._inbox.take(1)) or not self._inbox.closed:
            for content in batch:
                await self._on_message(self._stream.peer, self._decode(content))

    async def _echo(self) -> None:
        while True:
            with trio.move_on_after(PULSE):
                await self._pinged.wait()
            self._pinged = trio.Event()
            await self._stream.send_all(frame(_PING_TYPE, _NUMBER.pack(self._number)))


def _ping_number(content: bytes) -> int:
    if len(content) != 1 + _NUMBER.size or content[:1] != _PING_TYPE:
        raise ProtocolViolation("a ping that is not one")
    number: int = _NUMBER.unpack_from(content, 1)[0]
    return number
