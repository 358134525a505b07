"""Channels over both networks; what takes seconds, on the virtual clock in memory."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any

import pytest
import trio
import trio.testing

from blyan_node.codec import Size
from blyan_node.errors import ChannelClosed, Unreachable
from blyan_node.p2p.channel import INBOX_FRAMES, PULSE, QUEUED_FRAMES, SILENT_PULSES, Channels
from blyan_node.p2p.framing import frame
from blyan_node.p2p.guard import VIOLATION
from blyan_node.p2p.memory import MemoryHub
from blyan_node.p2p.transport import Network, PeerId
from tests.support.network import KINDS, Kind, eventually, network_group

PROTOCOL = "/test/channel/1"
LARGEST = 1024 * 1024


@dataclass(frozen=True)
class Number:
    value: int


@dataclass(frozen=True)
class Blob:
    data: Annotated[bytes, Size(LARGEST)]


@dataclass
class End:
    """One node's end: its channels and what it saw."""

    network: Network
    channels: Channels = field(init=False)
    received: list[tuple[PeerId, Any]] = field(default_factory=list)
    lost: list[PeerId] = field(default_factory=list)
    gate: trio.Event = field(default_factory=trio.Event)

    def __post_init__(self) -> None:
        self.gate.set()
        self.channels = Channels(
            self.network,
            PROTOCOL,
            (Number, Blob),
            largest=LARGEST,
            on_message=self.take,
            on_lost=self.lost.append,
        )

    async def take(self, peer: PeerId, message: Any) -> None:
        await self.gate.wait()
        self.received.append((peer, message))

    @property
    def numbers(self) -> list[int]:
        return [message.value for _, message in self.received if isinstance(message, Number)]


@asynccontextmanager
async def ends(count: int, kind: Kind = "memory", hub: MemoryHub | None = None) -> AsyncIterator[list[End]]:
    async with network_group(count, kind, hub=hub) as group, trio.open_nursery() as nursery:
        made = [End(network) for network in group]
        for end in made:
            await nursery.start(end.channels.run)
        yield made
        nursery.cancel_scope.cancel()


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param


async def test_messages_arrive_in_order_both_ways(kind: Kind) -> None:
    async with ends(2, kind) as (alice, bob):
        for number in range(500):
            await alice.channels.send(bob.network.peer_id, Number(number))
            await bob.channels.send(alice.network.peer_id, Number(1000 + number))
        await eventually(lambda: len(bob.received) == len(alice.received) == 500)
        assert bob.numbers == list(range(500))
        assert alice.numbers == list(range(1000, 1500))
        assert bob.received[0][0] == alice.network.peer_id


async def test_large_messages_and_many_senders(kind: Kind) -> None:
    async with ends(2, kind) as (alice, bob):

        async def send(fill: int) -> None:
            for _ in range(4):
                await alice.channels.send(bob.network.peer_id, Blob(bytes([fill]) * (LARGEST - 100)))

        async with trio.open_nursery() as nursery:
            for fill in range(4):
                nursery.start_soon(send, fill)
        await eventually(lambda: len(bob.received) == 16, within=20)
        assert {message.data[:1] * (LARGEST - 100) == message.data for _, message in bob.received} == {True}
        with pytest.raises(ValueError, match="allows"):
            await alice.channels.send(bob.network.peer_id, Blob(bytes(LARGEST)))


async def test_round_trip_is_measured(kind: Kind) -> None:
    async with ends(2, kind, MemoryHub(latency=0.05)) as (alice, bob):
        assert alice.channels.round_trip(bob.network.peer_id) is None
        await alice.channels.send(bob.network.peer_id, Number(1))
        await eventually(lambda: alice.channels.round_trip(bob.network.peer_id) is not None)
        measured = alice.channels.round_trip(bob.network.peer_id)
        assert measured is not None
        assert (0.1 if kind == "memory" else 0) <= measured < 1


async def test_a_stranger_is_unreachable(kind: Kind) -> None:
    async with ends(2, kind) as (alice, bob):
        await alice.network.disconnect(bob.network.peer_id)
        with pytest.raises(Unreachable):
            await alice.channels.send(bob.network.peer_id, Number(1))
        assert alice.lost == []


async def test_losing_the_connection_is_told_once_at_each_end_and_a_new_channel_can_follow(kind: Kind) -> None:
    async with ends(2, kind) as (alice, bob):
        await alice.channels.send(bob.network.peer_id, Number(1))
        await eventually(lambda: bob.numbers == [1])
        await bob.network.disconnect(alice.network.peer_id)
        await eventually(lambda: alice.lost == [bob.network.peer_id] and bob.lost == [alice.network.peer_id])
        await eventually(lambda: not alice.network.neighbours())
        await alice.network.connect(bob.network.addresses()[0])
        await alice.channels.send(bob.network.peer_id, Number(2))
        await eventually(lambda: bob.numbers == [1, 2])
        assert len(alice.lost) == len(bob.lost) == 1


