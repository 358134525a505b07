"""Noise transport messages over a socket pair."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from types import SimpleNamespace

import pytest
import trio
import trio.testing
from libp2p.io.exceptions import ConnectionClosedError, DecryptionFailedException

from blyan_node.p2p.noise import MOST_PLAINTEXT, CipherState, NoiseConnection

KEYS = (b"\1" * 32, b"\2" * 32)
Ends = tuple[NoiseConnection, NoiseConnection, trio.SocketStream, trio.SocketStream]


@pytest.fixture
async def ends() -> AsyncIterator[Ends]:
    sockets = [trio.SocketStream(socket) for socket in trio.socket.socketpair()]
    connections = []
    for side, tcp in enumerate(sockets):
        session = SimpleNamespace(
            local_peer=None,
            local_private_key=None,
            remote_peer=None,
            remote_permanent_pubkey=None,
            is_initiator=side == 0,
        )
        raw = SimpleNamespace(close=tcp.aclose)
        sending, receiving = CipherState(KEYS[side]), CipherState(KEYS[1 - side])
        connections.append(NoiseConnection(session, raw, tcp, sending, receiving))  # type: ignore[arg-type]
    yield connections[0], connections[1], sockets[0], sockets[1]
    for tcp in sockets:
        await tcp.aclose()


async def read_exactly(connection: NoiseConnection, count: int, rng: random.Random) -> bytes:
    data = bytearray()
    while len(data) < count:
        data += await connection.read(rng.choice([1, 100, count - len(data)]) if rng.random() < 0.5 else None)
    return bytes(data)


@pytest.mark.parametrize("seed", range(5))
async def test_whatever_the_sizes_every_byte_arrives_in_order(ends: Ends, seed: int) -> None:
    rng = random.Random(seed)
    near, far, _, _ = ends
    pieces = [rng.randbytes(rng.choice([1, 12, MOST_PLAINTEXT, MOST_PLAINTEXT + 1, 300_000])) for _ in range(20)]

    async def write() -> None:
        for piece in pieces:
            await near.write(piece)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write)
        whole = b"".join(pieces)
        assert await read_exactly(far, len(whole), rng) == whole


async def test_the_next_message_only(ends: Ends) -> None:
    _near, far, tcp, _ = ends
    sealed = CipherState(KEYS[0], 1).seal(memoryview(b"out of turn"))
    await tcp.send_all(len(sealed).to_bytes(2, "big") + sealed)
    with pytest.raises(DecryptionFailedException):
        await far.read()


@pytest.mark.parametrize("junk", [b"\0\0", b"\0\5hello", b"\0\x20" + bytes(32), b"\xff\xff" + bytes(65535)])
async def test_junk_is_no_message(ends: Ends, junk: bytes) -> None:
    _, far, tcp, _ = ends
    async with trio.open_nursery() as nursery:
        nursery.start_soon(tcp.send_all, junk)
        with pytest.raises(DecryptionFailedException):
            await far.read()


async def test_empty_messages_are_skipped(ends: Ends) -> None:
    _, far, tcp, _ = ends
    state = CipherState(KEYS[0])
    for plain in (b"", b"", b"x"):
        sealed = state.seal(memoryview(plain))
        await tcp.send_all(len(sealed).to_bytes(2, "big") + sealed)
    assert await far.read() == b"x"


@pytest.mark.parametrize("cut", [0, 1, 2, 10])
async def test_an_end_is_an_error_wherever_it_comes(ends: Ends, cut: int) -> None:
    near, far, tcp, _ = ends
    await tcp.send_all((b"\0\x20" + bytes(32))[:cut])
    await near.close()
    with pytest.raises(ConnectionClosedError):
        await far.read()
    with pytest.raises(ConnectionClosedError):
        await near.write(b"x")
    with pytest.raises(ConnectionClosedError):
        await near.read()


async def test_a_read_cut_by_cancellation_takes_nothing(ends: Ends) -> None:
    _near, far, tcp, _ = ends
    state = CipherState(KEYS[0])
    sealed = state.seal(memoryview(b"whole"))
    message = len(sealed).to_bytes(2, "big") + sealed
    for start in range(len(message)):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(far.read)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        await tcp.send_all(message[start : start + 1])
    assert await far.read() == b"whole"


async def test_after_a_write_cut_by_cancellation_nothing_is_written(ends: Ends) -> None:
    near, _, _, _ = ends
    async with trio.open_nursery() as nursery:
        nursery.start_soon(near.write, bytes(10**7))  # more than the socket holds, and nobody reads
        await trio.testing.wait_all_tasks_blocked(0.05)
        nursery.cancel_scope.cancel()
    with pytest.raises(ConnectionClosedError, match="cut short"):
        await near.write(b"x")
