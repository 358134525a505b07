"""Two muxers and a pipe, under the virtual clock."""

from __future__ import annotations

import random

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from libp2p.stream_muxer.exceptions import (
    MuxedConnUnavailable,
    MuxedStreamClosed,
    MuxedStreamEOF,
    MuxedStreamError,
    MuxedStreamReset,
)

from blyan_node.p2p.yamux import SILENT_PULSES, YamuxSettings
from blyan_node.p2p.yamux_frames import INITIAL_WINDOW, FrameParser, Header, Kind
from blyan_node.p2p.yamux_stream import UNSENT, YamuxStream
from tests.support.muxer import Muxed, muxed, muxers, pipe


async def read_all(stream: YamuxStream, most: int | None = None) -> bytes:
    parts = []
    try:
        while True:
            parts.append(await stream.read(most))
    except MuxedStreamEOF:
        return b"".join(parts)


async def stream_pair(one: Muxed, other: Muxed) -> tuple[YamuxStream, YamuxStream]:
    return await one.muxer.open_stream(), await other.muxer.accept_stream()


async def settle() -> None:
    await trio.testing.wait_all_tasks_blocked()


def window_of(stream: YamuxStream) -> int:
    """What the peer may send, and what of its data lies here or was read and not yet credited."""
    return stream._expected + len(stream._received) + stream._consumed


@given(st.lists(st.integers(0, 3), min_size=1), st.data())
@settings(max_examples=50, deadline=None)
def test_headers_and_data_come_out_however_the_bytes_are_cut(kinds: list[int], data: st.DataObject) -> None:
    import struct

    frames = [
        (kind, data.draw(st.integers(0, 15)), data.draw(st.integers(0, 9)), data.draw(st.integers(0, 50)))
        for kind in kinds
    ]
    wire, expected = b"", []
    for kind, flags, stream, length in frames:
        body = bytes(range(length)) if kind == Kind.DATA else b""
        wire += struct.pack(">BBHII", 0, kind, flags, stream, length) + body
        expected.append((Header(kind, flags, stream, length), body))
    parser, got, at = FrameParser(), [], 0
    while at < len(wire):
        step = data.draw(st.integers(1, 40))
        for part in parser.feed(wire[at : at + step]):
            if isinstance(part, Header):
                got.append((part, b""))
            else:
                got[-1] = (got[-1][0], got[-1][1] + part)
        at += step
    assert got == expected
    assert parser.remaining == 0


@pytest.mark.parametrize("seed", range(25))
async def test_whatever_the_interleaving_every_byte_arrives_in_order(
    autojump_clock: trio.testing.MockClock, seed: int
) -> None:
    rng = random.Random(seed)
    windows = YamuxSettings(window=rng.choice([INITIAL_WINDOW, INITIAL_WINDOW + 1, 2**20]))
    async with muxers(seed, windows, capacity=rng.choice([0, 1, 50])) as (one, other):
        payloads = {number: rng.randbytes(rng.choice([0, 1, 100, 65507, 300_000, 900_000])) for number in range(8)}
        received: dict[bytes, bytes] = {}

        async def write(stream: YamuxStream, number: int, data: bytes) -> None:
            await stream.write(bytes([number]))
            while data:
                size = rng.choice([1, 1000, 65507, 65536, 10**6])
                await stream.write(data[:size])
                data = data[size:]
                if rng.random() < 0.2:
                    await trio.sleep(rng.random())
            await stream.close_write()

        async def echo(stream: YamuxStream) -> None:
            try:
                while True:
                    data = await stream.read(rng.choice([1000, 65536, 10**6, None]))
                    assert window_of(stream) in (INITIAL_WINDOW, windows.window)
                    if rng.random() < 0.2:
                        await trio.sleep(rng.random())
                    await stream.write(data)
            except MuxedStreamEOF:
                await stream.close()

        async def ask(side: Muxed, number: int) -> None:
            stream = await side.muxer.open_stream()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(write, stream, number, payloads[number])
                answer = await read_all(stream, rng.choice([1000, 65536, None]))
            received[answer[:1]] = answer[1:]

        async def serve(side: Muxed, nursery: trio.Nursery) -> None:
            while True:
                nursery.start_soon(echo, await side.muxer.accept_stream())

        with trio.fail_after(10_000):
            async with trio.open_nursery() as serving:
                serving.start_soon(serve, one, serving)
                serving.start_soon(serve, other, serving)
                async with trio.open_nursery() as asking:
                    for number in payloads:
                        asking.start_soon(ask, (one, other)[number % 2], number)
                await settle()
                assert one.muxer.open_streams == other.muxer.open_streams == 0
                serving.cancel_scope.cancel()
        assert received == {bytes([number]): data for number, data in payloads.items()}
        assert one.faults == other.faults == []


