"""Frames of Yamux 1.0.0 (github.com/hashicorp/yamux, ``spec.md``; libp2p specs, ``yamux/README.md``), without I/O.

A frame is a header of twelve bytes, big-endian: version (0), type, u16 flags, u32 stream, u32 length; a DATA frame is
followed by as many bytes as its length says. In the other types the length is a number: what is added to a window, a
ping's value, or the reason for going away.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from enum import IntEnum, IntFlag
from typing import NamedTuple

from blyan_node.errors import ProtocolViolation

PROTOCOL = "/yamux/1.0.0"
INITIAL_WINDOW = 256 * 1024
MOST_WINDOW = 2**32 - 1

_HEADER = struct.Struct(">BBHII")
HEADER_BYTES = _HEADER.size


class Kind(IntEnum):
    """Types of frames."""

    DATA = 0
    WINDOW = 1
    PING = 2
    GO_AWAY = 3


class Flag(IntFlag):
    """Flags of frames; others are ignored."""

    NONE = 0
    SYN = 1
    ACK = 2
    FIN = 4
    RST = 8


class Farewell(IntEnum):
    """Reasons for going away."""

    NORMAL = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2


class Header(NamedTuple):
    """The beginning of a frame, or all of it."""

    kind: int
    flags: int
    stream: int
    length: int


def encode(kind: Kind, flags: Flag, stream: int, length: int) -> bytes:
    """Return a header."""
    return _HEADER.pack(0, kind, flags, stream, length)


class FrameParser:
    """Cuts a sequence of bytes into headers and pieces of data.

    It keeps at most the beginning of a header: the data of a frame is handed on as it comes, after its header, so it
    is for the taker of the header to refuse a length before any of it is read.
    """

    def __init__(self) -> None:
        self.remaining = 0
        """Bytes of the current frame's data that are still to come."""
        self._begun = b""

    def feed(self, data: bytes) -> Iterator[Header | memoryview]:
        """Yield what the bytes hold. Raises ProtocolViolation for another version or an unknown type."""
        view = memoryview(self._begun + data if self._begun else data)
        self._begun = b""
        at = 0
        while at < len(view):
            if self.remaining:
                piece = view[at : at + self.remaining]
                self.remaining -= len(piece)
                at += len(piece)
                yield piece
                continue
            if len(view) - at < HEADER_BYTES:
                self._begun = bytes(view[at:])
                return
            version, kind, flags, stream, length = _HEADER.unpack_from(view, at)
            at += HEADER_BYTES
            if version != 0 or kind > Kind.GO_AWAY:
                raise ProtocolViolation(f"a frame of version {version} and type {kind}, which Yamux does not know")
            if kind == Kind.DATA:
                self.remaining = length
            yield Header(kind, flags, stream, length)
