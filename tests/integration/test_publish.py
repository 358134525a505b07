"""A model's way onto the chain: once is enough, an interruption can be made good, two at once do not mix."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from blyan_node.chain.records import Arguments, Record
from blyan_node.errors import DiskFull, RequestError, Unreachable
from blyan_node.inference.generation import Generate, Sampling
from tests.support.models import tiny_checkpoint
from tests.support.swarm_net import Member, ask, open_swarm, publish, until

RECORDS = 1 + 6


@asynccontextmanager
async def lone_node(folder: Path) -> AsyncIterator[tuple[Member, Path]]:
    checkpoint = tiny_checkpoint(folder / "checkpoint")
    async with open_swarm(folder) as swarm:
        yield await swarm.start(0), checkpoint


def count(node: Member) -> int:
    """The records that the node brought to the chain."""
    return node.service.relay.replica.view().tentative.account(node.service.key.address).nonce


async def test_what_is_published_is_not_published_again(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with lone_node(tmp_path) as (node, checkpoint):
        await publish(node, checkpoint)
        await publish(node, checkpoint)
        assert count(node) == RECORDS
        await publish(node, checkpoint, "by another name")
        assert count(node) == 2 * RECORDS
        assert [model.name for model in node.service.library.models()] == ["tiny", "by another name"]


async def test_an_interrupted_import_is_completed_by_the_next(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with lone_node(tmp_path) as (node, checkpoint):
        real, sent = node.service.submissions.originate, 0
        with trio.CancelScope() as scope:

            async def some(arguments: Arguments) -> Record:
                nonlocal sent
                if sent == 3:
                    scope.cancel()
                    await trio.lowlevel.checkpoint()
                sent += 1
                return await real(arguments)

            node.service.submissions.originate = some  # type: ignore[method-assign]
            await publish(node, checkpoint)
        node.service.submissions.originate = real  # type: ignore[method-assign]
        assert scope.cancelled_caught
        await until(lambda: count(node) == 3)  # what was sent before is carried all the same
        assert node.service.library.models() == ()
        assert [model.complete for model in node.service.status().models] == [False]
        await publish(node, checkpoint)
        assert count(node) == RECORDS
        await until(lambda: node.service.ready() is None)


async def test_two_imports_at_once_both_succeed(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with lone_node(tmp_path) as (node, checkpoint):
        other = tiny_checkpoint(tmp_path / "other", seed=1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(publish, node, checkpoint)
            nursery.start_soon(publish, node, other, "other")
            nursery.start_soon(publish, node, checkpoint)
        assert sorted(model.name for model in node.service.library.models()) == ["other", "tiny"]
        assert all(model.complete for model in node.service.status().models)


async def test_a_failed_import_leaves_no_weights_behind(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with open_swarm(tmp_path) as swarm:
        node = await swarm.start(0, disk_limit=9_000_000)  # bytes: 4 layers take 10 million, one takes 7
        with pytest.raises(DiskFull):
            await publish(node, tiny_checkpoint(tmp_path))
        assert node.service.exchange.blobs.used() == 0
        await publish(node, tiny_checkpoint(tmp_path, layers=1), "small")
        await until(lambda: node.service.ready() is None)


async def test_of_an_abandoned_import_stays_what_the_chain_names(tmp_path: Path, autojump_clock: MockClock) -> None:
    one, other = tiny_checkpoint(tmp_path, layers=1), tiny_checkpoint(tmp_path, layers=2)  # the same embedding
    async with open_swarm(tmp_path) as swarm:
        node = await swarm.start(0)
        await publish(node, one, "one")
        blobs = node.service.exchange.blobs
        published = blobs.refs()
        async with node.service.import_model(str(other), "other") as steps:
            async for step in steps:
                if step.stage == "storing head":
                    break
            assert len(blobs.refs()) > len(published)
        assert blobs.refs() == published
        await publish(node, other, "other")
        await until(lambda: len(node.service.library.models()) == 2)


async def test_a_newer_model_of_the_same_name_waits_until_it_is_served(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with lone_node(tmp_path) as (node, checkpoint):
        await publish(node, checkpoint)
        await until(lambda: node.service.ready() is None)
        await publish(node, tiny_checkpoint(tmp_path / "newer", seed=1))
        assert len(node.service.library.models()) == 2
        await ask(node, Generate("the sea", max_tokens=2, sampling=Sampling(temperature=0)))


async def test_who_has_no_stake_hands_the_records_to_a_validator(tmp_path: Path, autojump_clock: MockClock) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint")
    async with open_swarm(tmp_path, bonded=1) as swarm:
        stranger = await swarm.start(5)
        with pytest.raises(Unreachable, match="no validator can be reached"):
            await publish(stranger, checkpoint)
        validator = await swarm.start(0, bootstrap=stranger)
        await publish(stranger, checkpoint)
        assert count(stranger) == RECORDS
        await until(lambda: validator.service.relay.replica.final.k > 0 and validator.service.ready() is None)
        assert [model.owner for model in validator.service.library.models()] == [stranger.service.key.address]


async def test_names_are_bounded(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with lone_node(tmp_path) as (node, checkpoint):
        with pytest.raises(RequestError, match="name"):
            await publish(node, checkpoint, "x" * 65)
