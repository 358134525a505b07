"""A peer that speaks Yamux frame by frame, wrongly or hostilely."""

from __future__ import annotations

import random

import pytest
import trio
import trio.testing
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.stream_muxer.exceptions import MuxedStreamReset

from blyan_node.p2p.yamux import MOST_CONTROL, YamuxSettings
from blyan_node.p2p.yamux_frames import INITIAL_WINDOW, Farewell, Flag, Kind, encode
from tests.support.muxer import Hand, by_hand


async def said_goodbye(hand: Hand) -> int:
    """The reason that the victim gives before it closes the connection."""
    header, _ = await hand.until(Kind.GO_AWAY)
    with pytest.raises(ConnectionClosedError):
        await hand.next()
    return header.length


VIOLATIONS = {
    "unknown version": b"\x09" + bytes(11),
    "unknown type": encode(9, Flag.NONE, 1, 0),  # type: ignore[arg-type]
    "stream zero": encode(Kind.WINDOW, Flag.SYN, 0, 0),
    "a stream of ours": encode(Kind.WINDOW, Flag.SYN, 2, 0),
    "a stream twice": encode(Kind.WINDOW, Flag.SYN, 1, 0) * 2,
    "a window of over four gigabytes": encode(Kind.WINDOW, Flag.SYN, 1, 2**32 - 1),
    "data beyond the window": encode(Kind.DATA, Flag.SYN, 1, INITIAL_WINDOW + 1),
    "data of four gigabytes": encode(Kind.DATA, Flag.SYN, 1, 2**32 - 1),
    "data of four gigabytes for no stream": encode(Kind.DATA, Flag.NONE, 1, 2**32 - 1),
    "data after the end": encode(Kind.WINDOW, Flag.SYN | Flag.FIN, 1, 0) + encode(Kind.DATA, Flag.NONE, 1, 1) + b"x",
}


@pytest.mark.parametrize("name", VIOLATIONS)
async def test_a_violation_ends_the_connection_and_is_counted(
    autojump_clock: trio.testing.MockClock, name: str
) -> None:
    async with by_hand() as (hand, victim):
        await hand.end.write(VIOLATIONS[name])
        with trio.fail_after(1):  # at once: the length is judged before any data comes
            assert await said_goodbye(hand) == Farewell.PROTOCOL_ERROR
        assert len(victim.faults) == 1
        assert victim.muxer.is_closed


HARMLESS = {
    "data for no stream": encode(Kind.DATA, Flag.NONE, 4711, 5) + b"hello",
    "reset for no stream": encode(Kind.WINDOW, Flag.RST, 4713, 0),
    "end of no stream": encode(Kind.WINDOW, Flag.FIN, 4713, 0),
    "window for no stream": encode(Kind.WINDOW, Flag.NONE, 4713, 2**32 - 1),
    "an echo that nobody asked for": encode(Kind.PING, Flag.ACK, 0, 5),
    "flags of the future": encode(Kind.WINDOW, 0xFFF0, 4713, 5),  # type: ignore[arg-type]
    "an acknowledgement of nothing": encode(Kind.WINDOW, Flag.ACK, 2, 0),
    "empty data": encode(Kind.DATA, Flag.SYN, 1, 0),
    "a stream reset as it opens": encode(Kind.WINDOW, Flag.SYN | Flag.RST, 1, 0),
}


@pytest.mark.parametrize("name", HARMLESS)
async def test_what_is_strange_but_harmless_is_borne(autojump_clock: trio.testing.MockClock, name: str) -> None:
    async with by_hand() as (hand, victim):
        await hand.end.write(HARMLESS[name])
        await hand.send(Kind.PING, Flag.SYN, 0, 77)
        header, _ = await hand.until(Kind.PING, Flag.ACK)
        assert header.length == 77
        assert victim.faults == []


@pytest.mark.parametrize("seed", range(30))
async def test_random_bytes_end_the_connection_at_worst(autojump_clock: trio.testing.MockClock, seed: int) -> None:
    rng = random.Random(seed)
    async with by_hand() as (hand, victim):
        for _ in range(30):
            # mostly headers that are nearly right, so that more than the first is looked at
            frame = encode(rng.randrange(4), rng.randrange(16), rng.randrange(8), rng.choice([0, 1, 9, 10**6]))  # type: ignore[arg-type]
            try:
                await hand.end.write(frame if rng.random() < 0.9 else rng.randbytes(40))
            except ConnectionClosedError:
                break
            await trio.testing.wait_all_tasks_blocked()
        assert victim.muxer.open_streams <= 8
        with trio.fail_after(10):
            await victim.muxer.close()