async def test_a_writer_waits_for_a_slow_reader_as_long_as_it_takes(autojump_clock: trio.testing.MockClock) -> None:
    async with muxers() as (one, other):
        near, far = await stream_pair(one, other)
        payload = random.Random(1).randbytes(3_000_000)

        async def write() -> None:
            await near.write(payload)
            await near.close_write()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            await settle()
            assert len(far._received) == INITIAL_WINDOW, "no more than the window, read or not"
            await trio.sleep(3600)
            got = bytearray()
            while len(got) < len(payload):
                got += await far.read(100_000)
                await settle()
                assert len(far._received) <= 2**20
                await trio.sleep(60)
            assert got == payload
            assert await read_all(far) == b""


async def test_a_window_grows_only_where_it_is_read_from(autojump_clock: trio.testing.MockClock) -> None:
    async with muxers() as (one, other):
        near, far = await stream_pair(one, other)
        assert near.allowance == INITIAL_WINDOW
        await near.write(bytes(INITIAL_WINDOW // 2 - 1))
        await settle()
        await far.read()
        await settle()
        assert near.allowance == INITIAL_WINDOW // 2 + 1, "no update before half of the window"
        await near.write(b"x")
        await settle()
        await far.read()
        await settle()
        assert near.allowance == 2**20


async def test_a_stream_that_is_not_read_holds_up_no_other(autojump_clock: trio.testing.MockClock) -> None:
    async with muxers() as (one, other):
        stuck, _ = await stream_pair(one, other)
        near, far = await stream_pair(one, other)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stuck.write, bytes(10**6))
            await settle()
            for number in range(20):
                await near.write(b"%d" % number)
                assert await far.read() == b"%d" % number
            nursery.cancel_scope.cancel()


async def test_streams_take_turns(autojump_clock: trio.testing.MockClock) -> None:
    muxer = muxed(pipe()[0]).muxer  # not started: the test writes in its place
    bulk, small = await muxer.open_stream(), await muxer.open_stream()
    bulk.allow(10**8)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bulk.write, bytes(10**7))
        await settle()
        sizes = []
        await small.write(b"x")
        for _ in range(5):
            batch = muxer._next_batch()
            sizes.append(sum(map(len, batch)))
            assert (b"x" in batch) == (len(sizes) == 1), "the small one goes out with the first write"
        assert max(sizes) < 400_000
        nursery.cancel_scope.cancel()


async def test_half_closing(autojump_clock: trio.testing.MockClock) -> None:
    async with muxers() as (one, other):
        near, far = await stream_pair(one, other)
        await near.write(b"question")
        await near.close_write()
        assert await read_all(far) == b"question"
        with pytest.raises(MuxedStreamClosed):
            await near.write(b"more")
        await far.write(b"answer")
        await far.close_write()
        assert await read_all(near) == b"answer"
        with pytest.raises(MuxedStreamEOF):
            await near.read()
        await settle()
        assert one.muxer.open_streams == other.muxer.open_streams == 0


async def test_closing_waits_for_what_is_unsent(autojump_clock: trio.testing.MockClock) -> None:
    async with muxers() as (one, other):
        near, far = await stream_pair(one, other)
        near.allowance = 10
        await near.write(b"x" * UNSENT)
        await near.close_write()
        near.allow(10**6)
        assert await read_all(far) == b"x" * UNSENT


