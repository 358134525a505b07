"""Gossip among real hosts."""

from __future__ import annotations

from contextlib import AsyncExitStack

import pytest
import trio

from blyan_node.p2p.transport import Network, PeerId
from tests.support.network import Ground, Shape, eventually, meet, network_group

TOPIC = "/test/blocks"


def anything(_origin: PeerId, _data: bytes) -> bool:
    return True


class Listeners:
    """Subscribes each of some networks, and remembers what each heard."""

    def __init__(self, networks: list[Network]) -> None:
        self._networks = networks
        self.heard: list[list[bytes]] = [[] for _ in networks]

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with AsyncExitStack() as stack, trio.open_nursery() as nursery:
            for network, heard in zip(self._networks, self.heard, strict=True):
                queue = await stack.enter_async_context(network.subscribe(TOPIC, anything, capacity=4096))
                nursery.start_soon(self._listen, queue, heard)
            task_status.started()

    async def _listen(self, queue: trio.MemoryReceiveChannel, heard: list[bytes]) -> None:
        async for message in queue:
            heard.append(message.data)  # noqa: PERF401 as they come, not at the end


@pytest.mark.parametrize(("count", "shape", "each"), [(4, "full", 60), (4, "line", 60), (9, "star", 12)])
async def test_everything_reaches_everybody_once(count: int, shape: Shape, each: int) -> None:
    async with network_group(count, "libp2p", shape=shape) as group, trio.open_nursery() as nursery:
        listeners = Listeners(group)
        await nursery.start(listeners.run)

        async def talk(number: int) -> None:
            for message in range(each):
                await group[number].publish(TOPIC, b"%d/%d" % (number, message))

        for number in range(count):
            nursery.start_soon(talk, number)
        await eventually(lambda: all(len(heard) >= (count - 1) * each for heard in listeners.heard), within=30)
        for number, heard in enumerate(listeners.heard):
            everything = {b"%d/%d" % (other, m) for other in range(count) if other != number for m in range(each)}
            assert set(heard) == everything
            assert len(heard) == len(everything), "once"
        nursery.cancel_scope.cancel()


async def test_a_burst_is_not_dropped() -> None:  # G4: of a burst of 100 the stock queues let 17 through
    async with network_group(2, "libp2p") as group, trio.open_nursery() as nursery:
        listeners = Listeners(group)
        await nursery.start(listeners.run)
        for number in range(1000):
            await group[0].publish(TOPIC, b"%d" % number)
        await eventually(lambda: len(listeners.heard[1]) == 1000, within=20)
        nursery.cancel_scope.cancel()


async def test_a_node_that_restarts_with_its_key_is_heard() -> None:  # G2
    ground = Ground("libp2p")
    async with ground.open(1) as bob, trio.open_nursery() as nursery:
        listeners = Listeners([bob])
        await nursery.start(listeners.run)
        for life in range(2):
            async with ground.open(0) as alice:
                await meet(alice, bob)
                async with alice.subscribe(TOPIC, anything, capacity=1):
                    for number in range(60):
                        await alice.publish(TOPIC, b"%d/%d" % (life, number))
                    await eventually(lambda: len(listeners.heard[0]) == 60 * (life + 1))  # noqa: B023
            await eventually(lambda: not bob.neighbours())
        nursery.cancel_scope.cancel()


async def test_messages_of_a_lost_neighbour_come_again_after_redialling() -> None:
    async with network_group(2, "libp2p") as (alice, bob), trio.open_nursery() as nursery:
        listeners = Listeners([alice, bob])
        await nursery.start(listeners.run)
        await alice.publish(TOPIC, b"before")
        await eventually(lambda: listeners.heard[1] == [b"before"])
        await alice.disconnect(bob.peer_id)
        await eventually(lambda: not alice.neighbours() and not bob.neighbours())
        await meet(bob, alice)
        await alice.publish(TOPIC, b"after")
        await eventually(lambda: listeners.heard[1] == [b"before", b"after"])
        nursery.cancel_scope.cancel()
