"""Muxers joined by a pipe in memory, for tests under the virtual clock; and a peer that speaks in single frames."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio
from libp2p.abc import ISecureConn
from libp2p.connection_types import ConnectionType
from libp2p.crypto.secp256k1 import create_new_key_pair
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.peer.id import ID
from multiaddr import Multiaddr

from blyan_node.p2p.transport import PeerId
from blyan_node.p2p.yamux import Yamux, YamuxSettings
from blyan_node.p2p.yamux_frames import Flag, FrameParser, Header, Kind, encode
from tests.support.network import secret

KEYS = [create_new_key_pair(secret(number)) for number in range(2)]
IDS = [ID.from_pubkey(key.public_key) for key in KEYS]


class PipeEnd(ISecureConn):
    """One end of a pipe that holds a few writes, and delivers them in pieces of any size."""

    def __init__(self, side: int, send: trio.MemorySendChannel, receive: trio.MemoryReceiveChannel, rng: random.Random):
        self.is_initiator = side == 0
        self._side, self._send, self._receive, self._random = side, send, receive, rng
        self._rest = b""
        self.swallow = False
        """A black hole: what is written vanishes."""

    async def read(self, n: int | None = None) -> bytes:
        if not self._rest:
            try:
                self._rest = await self._receive.receive()
            except (trio.EndOfChannel, trio.ClosedResourceError) as error:
                raise ConnectionClosedError("closed") from error
        most = self._random.choice([1, 7, 12, 13, 1000, 65519, 10**6])
        data, self._rest = self._rest[:most], self._rest[most:]
        return data

    async def write(self, data: bytes) -> None:
        if self.swallow:
            await trio.lowlevel.checkpoint()
            return
        try:
            await self._send.send(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise ConnectionClosedError("closed") from error

    async def close(self) -> None:
        self._send.close()
        self._receive.close()
        await trio.lowlevel.checkpoint()

    def get_local_peer(self) -> ID:
        return IDS[self._side]

    def get_local_private_key(self):
        return KEYS[self._side].private_key

    def get_remote_peer(self) -> ID:
        return IDS[1 - self._side]

    def get_remote_public_key(self):
        return KEYS[1 - self._side].public_key

    def get_remote_address(self) -> tuple[str, int] | None:
        return None

    def get_transport_addresses(self) -> list[Multiaddr]:
        return []

    def get_connection_type(self) -> ConnectionType:
        return ConnectionType.DIRECT


def pipe(seed: int = 0, capacity: int = 1) -> tuple[PipeEnd, PipeEnd]:
    rng = random.Random(seed)
    there = trio.open_memory_channel[bytes](capacity)
    back = trio.open_memory_channel[bytes](capacity)
    return PipeEnd(0, there[0], back[1], rng), PipeEnd(1, back[0], there[1], rng)


@dataclass
class Muxed:
    """A muxer, what it runs over, and the faults that it counted."""

    muxer: Yamux
    end: PipeEnd
    faults: list[str]


def muxed(end: PipeEnd, settings: YamuxSettings | None = None) -> Muxed:
    faults: list[str] = []

    def blame(_peer: PeerId, _points: int, why: str) -> None:
        faults.append(why)

    return Muxed(Yamux(end, end.get_remote_peer(), penalise=blame, settings=settings), end, faults)


@asynccontextmanager
async def muxers(
    seed: int = 0, settings: YamuxSettings | None = None, capacity: int = 1
) -> AsyncIterator[tuple[Muxed, Muxed]]:
    one, other = (muxed(end, settings) for end in pipe(seed, capacity))
    async with trio.open_nursery() as nursery:
        for side in (one, other):
            nursery.start_soon(side.muxer.start)
            await side.muxer.event_started.wait()
        yield one, other
        await one.muxer.close()
        await other.muxer.close()


@dataclass
class Hand:
    """A peer (the one who dialled) whose frames the test writes and reads by hand."""

    end: PipeEnd
    _parser: FrameParser = field(default_factory=FrameParser)
    _frames: list[tuple[Header, bytes]] = field(default_factory=list)

    async def send(self, kind: Kind, flags: Flag, stream: int, length: int, data: bytes = b"") -> None:
        await self.end.write(encode(kind, flags, stream, length) + data)

    async def next(self) -> tuple[Header, bytes]:
        """The next frame; raises ConnectionClosedError at the end."""
        while not self._frames or self._parser.remaining:
            for part in self._parser.feed(await self.end.read()):
                if isinstance(part, Header):
                    self._frames.append((part, b""))
                else:
                    header, data = self._frames.pop()
                    self._frames.append((header, data + part))
        return self._frames.pop(0)

    async def until(self, kind: Kind, flags: Flag = Flag.NONE) -> tuple[Header, bytes]:
        """The next frame of this kind and with these flags."""
        while True:
            header, data = await self.next()
            if header.kind == kind and header.flags == flags:
                return header, data


@asynccontextmanager
async def by_hand(settings: YamuxSettings | None = None) -> AsyncIterator[tuple[Hand, Muxed]]:
    """A peer by hand, and a muxer that it talks to."""
    near, far = pipe(capacity=10_000)
    victim = muxed(far, settings)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(victim.muxer.start)
        await victim.muxer.event_started.wait()
        yield Hand(near), victim
        await near.close()
        await victim.muxer.close()
