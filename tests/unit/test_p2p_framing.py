"""Frames and the buffer of frames."""

from __future__ import annotations

import itertools

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from blyan_node.errors import ChannelClosed, ProtocolViolation
from blyan_node.p2p.buffer import FrameBuffer
from blyan_node.p2p.framing import FrameReader, frame
from blyan_node.p2p.transport import PeerId


class Scripted:
    """A stream that delivers given pieces, then ends; counts what was asked for."""

    peer = PeerId("scripted")

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = [piece for piece in pieces if piece]
        self.largest_request = 0

    async def receive_some(self, most: int) -> bytes:
        await trio.lowlevel.checkpoint()
        self.largest_request = max(self.largest_request, most)
        if not self._pieces:
            return b""
        piece = self._pieces.pop(0)
        if len(piece) > most:
            self._pieces.insert(0, piece[most:])
        return piece[:most]

    async def send_all(self, data: bytes | memoryview) -> None:
        raise NotImplementedError

    async def close_write(self) -> None:
        raise NotImplementedError

    async def aclose(self) -> None:
        raise NotImplementedError

    async def reset(self) -> None:
        raise NotImplementedError


async def read_frames(data: bytes, cuts: list[int], most: int) -> list[bytes]:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    reader = FrameReader(Scripted([data[a:b] for a, b in itertools.pairwise(edges)]))
    contents = []
    while (content := await reader.next(most)) is not None:
        contents.append(content)
    return contents


@given(st.lists(st.binary(max_size=300), max_size=8), st.lists(st.integers(0, 3000), max_size=20))
def test_frames_survive_any_segmentation(contents: list[bytes], cuts: list[int]) -> None:
    data = b"".join(map(frame, contents))
    assert trio.run(read_frames, data, cuts, 300) == contents


@given(st.binary(max_size=200), st.lists(st.integers(0, 200), max_size=5))
def test_garbage_is_frames_or_a_violation(data: bytes, cuts: list[int]) -> None:
    try:
        contents = trio.run(read_frames, data, cuts, 64)
    except ProtocolViolation:
        return
    assert b"".join(map(frame, contents)) == data


async def test_an_oversized_frame_is_refused_before_it_is_read() -> None:
    stream = Scripted([frame(bytes(1000))[:4]])
    with pytest.raises(ProtocolViolation, match="1000 bytes where at most 999"):
        await FrameReader(stream).next(999)
    assert stream.largest_request <= 64 * 1024


async def test_a_cut_frame_is_a_violation() -> None:
    with pytest.raises(ProtocolViolation, match="middle"):
        await FrameReader(Scripted([frame(b"hello")[:-1]])).next(100)


async def test_buffer_waits_when_full_and_keeps_order(autojump_clock: trio.testing.MockClock) -> None:
    buffer = FrameBuffer(frames=2, size=100)
    taken: list[bytes] = []

    async def put_all() -> None:
        for number in range(10):
            await buffer.put(b"%d" % number)
        buffer.close()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(put_all)
        await trio.testing.wait_all_tasks_blocked()
        assert len(buffer) == 2
        while (batch := await buffer.take(1)) or not buffer.closed:
            taken += batch
    assert taken == [b"%d" % number for number in range(10)]


async def test_buffer_is_bounded_in_bytes_but_lets_a_large_frame_in_alone() -> None:
    buffer = FrameBuffer(frames=10, size=100)
    await buffer.put(bytes(500))
    with trio.move_on_after(0.01) as scope:
        await buffer.put(b"x")
    assert scope.cancelled_caught
    assert len(buffer) == 1
    assert await buffer.take(1) == [bytes(500)]
    await buffer.put(b"x")


async def test_buffer_coalesces_up_to_the_limit() -> None:
    buffer = FrameBuffer(frames=10, size=1000)
    for _ in range(5):
        await buffer.put(bytes(30))
    assert [len(part) for part in await buffer.take(100)] == [30, 30, 30]
    assert [len(part) for part in await buffer.take(100)] == [30, 30]


async def test_closing_wakes_those_who_wait() -> None:
    buffer = FrameBuffer(frames=1, size=100)
    await buffer.put(b"x")
    raised = []

    async def put() -> None:
        try:
            await buffer.put(b"y")
        except ChannelClosed as error:
            raised.append(error)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(put)
        await trio.testing.wait_all_tasks_blocked()
        buffer.close()
    assert raised
    assert await buffer.take(10) == [b"x"]
    assert await buffer.take(10) == []
