"""What every implementation of the network seam does."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import pytest
import trio
import trio.testing

from blyan_node.errors import AlreadyRunning, ChannelClosed, ConfigError, ProtocolViolation, Unreachable
from blyan_node.p2p.guard import LIMIT
from blyan_node.p2p.transport import MAX_GOSSIP, Gossip, Network, PeerChange, PeerId, Stream
from tests.support.network import KINDS, Ground, Kind, eventually, meet, network_group, peer_number

ECHO = "/test/echo/1"


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param


@pytest.fixture
async def pair(kind: Kind) -> AsyncIterator[tuple[Network, Network]]:
    async with network_group(2, kind) as (alice, bob):
        yield alice, bob


async def echo(stream: Stream) -> None:
    while data := await stream.receive_some(65536):
        await stream.send_all(data)


async def read_all(stream: Stream) -> bytes:
    parts = []
    while data := await stream.receive_some(65536):
        parts.append(data)
    return b"".join(parts)


def anything(_origin: PeerId, _data: bytes) -> bool:
    return True


async def test_addresses_name_the_peer(pair: tuple[Network, Network]) -> None:
    alice, bob = pair
    assert alice.addresses()[0].endswith(f"/p2p/{alice.peer_id}")
    assert alice.neighbours() == {bob.peer_id}
    assert bob.neighbours() == {alice.peer_id}


async def test_connecting_twice_does_nothing(pair: tuple[Network, Network]) -> None:
    alice, bob = pair
    assert await alice.connect(bob.addresses()[0]) == bob.peer_id


async def test_bytes_go_both_ways_and_end(pair: tuple[Network, Network]) -> None:
    alice, bob = pair
    bob.set_handler(ECHO, echo)
    stream = await alice.open_stream(bob.peer_id, ECHO)
    assert stream.peer == bob.peer_id
    payload = bytes(range(256)) * 4096  # 1 MiB: more than any window
    received = b""

    async def receive() -> None:
        nonlocal received
        received = await read_all(stream)

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            await stream.send_all(payload)
            await stream.close_write()
    assert received == payload
    await stream.aclose()


async def test_handler_knows_the_peer(pair: tuple[Network, Network]) -> None:
    alice, bob = pair

    async def name(stream: Stream) -> None:
        await stream.send_all(stream.peer.encode())

    bob.set_handler(ECHO, name)
    stream = await alice.open_stream(bob.peer_id, ECHO)
    assert await read_all(stream) == alice.peer_id.encode()


async def test_unserved_protocol_is_unreachable(pair: tuple[Network, Network]) -> None:
    alice, bob = pair
    with pytest.raises(Unreachable):
        await alice.open_stream(bob.peer_id, "/test/nobody/1")


async def test_stream_to_a_stranger_is_unreachable(kind: Kind) -> None:
    async with network_group(2, kind, shape="none") as (alice, bob):
        with pytest.raises(Unreachable, match="not connected"):
            await alice.open_stream(bob.peer_id, ECHO)


@pytest.mark.parametrize(
    "address",
    ["", "nonsense", "/ip4/127.0.0.1/tcp/1", "/ip4/1.2.3/tcp/1/p2p/x", "/ip4/127.0.0.1/tcp/1/p2p/QmNobody", "/" * 9999],
)
async def test_malformed_address_is_a_configuration_error(kind: Kind, address: str) -> None:
    async with Ground(kind).open(0) as alice:
        with pytest.raises(ConfigError):
            await alice.connect(address)


async def test_nobody_there_is_unreachable_and_can_be_tried_again(kind: Kind) -> None:
    ground = Ground(kind)
    async with ground.open(0) as alice:
        async with ground.open(1) as bob:
            address = bob.addresses()[0]
        with pytest.raises(Unreachable):
            await alice.connect(address)
        async with ground.open(1, listen=address.rsplit("/p2p/", 1)[0]) as bob:
            assert await alice.connect(address) == bob.peer_id


async def test_somebody_else_there_is_unreachable(kind: Kind) -> None:
    ground = Ground(kind)
    async with ground.open(0) as alice, ground.open(1) as bob, ground.open(2) as carol:
        where = bob.addresses()[0].rsplit("/p2p/", 1)[0]
        with pytest.raises(Unreachable):
            await alice.connect(f"{where}/p2p/{carol.peer_id}")
        assert alice.neighbours() == frozenset()


async def test_own_address_is_unreachable(kind: Kind) -> None:
    async with Ground(kind).open(0) as alice:
        with pytest.raises(Unreachable, match="itself"):
            await alice.connect(alice.addresses()[0])


async def test_port_in_use(kind: Kind) -> None:
    ground = Ground(kind)
    async with ground.open(0) as alice:
        with pytest.raises(AlreadyRunning):
            async with ground.open(1, listen=alice.addresses()[0].rsplit("/p2p/", 1)[0]):
                pass


async def test_failing_handlers_reset_their_stream_and_nothing_else(
    pair: tuple[Network, Network], caplog: pytest.LogCaptureFixture
) -> None:
    alice, bob = pair

    async def buggy(_stream: Stream) -> None:
        raise ZeroDivisionError("a bug of ours")

    async def accusing(_stream: Stream) -> None:
        raise ProtocolViolation("nonsense")

    bob.set_handler("/test/bug/1", buggy)
    bob.set_handler("/test/accuse/1", accusing)
    bob.set_handler(ECHO, echo)
    for protocol in ("/test/bug/1", "/test/accuse/1"):
        # the reset may overtake the answer that the protocol is served
        with pytest.raises((ChannelClosed, Unreachable)):
            await read_all(await alice.open_stream(bob.peer_id, protocol))
    stream = await alice.open_stream(bob.peer_id, ECHO)
    await stream.send_all(b"still here")
    assert await stream.receive_some(64) == b"still here"
    assert "a bug of ours" in caplog.text
    assert "Traceback" in caplog.text


async def test_faults_add_up_to_refusal(pair: tuple[Network, Network]) -> None:
    alice, bob = pair
    bob.penalise(alice.peer_id, LIMIT - 1, "almost")
    assert alice.peer_id in bob.neighbours()
    bob.penalise(alice.peer_id, 2, "the last straw")
    await eventually(lambda: not bob.neighbours() and not alice.neighbours())
    with pytest.raises(Unreachable, match="refused"):
        await bob.connect(alice.addresses()[0])
    with contextlib.suppress(Unreachable):  # or else it is disconnected as soon as bob has seen who it is
        await alice.connect(bob.addresses()[0])
    await eventually(lambda: not alice.neighbours() and not bob.neighbours())


async def test_a_blocked_peer_loses_its_connection_and_gets_none(kind: Kind) -> None:
    async with network_group(3, kind) as (alice, bob, carol):
        async with (
            alice.subscribe("blocks", anything, capacity=8),
            bob.subscribe("blocks", anything, capacity=8) as at_bob,
            carol.subscribe("blocks", anything, capacity=8) as at_carol,
        ):
            alice.block(frozenset({bob.peer_id}))
            await eventually(lambda: alice.neighbours() == {carol.peer_id} and bob.neighbours() == {carol.peer_id})
            with pytest.raises(Unreachable, match="blocked"):
                await alice.connect(bob.addresses()[0])
            with contextlib.suppress(Unreachable):  # or else it is disconnected as soon as alice has seen who it is
                await bob.connect(alice.addresses()[0])
            await eventually(lambda: alice.neighbours() == {carol.peer_id} and bob.neighbours() == {carol.peer_id})
            with pytest.raises(Unreachable):
                await alice.open_stream(bob.peer_id, ECHO)

            alice.block(frozenset({bob.peer_id, carol.peer_id}))
            await eventually(lambda: not alice.neighbours() and alice.peer_id not in carol.neighbours())
            await alice.publish("blocks", b"unheard")
            await bob.publish("blocks", b"heard")
            with trio.fail_after(10):
                assert (await at_carol.receive()).data == b"heard"
            with pytest.raises(trio.WouldBlock):
                at_bob.receive_nowait()


async def test_exactly_those_are_blocked_who_were_named_last(pair: tuple[Network, Network]) -> None:
    alice, bob = pair
    alice.block(frozenset({bob.peer_id}))
    await eventually(lambda: not alice.neighbours() and not bob.neighbours())
    alice.block(frozenset({peer_number(7)}))
    await meet(alice, bob)
    alice.block(frozenset({bob.peer_id}))
    await eventually(lambda: not alice.neighbours() and not bob.neighbours())
    alice.block(frozenset())
    await meet(bob, alice)
    async with (
        alice.subscribe("blocks", anything, capacity=8),
        bob.subscribe("blocks", anything, capacity=8) as queue,
    ):
        with trio.fail_after(10):
            await alice.publish("blocks", b"again")
            assert (await queue.receive()).data == b"again"


@pytest.mark.parametrize("who", [0, 1])
async def test_streams_break_when_the_connection_goes(pair: tuple[Network, Network], who: int) -> None:
    alice, bob = pair
    bob.set_handler(ECHO, echo)
    stream = await alice.open_stream(bob.peer_id, ECHO)
    broken = trio.Event()

    async def receive() -> None:
        with pytest.raises(ChannelClosed):
            await stream.receive_some(1)
        broken.set()

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            await trio.testing.wait_all_tasks_blocked()
            await pair[who].disconnect(pair[1 - who].peer_id)
            await broken.wait()
    await eventually(lambda: not alice.neighbours() and not bob.neighbours())


async def test_watchers_see_neighbours_come_and_go(kind: Kind) -> None:
    async with network_group(3, kind, shape="none") as (alice, bob, carol):
        await meet(alice, bob)
        async with alice.watch_peers() as changes:
            with trio.fail_after(10):
                assert await changes.receive() == PeerChange(bob.peer_id, True)
                await carol.connect(alice.addresses()[0])
                assert await changes.receive() == PeerChange(carol.peer_id, True)
                await bob.disconnect(alice.peer_id)
                assert await changes.receive() == PeerChange(bob.peer_id, False)


async def test_gossip_names_its_origin_and_is_not_delivered_at_home(kind: Kind) -> None:
    async with network_group(3, kind, shape="line") as (alice, bob, carol):
        async with (
            alice.subscribe("blocks", anything, capacity=8) as home,
            bob.subscribe("blocks", anything, capacity=8),
            carol.subscribe("blocks", anything, capacity=8) as away,
        ):
            with trio.fail_after(10):
                await alice.publish("blocks", b"news")
                assert await away.receive() == Gossip(alice.peer_id, b"news")
            with pytest.raises(trio.WouldBlock):
                home.receive_nowait()


async def test_wrong_gossip_is_neither_delivered_nor_passed_on(kind: Kind) -> None:
    def good(_origin: PeerId, data: bytes) -> bool:
        return data.startswith(b"good")

    async with network_group(3, kind, shape="line") as (alice, bob, carol):
        async with (
            alice.subscribe("blocks", anything, capacity=8),
            bob.subscribe("blocks", good, capacity=8) as middle,
            carol.subscribe("blocks", anything, capacity=8) as away,
        ):
            with trio.fail_after(10):
                await alice.publish("blocks", b"good 1")
                assert (await away.receive()).data == b"good 1"
                await alice.publish("blocks", b"bad")
                await alice.publish("blocks", b"good 2")
                assert (await away.receive()).data == b"good 2"
                assert [(await middle.receive()).data for _ in range(2)] == [b"good 1", b"good 2"]


async def test_a_full_subscription_drops_the_newest(pair: tuple[Network, Network]) -> None:
    alice, bob = pair
    judged: list[bytes] = []

    def remember(_origin: PeerId, data: bytes) -> bool:
        judged.append(data)
        return True

    async with (
        alice.subscribe("blocks", anything, capacity=1),
        bob.subscribe("blocks", remember, capacity=2) as queue,
    ):
        for number in range(5):
            await alice.publish("blocks", b"%d" % number)
        await eventually(lambda: len(judged) == 5)
        assert [queue.receive_nowait().data for _ in range(2)] == judged[:2]
        with pytest.raises(trio.WouldBlock):
            queue.receive_nowait()


async def test_gossip_has_a_largest_size(pair: tuple[Network, Network]) -> None:
    alice, bob = pair
    async with alice.subscribe("blocks", anything, capacity=1), bob.subscribe("blocks", anything, capacity=1) as queue:
        with pytest.raises(ValueError, match="at most"):
            await alice.publish("blocks", bytes(MAX_GOSSIP + 1))
        await alice.publish("blocks", bytes(MAX_GOSSIP))
        with trio.fail_after(10):
            assert len((await queue.receive()).data) == MAX_GOSSIP


async def test_a_topic_is_subscribed_to_once(kind: Kind) -> None:
    async with Ground(kind).open(0) as alice:
        async with alice.subscribe("blocks", anything, capacity=1):
            with pytest.raises(ValueError, match="already"):
                async with alice.subscribe("blocks", anything, capacity=1):
                    pass
        async with alice.subscribe("blocks", anything, capacity=1):
            pass


async def test_cancelling_a_group_leaves_nothing_behind(kind: Kind) -> None:
    with trio.move_on_after(0.3) as scope:
        async with network_group(2, kind):
            await trio.sleep_forever()
    assert scope.cancelled_caught


async def test_errors_come_out_of_the_context_as_they_are(kind: Kind) -> None:
    with pytest.raises(ConfigError, match="mine"):
        async with Ground(kind).open(0):
            raise ConfigError("mine")
