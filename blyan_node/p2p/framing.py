"""Length-prefixed frames on a stream: four bytes, big-endian, then as many bytes as they say."""

from __future__ import annotations

import struct

from blyan_node.errors import ChannelClosed, ProtocolViolation
from blyan_node.p2p.transport import Stream

_LENGTH = struct.Struct(">I")
_CHUNK = 64 * 1024


def frame(*parts: bytes) -> bytes:
    """Return the parts, joined, as one frame."""
    return b"".join((_LENGTH.pack(sum(map(len, parts))), *parts))


class FrameReader:
    """Reads frames. What it holds is bounded by the largest frame allowed and one chunk of 64 KiB."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._buffer = bytearray()

    async def next(self, most: int) -> bytes | None:
        """Return the next frame's content, or None at a proper end.

        Raises ProtocolViolation for a frame of more than ``most`` bytes, before any of it is read, and for an end
        in the middle of a frame; ChannelClosed if the stream breaks.
        """
        if not await self._fill(_LENGTH.size):
            if self._buffer:
                raise ProtocolViolation("the data ends in the middle of a frame")
            return None
        (length,) = _LENGTH.unpack_from(self._buffer)
        if length > most:
            raise ProtocolViolation(f"a frame of {length} bytes where at most {most} are allowed")
        if not await self._fill(_LENGTH.size + length):
            raise ProtocolViolation("the data ends in the middle of a frame")
        content = bytes(memoryview(self._buffer)[_LENGTH.size : _LENGTH.size + length])
        del self._buffer[: _LENGTH.size + length]
        return content

    async def end(self) -> None:
        """Wait for the end of the peer's data; raise ProtocolViolation if there is more instead."""
        if self._buffer or await self._stream.receive_some(1):
            raise ProtocolViolation("more data where the end was expected")

    async def _fill(self, count: int) -> bool:
        """Have ``count`` bytes in the buffer; False if the data ends before."""
        while (missing := count - len(self._buffer)) > 0:
            data = await self._stream.receive_some(max(missing, _CHUNK))
            if not data:
                return False
            self._buffer += data
        return True


async def expect(reader: FrameReader, most: int) -> bytes:
    """Return the next frame's content; raise ChannelClosed where the data ends instead."""
    content = await reader.next(most)
    if content is None:
        raise ChannelClosed("the peer ended the stream without an answer")
    return content
