"""What the test plan asks of a coordinator, asked of a node's own view: nobody coordinates, everybody sees for itself.

Registering is being heard, a heartbeat is gossip, and active and healthy are what each node makes of it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from trio import current_time
from trio.testing import MockClock

from blyan_node.inference.generation import Generate, Message, Sampling
from blyan_node.inference.swarm import LIFETIME
from tests.support.models import tiny_checkpoint
from tests.support.swarm_net import Member, Swarm, ask, open_swarm, publish, until

QUARTER = 7_500_000
"""Bytes of which 3/4 are for weights: no node can hold the tiny model alone."""


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "checkpoint")


async def setup_test_nodes(swarm: Swarm, count: int, **settings: object) -> list[Member]:
    nodes = [await swarm.start(0, **settings)]
    for index in range(1, count):
        nodes.append(await swarm.start(index, bootstrap=nodes[-1], **settings))
    return nodes


def active(node: Member) -> set[str]:
    """The peers that are active by this node's own view."""
    return set(node.service.view.active(current_time()))


def sequence_of(seen_by: Member, peer: Member) -> int:
    """The number of the newest heartbeat of a peer that a node has heard."""
    seen = seen_by.service.view.active(current_time())[peer.service.network.peer_id]
    return seen.heartbeat.sequence


async def test_node_registration(tmp_path: Path, autojump_clock: MockClock) -> None:
    """A node that starts is active in every node's view, and its heartbeats keep it so."""
    async with open_swarm(tmp_path) as swarm:
        nodes = await setup_test_nodes(swarm, 4)
        everybody = {node.service.network.peer_id for node in nodes}
        await until(lambda: all(active(node) == everybody for node in nodes))

        first, last = nodes[0], nodes[-1]
        before = sequence_of(first, last)
        began = current_time()
        await until(lambda: current_time() > began + 3 * LIFETIME)
        assert sequence_of(first, last) > before
        assert all(active(node) == everybody for node in nodes)


async def test_a_node_that_falls_silent_is_not_healthy_and_one_that_returns_is(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with open_swarm(tmp_path) as swarm:
        nodes = await setup_test_nodes(swarm, 4)
        peers = [node.service.network.peer_id for node in nodes]
        await until(lambda: all(active(node) == set(peers) for node in nodes))
        swarm.hub.partition(peers[:1], peers[1:])  # all of it, as when a cable is pulled
        await until(lambda: all(active(node) == set(peers[1:]) for node in nodes[1:]))
        await until(lambda: active(nodes[0]) == {peers[0]})
        swarm.hub.heal()
        await until(lambda: all(active(node) == set(peers) for node in nodes))

        await nodes[2].kill()
        await until(lambda: all(peers[2] not in active(node) for node in (nodes[0], nodes[1], nodes[3])))
        back = await swarm.start(2, bootstrap=nodes[0])
        await until(lambda: all(active(node) == set(peers) for node in (nodes[0], nodes[1], back, nodes[3])))


async def test_what_a_node_serves_is_known_to_all(tmp_path: Path, checkpoint: Path, autojump_clock: MockClock) -> None:
    async with open_swarm(tmp_path) as swarm:
        nodes = await setup_test_nodes(swarm, 4, memory_limit=QUARTER)
        await publish(nodes[0], checkpoint)
        await until(lambda: all(node.service.status().state == "serving" for node in nodes))

        def told() -> list[set[tuple[str, int | None, int | None]]]:
            return [{(peer.peer, peer.first, peer.last) for peer in node.service.status().peers} for node in nodes]

        def held() -> dict[str, tuple[str, int, int]]:
            loaded = {node.service.network.peer_id: node.service.stage.loaded for node in nodes}
            return {peer: (peer, has.first, has.last) for peer, has in loaded.items() if has}

        def agreed() -> bool:
            return all(
                known == {word for peer, word in held().items() if peer != node.service.network.peer_id}
                for node, known in zip(nodes, told(), strict=True)
            )

        await until(agreed)
        assert len(held()) == 4


async def test_distributed_inference(tmp_path: Path, checkpoint: Path, autojump_clock: MockClock) -> None:
    async with open_swarm(tmp_path) as swarm:
        nodes = await setup_test_nodes(swarm, 4, memory_limit=QUARTER)
        await publish(nodes[0], checkpoint)
        await until(lambda: all(node.service.ready() is None for node in nodes))
        request = Generate((Message("user", "Test prompt"),), max_tokens=8, sampling=Sampling(temperature=0))
        response, _ = await ask(nodes[3], request)
        assert response.prompt_tokens + response.completion_tokens > 0
        assert len({hop.peer for hop in response.route}) > 1
        assert response.text