async def test_a_reset_ends_both_ways_and_drops_what_was_unread(autojump_clock: trio.testing.MockClock) -> None:
    async with muxers() as (one, other):
        near, far = await stream_pair(one, other)
        await near.write(b"unread")
        await settle()
        await near.reset()
        await settle()
        for stream in (near, far):
            with pytest.raises(MuxedStreamReset):
                await stream.read()
            with pytest.raises(MuxedStreamReset):
                await stream.write(b"x")
        assert one.muxer.open_streams == other.muxer.open_streams == 0


async def test_what_came_before_the_end_survives_a_reset(autojump_clock: trio.testing.MockClock) -> None:
    async with muxers() as (one, other):
        near, far = await stream_pair(one, other)
        await near.write(b"answer")
        await near.close_write()
        await settle()
        await near.reset()
        await settle()
        assert await read_all(far) == b"answer"
        with pytest.raises(MuxedStreamReset):
            await far.write(b"x")


async def test_a_reset_wakes_readers_and_writers(autojump_clock: trio.testing.MockClock) -> None:
    async with muxers() as (one, other):
        near, far = await stream_pair(one, other)
        woken = []

        async def fail(operation: object) -> None:
            with pytest.raises(MuxedStreamReset):
                await operation  # type: ignore[misc]
            woken.append(operation)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail, near.write(bytes(10**6)))
            nursery.start_soon(fail, near.read())
            await settle()
            await far.reset()
        assert len(woken) == 2


async def test_the_answer_to_one_who_goes_on_talking_arrives(autojump_clock: trio.testing.MockClock) -> None:
    """Closing early answers first, and then stops the peer."""
    async with muxers() as (one, other):
        near, far = await stream_pair(one, other)
        async with trio.open_nursery() as nursery:

            async def talk() -> None:
                with pytest.raises(MuxedStreamReset):
                    await near.write(bytes(10**6))

            nursery.start_soon(talk)
            await far.read(10)
            await far.write(b"enough")
            await far.close()
            assert await read_all(near) == b"enough"
        await settle()
        assert one.muxer.open_streams == other.muxer.open_streams == 0


