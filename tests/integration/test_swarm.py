"""Whole nodes on the memory network: a model spreads, prompts walk through peers, latecomers and losses are coped with."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from blyan_node.errors import ModelUnavailable, RequestError
from blyan_node.inference.generation import Generate, Message, Piece, Sampling, Started
from tests.support.models import tiny_checkpoint
from tests.support.swarm_net import Member, Swarm, ask, open_swarm, publish, until

GREEDY = Generate((Message("user", "Tell me of the sea"),), max_tokens=12, sampling=Sampling(temperature=0))
QUARTER = 5_000_000  # bytes: no node can hold the tiny model alone


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "checkpoint")


async def started(swarm: Swarm, count: int, **settings: object) -> list[Member]:
    members = [await swarm.start(0, **settings)]
    for index in range(1, count):
        members.append(await swarm.start(index, bootstrap=members[0], **settings))
    return members


def is_covered(member: Member) -> bool:
    return member.service.ready() is None


async def test_a_prompt_given_to_any_node_walks_through_several(
    tmp_path: Path, checkpoint: Path, autojump_clock: MockClock
) -> None:
    async with open_swarm(tmp_path) as swarm:
        members = await started(swarm, 4, memory_limit=QUARTER)
        await publish(members[0], checkpoint)
        await until(lambda: all(is_covered(member) for member in members))
        answers = []
        for member in members:
            finished, events = await ask(member, GREEDY)
            assert isinstance(events[0], Started)
            assert "".join(event.text for event in events if isinstance(event, Piece)) == finished.text
            assert len({hop.peer for hop in finished.route}) > 1
            assert sum(hop.layers for hop in finished.route) == 4
            answers.append(finished.text)
        assert len(set(answers)) == 1
        assert not any(member.service.stage.seats for member in members)