@pytest.mark.parametrize(
    "garbage",
    [
        (LARGEST + 2).to_bytes(4, "big"),
        frame(b""),
        frame(b"\x07", b"\x90"),
        frame(b"\xff", b"123"),
        frame(b"\x00", b"\xc1"),
        frame(b"\x00", b"\x92\x01\x02"),
        b"\xff" * 64,
    ],
    ids=["oversized", "empty", "unknown type", "bad ping", "not msgpack", "too many fields", "junk"],
)
async def test_garbage_resets_the_channel_and_counts(kind: Kind, garbage: bytes) -> None:
    async with ends(2, kind) as (alice, bob):
        counted: list[int] = []
        bob.network.penalise = lambda _peer, points, _why: counted.append(points)  # type: ignore[method-assign]
        stream = await alice.network.open_stream(bob.network.peer_id, PROTOCOL)
        await stream.send_all(frame(b"\x00", b"\x91\x05") + garbage)
        await eventually(lambda: bob.lost == [alice.network.peer_id])
        with trio.fail_after(5), contextlib.suppress(ChannelClosed):
            while await stream.receive_some(100):
                pass
        await alice.channels.send(bob.network.peer_id, Number(6))
        await eventually(lambda: 6 in bob.numbers)
        assert sum(counted) == VIOLATION


async def test_a_second_channel_takes_the_place_of_the_first(kind: Kind) -> None:
    async with ends(2, kind) as (alice, bob):
        first = await alice.network.open_stream(bob.network.peer_id, PROTOCOL)
        await first.send_all(frame(b"\x00", b"\x91\x01"))
        await eventually(lambda: bob.numbers == [1])
        await alice.channels.send(bob.network.peer_id, Number(2))
        await eventually(lambda: bob.numbers == [1, 2] and len(bob.lost) == 1)
        assert alice.lost == []
        await first.aclose()


async def test_a_slow_handler_slows_its_sender_and_nobody_else(autojump_clock: trio.testing.MockClock) -> None:
    async with ends(3) as (alice, bob, carol):
        bob.gate = trio.Event()
        sent = 0

        async def flood() -> None:
            nonlocal sent
            for number in range(3 * (QUEUED_FRAMES + INBOX_FRAMES)):
                await alice.channels.send(bob.network.peer_id, Blob(b"%d" % number + bytes(20_000)))
                sent += 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(flood)
            await trio.sleep(60)
            stuck = sent
            assert stuck < 3 * (QUEUED_FRAMES + INBOX_FRAMES), "bounded"
            await alice.channels.send(carol.network.peer_id, Number(1))
            await trio.sleep(1)
            assert carol.numbers == [1]
            assert sent == stuck
            assert alice.lost == bob.lost == [], "slow is not lost"
            bob.gate.set()
        await trio.sleep(5)
        assert [message.data[:4].rstrip(b"\0") for _, message in bob.received] == [b"%d" % n for n in range(sent)]


async def test_a_stalled_peer_is_lost_within_seconds(autojump_clock: trio.testing.MockClock) -> None:
    hub = MemoryHub(latency=0.01)
    async with ends(3, hub=hub) as (alice, bob, carol):
        await alice.channels.send(bob.network.peer_id, Number(1))
        await bob.channels.send(carol.network.peer_id, Number(1))
        await alice.channels.send(carol.network.peer_id, Number(1))
        await trio.sleep(10)
        assert alice.lost == bob.lost == carol.lost == []
        hub.stall(bob.network.peer_id)
        await trio.sleep(PULSE * (SILENT_PULSES + 1) + 0.1)
        assert alice.lost == [bob.network.peer_id], "we opened it"
        assert carol.lost == [bob.network.peer_id], "the peer opened it"
        await alice.channels.send(carol.network.peer_id, Number(2))
        await trio.sleep(1)
        assert carol.numbers == [1, 1, 2]


async def test_senders_that_wait_are_told_of_the_loss(autojump_clock: trio.testing.MockClock) -> None:
    hub = MemoryHub()
    async with ends(2, hub=hub) as (alice, bob):
        bob.gate = trio.Event()
        failures: list[Exception] = []

        async def flood() -> None:
            try:
                while True:
                    await alice.channels.send(bob.network.peer_id, Blob(bytes(100_000)))
            except (ChannelClosed, Unreachable) as error:
                failures.append(error)

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(flood)
            await trio.sleep(1)
            hub.kill(bob.network.peer_id)
        assert len(failures) == 3


async def test_cancelled_sends_do_no_harm(autojump_clock: trio.testing.MockClock) -> None:
    async with ends(2) as (alice, bob):
        bob.gate = trio.Event()
        for number in range(QUEUED_FRAMES * 3):
            with trio.move_on_after(0.01):
                await alice.channels.send(bob.network.peer_id, Number(number))
        bob.gate.set()
        await trio.sleep(2)
        await alice.channels.send(bob.network.peer_id, Number(9999))
        await trio.sleep(2)
        assert bob.numbers[-1] == 9999
        assert bob.numbers[:-1] == list(range(len(bob.numbers) - 1)), "a prefix, whole and in order"


async def test_closing_one_end_is_a_loss_at_the_other(kind: Kind) -> None:
    async with network_group(2, kind) as group:
        alice, bob = End(group[0]), End(group[1])
        async with trio.open_nursery() as nursery:
            await nursery.start(bob.channels.run)
            async with trio.open_nursery() as short:
                await short.start(alice.channels.run)
                await alice.channels.send(bob.network.peer_id, Number(1))
                await bob.channels.send(alice.network.peer_id, Number(1))
                await eventually(lambda: bob.numbers == alice.numbers == [1])
                short.cancel_scope.cancel()
            await eventually(lambda: len(bob.lost) == 2)
            assert alice.lost == []
            nursery.cancel_scope.cancel()