async def test_data_with_the_first_frame_is_delivered(autojump_clock: trio.testing.MockClock) -> None:
    async with by_hand() as (hand, victim):
        await hand.send(Kind.DATA, Flag.SYN | Flag.FIN, 1, 5, b"hello")
        stream = await victim.muxer.accept_stream()
        assert await stream.read() == b"hello"
        assert (await hand.until(Kind.WINDOW, Flag.ACK))[0].stream == 1


async def test_a_window_offered_with_the_first_frame_counts(autojump_clock: trio.testing.MockClock) -> None:
    async with by_hand() as (hand, victim):
        await hand.send(Kind.WINDOW, Flag.SYN, 1, 1000)
        stream = await victim.muxer.accept_stream()
        with trio.move_on_after(5):
            await stream.write(bytes(2 * INITIAL_WINDOW))
        got = 0
        while got < INITIAL_WINDOW + 1000:
            header, data = await hand.until(Kind.DATA)
            assert header.length <= 65536
            got += len(data)
        assert got == INITIAL_WINDOW + 1000
        assert (await hand.until(Kind.WINDOW, Flag.RST))[0].stream == 1


async def test_a_flood_of_pings_is_answered_while_the_answers_are_read(autojump_clock: trio.testing.MockClock) -> None:
    async with by_hand() as (hand, victim):
        for value in range(3 * MOST_CONTROL):
            await hand.send(Kind.PING, Flag.SYN, 0, value)
            assert (await hand.until(Kind.PING, Flag.ACK))[0].length == value
        assert victim.faults == []


async def test_a_flood_of_pings_by_one_who_does_not_read_ends(autojump_clock: trio.testing.MockClock) -> None:
    async with by_hand() as (hand, victim):

        async def stuck(_data: bytes) -> None:
            await trio.sleep_forever()

        victim.end.write = stuck  # type: ignore[method-assign]
        with trio.fail_after(5):
            for value in range(2 * MOST_CONTROL):
                await hand.send(Kind.PING, Flag.SYN, 0, value)
            while not victim.muxer.is_closed:
                await trio.sleep(0.1)
        assert len(victim.muxer._control) <= MOST_CONTROL + 1
        assert victim.faults == [f"connection with {victim.muxer.peer_id}: the peer provokes more frames than it reads"]


async def test_opening_and_resetting_without_end_piles_up_nothing(autojump_clock: trio.testing.MockClock) -> None:
    async with by_hand(YamuxSettings(streams=8)) as (hand, victim):
        for number in range(1, 4001, 2):
            await hand.send(Kind.WINDOW, Flag.SYN, number, 0)
            await hand.send(Kind.WINDOW, Flag.RST, number, 0)
            await trio.testing.wait_all_tasks_blocked()
        assert victim.muxer.open_streams == 0
        assert len(victim.muxer._accepted) <= 8


async def test_small_pieces_do_not_cost_more_than_large_ones(autojump_clock: trio.testing.MockClock) -> None:
    async with by_hand() as (hand, victim):
        await hand.send(Kind.WINDOW, Flag.SYN, 1, 0)
        stream = await victim.muxer.accept_stream()
        await hand.end.write((encode(Kind.DATA, Flag.NONE, 1, 1) + b"x") * 5000)
        await trio.testing.wait_all_tasks_blocked()
        assert isinstance(stream._received, bytearray)
        assert stream._received == b"x" * 5000


async def test_going_away_lets_open_streams_end(autojump_clock: trio.testing.MockClock) -> None:
    async with by_hand() as (hand, victim):
        await hand.send(Kind.WINDOW, Flag.SYN, 1, 0)
        stream = await victim.muxer.accept_stream()
        await hand.send(Kind.GO_AWAY, Flag.NONE, 0, Farewell.NORMAL)
        await hand.send(Kind.WINDOW, Flag.SYN, 3, 0)
        assert (await hand.until(Kind.WINDOW, Flag.RST))[0].stream == 3
        await stream.write(b"the rest")
        await stream.close_write()
        assert (await hand.until(Kind.DATA))[1] == b"the rest"
        await hand.send(Kind.WINDOW, Flag.FIN, 1, 0)
        assert await said_goodbye(hand) == Farewell.NORMAL
        assert victim.faults == []


async def test_one_who_goes_away_but_stays_is_left(autojump_clock: trio.testing.MockClock) -> None:
    async with by_hand() as (hand, victim):
        await hand.send(Kind.WINDOW, Flag.SYN, 1, 0)
        stream = await victim.muxer.accept_stream()
        await hand.send(Kind.GO_AWAY, Flag.NONE, 0, Farewell.NORMAL)

        async def babble() -> None:
            while True:
                await hand.send(Kind.PING, Flag.SYN, 0, 1)
                await trio.sleep(1)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(babble)
            with trio.fail_after(100), pytest.raises(MuxedStreamReset):
                await stream.read()
            nursery.cancel_scope.cancel()