async def test_a_closed_stream_that_the_peer_forgets_is_released_in_the_end(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with muxers() as (one, other):
        near, far = await stream_pair(one, other)
        await near.close()
        with pytest.raises(MuxedStreamClosed):
            await near.read()
        await trio.sleep(10)
        assert one.muxer.open_streams == 1
        await trio.sleep(100)
        assert one.muxer.open_streams == other.muxer.open_streams == 0
        with pytest.raises(MuxedStreamReset):
            await far.write(b"x")


@pytest.mark.parametrize("after", [0, 1, 5, 20])
async def test_a_write_cut_by_cancellation_resets_its_stream_and_nothing_else(
    autojump_clock: trio.testing.MockClock, after: int
) -> None:
    async with muxers(capacity=0) as (one, other):
        near, far = await stream_pair(one, other)
        witness, mirror = await stream_pair(one, other)
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(near.write, bytes(10**6))
                for _ in range(after):
                    await trio.lowlevel.checkpoint()
                scope.cancel()
        with pytest.raises(MuxedStreamReset):
            await read_all(far)
        with pytest.raises(MuxedStreamReset):
            await near.write(b"x")
        await witness.write(b"fine")
        assert await mirror.read() == b"fine"
        assert other.faults == []


async def test_a_read_cut_by_cancellation_takes_nothing(autojump_clock: trio.testing.MockClock) -> None:
    async with muxers() as (one, other):
        near, far = await stream_pair(one, other)
        with trio.move_on_after(1):
            await far.read()
        await near.write(b"late")
        assert await far.read() == b"late"


async def test_writes_of_several_tasks_do_not_mix(autojump_clock: trio.testing.MockClock) -> None:
    async with muxers() as (one, other):
        near, far = await stream_pair(one, other)
        async with trio.open_nursery() as nursery:
            for fill in range(5):
                nursery.start_soon(near.write, bytes([fill]) * 200_000)
            got = bytearray()
            while len(got) < 10**6:
                got += await far.read()
        assert all(len(set(got[start : start + 200_000])) == 1 for start in range(0, 10**6, 200_000))


async def test_a_thousand_streams_at_once(autojump_clock: trio.testing.MockClock) -> None:
    async with muxers() as (one, other):

        async def echo(stream: YamuxStream) -> None:
            await stream.write(await read_all(stream))
            await stream.close()

        async def serve(nursery: trio.Nursery) -> None:
            while True:
                nursery.start_soon(echo, await other.muxer.accept_stream())

        async def ask(number: int) -> None:
            stream = await one.muxer.open_stream()
            await stream.write(b"%d" % number)
            await stream.close_write()
            assert await read_all(stream) == b"%d" % number

        async with trio.open_nursery() as serving:
            serving.start_soon(serve, serving)
            async with trio.open_nursery() as asking:
                for number in range(1000):
                    asking.start_soon(ask, number)
            serving.cancel_scope.cancel()
        assert one.muxer.open_streams == other.muxer.open_streams == 0


async def test_too_many_streams_fail_at_once_here_and_are_reset_there(autojump_clock: trio.testing.MockClock) -> None:
    async with muxers(settings=YamuxSettings(streams=4)) as (one, other):
        streams = [await one.muxer.open_stream() for _ in range(4)]
        with pytest.raises(MuxedStreamError, match="open already"):
            await one.muxer.open_stream()
        await settle()
        with pytest.raises(MuxedStreamError, match="open already"):
            await other.muxer.open_stream()
        one.muxer._settings = YamuxSettings(streams=100)
        refused = await one.muxer.open_stream()
        with pytest.raises(MuxedStreamReset):
            await refused.read()
        assert other.muxer.open_streams == 4
        await streams[0].reset()
        for _ in range(3):  # those that were reset before anybody took them are skipped
            assert not (await other.muxer.accept_stream()).is_broken
        await one.muxer.open_stream()
        await other.muxer.accept_stream()


async def test_closing_delivers_what_was_written(autojump_clock: trio.testing.MockClock) -> None:
    async with muxers() as (one, other):
        near, far = await stream_pair(one, other)
        await near.write(b"last words")
        await one.muxer.close()
        assert await far.read() == b"last words"
        for stream in (near, far):
            with pytest.raises(MuxedStreamReset):
                await stream.read()
        for muxer in (one.muxer, other.muxer):
            with pytest.raises(MuxedConnUnavailable):
                await muxer.accept_stream()
            with pytest.raises(MuxedConnUnavailable):
                await muxer.open_stream()
            assert muxer.is_closed


async def test_closing_is_not_held_up_by_a_peer_that_does_not_read(autojump_clock: trio.testing.MockClock) -> None:
    async with muxers(capacity=0) as (one, other):
        _near, far = await stream_pair(one, other)
        one.end._receive = other.end._receive  # nobody reads what the other writes, from here on
        far.allowance = 10**9
        async with trio.open_nursery() as nursery:

            async def write() -> None:
                with pytest.raises(MuxedStreamReset):
                    await far.write(bytes(10**7))

            nursery.start_soon(write)
            await settle()
            with trio.fail_after(3):
                await other.muxer.close()


async def test_a_peer_that_vanished_is_noticed(autojump_clock: trio.testing.MockClock) -> None:
    async with muxers() as (one, other):
        near, _ = await stream_pair(one, other)
        other.end.swallow = True
        begun = trio.current_time()
        with pytest.raises(MuxedStreamReset):
            await near.read()
        assert trio.current_time() - begun <= (SILENT_PULSES + 1) * YamuxSettings().pulse
        assert one.faults == []


async def test_a_quiet_connection_lives_on(autojump_clock: trio.testing.MockClock) -> None:
    async with muxers() as (one, other):
        near, far = await stream_pair(one, other)
        await trio.sleep(3600)
        await near.write(b"still here")
        assert await far.read() == b"still here"


async def test_a_fault_of_ours_ends_the_connection_and_nothing_else(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with muxers() as (one, other):
        near, _ = await stream_pair(one, other)
        one.muxer._next_batch = lambda: 1 / 0  # type: ignore[method-assign,assignment,return-value]
        await near.write(b"x")
        with pytest.raises(MuxedStreamReset):
            await near.read()
        assert "ZeroDivisionError" in caplog.text
        assert one.faults == []
