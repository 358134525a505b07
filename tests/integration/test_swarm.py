"""Whole nodes on the memory network: a model spreads, prompts walk through peers, losses are coped with."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from blyan_node.errors import ModelUnavailable, RequestError
from blyan_node.inference import stage as stage_module
from blyan_node.inference.generation import Finished, Generate, Message, Piece, Sampling, Started
from tests.support.models import tiny_checkpoint
from tests.support.swarm_net import Member, Swarm, ask, open_swarm, publish, until

GREEDY = Generate((Message("user", "Tell me of the sea"),), max_tokens=12, sampling=Sampling(temperature=0))
QUARTER = 7_500_000  # bytes, of which 3/4 are for weights: no node can hold the tiny model of 10 MB alone


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
        await until(lambda: not any(member.service.stage.seats for member in members))


async def test_a_latecomer_given_one_address_catches_up_and_serves(
    tmp_path: Path, checkpoint: Path, autojump_clock: MockClock
) -> None:
    async with open_swarm(tmp_path, bonded=1) as swarm:
        members = await started(swarm, 3, memory_limit=QUARTER)
        await publish(members[0], checkpoint)
        await until(lambda: all(is_covered(member) for member in members))
        late = await swarm.start(3, bootstrap=members[2], memory_limit=QUARTER)
        await until(lambda: late.service.stage.loaded is not None)
        assert late.service.status().heads == members[0].service.status().heads
        model = late.service.status().models[0]
        await until(lambda: late.service.status().models[0].stored == tuple(range(len(model.units))))
        await ask(late, GREEDY)


async def test_a_node_that_was_cut_off_catches_up_when_healed(
    tmp_path: Path, checkpoint: Path, autojump_clock: MockClock
) -> None:
    async with open_swarm(tmp_path) as swarm:
        members = await started(swarm, 4)
        ids = [member.service.network.peer_id for member in members]
        await until(lambda: all(len(member.service.network.neighbours()) == 3 for member in members))
        swarm.hub.partition(ids[:2], ids[2:])
        await publish(members[0], checkpoint, "left")
        await publish(members[2], checkpoint, "right")
        await until(lambda: len(members[3].service.relay.replica.catalog().models()) == 1)
        assert members[1].service.status().heads != members[3].service.status().heads
        swarm.hub.heal()
        await until(lambda: len({member.service.status().heads for member in members}) == 1)
        names = [[model.name for model in member.service.models()] for member in members]
        assert all(sorted(found) == ["left", "right"] for found in names)


async def test_the_text_goes_on_unchanged_when_a_stage_is_lost(
    tmp_path: Path, checkpoint: Path, autojump_clock: MockClock
) -> None:
    async with open_swarm(tmp_path) as swarm:
        members = await started(swarm, 4, memory_limit=8_000_000)  # two can hold the model, four hold it twice
        await publish(members[0], checkpoint)
        await until(lambda: all(member.service.stage.loaded for member in members))
        await until(lambda: all(min(member.service.status().models[0].coverage) > 0 for member in members))
        entry = members[0]
        expected, _ = await ask(entry, GREEDY)
        victim = next(
            member for member in members[1:] if member.service.network.peer_id in {hop.peer for hop in expected.route}
        )
        text, tokens = "", 0
        async with entry.service.generate(GREEDY) as stream:
            async for event in stream:
                if isinstance(event, Piece):
                    text, tokens = text + event.text, event.tokens
                    if tokens == 3:
                        await victim.kill()
        assert text == expected.text


async def test_many_at_once_get_what_each_would_get_alone(
    tmp_path: Path, checkpoint: Path, autojump_clock: MockClock
) -> None:
    prompts = [
        Generate(f"{word} and", max_tokens=6, sampling=Sampling(0.8, 0.95, seed))
        for seed, word in enumerate(["sun", "moon", "sea", "wind", "rain", "snow"])
    ]
    async with open_swarm(tmp_path) as swarm:
        members = await started(swarm, 3, memory_limit=QUARTER)
        await publish(members[0], checkpoint)
        await until(lambda: all(is_covered(member) for member in members))
        alone = [(await ask(members[0], prompt))[0].text for prompt in prompts]
        together: dict[int, str] = {}

        async def one(index: int) -> None:
            together[index] = (await ask(members[index % 3], prompts[index]))[0].text

        async with trio.open_nursery() as nursery:
            for index in range(len(prompts)):
                nursery.start_soon(one, index)
        assert [together[index] for index in range(len(prompts))] == alone


async def test_cancelling_frees_the_seats_on_every_stage(
    tmp_path: Path, checkpoint: Path, autojump_clock: MockClock
) -> None:
    async with open_swarm(tmp_path) as swarm:
        members = await started(swarm, 3, memory_limit=QUARTER)
        await publish(members[0], checkpoint)
        await until(lambda: all(is_covered(member) for member in members))
        await until(lambda: all(member.service.stage.loaded for member in members))
        free = [member.service.stage.loaded.shard.free_tokens() for member in members if member.service.stage.loaded]
        async with members[1].service.generate(Generate("on and on", max_tokens=400)) as stream:
            async for event in stream:
                if isinstance(event, Piece):
                    break
            assert any(member.service.stage.seats for member in members)
        await until(lambda: not any(member.service.stage.seats for member in members), within=5)
        assert free == [
            member.service.stage.loaded.shard.free_tokens() for member in members if member.service.stage.loaded
        ]


async def test_requests_that_cannot_be_are_refused_with_a_reason(
    tmp_path: Path, checkpoint: Path, autojump_clock: MockClock
) -> None:
    async with open_swarm(tmp_path) as swarm:
        lone = await swarm.start(0)
        with pytest.raises(ModelUnavailable, match="no complete model"):
            await ask(lone, GREEDY)
        await publish(lone, checkpoint)
        with pytest.raises(RequestError, match="there is: tiny"):
            await ask(lone, Generate("x", model="other"))
        await until(lambda: is_covered(lone))
        with pytest.raises(RequestError, match="context"):
            await ask(lone, Generate("word " * 5000))
        with pytest.raises(RequestError, match="empty"):
            await ask(lone, Generate(""))


async def test_where_pages_run_out_the_last_session_gives_way_and_all_come_to_their_end(
    tmp_path: Path, checkpoint: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_module, "MARGIN", 1)
    prompts = [Generate(word, max_tokens=100, sampling=Sampling(0.8, 0.95, 3)) for word in ("sun", "moon", "sea")]
    async with open_swarm(tmp_path) as swarm:
        lone = await swarm.start(0)
        await publish(lone, checkpoint)
        await until(lambda: is_covered(lone))
        alone = [(await ask(lone, prompt))[0].text for prompt in prompts]
        assert lone.service.stage.loaded is not None
        pool = lone.service.stage.loaded.shard._pool
        monkeypatch.setattr(pool, "free", 6)  # each session needs four
        together: dict[int, str] = {}
        most = 0

        async def one(index: int) -> None:
            nonlocal most
            async with lone.service.generate(prompts[index]) as stream:
                async for event in stream:
                    most = max(most, len(lone.service.stage.seats))
                    if isinstance(event, Finished):
                        together[index] = event.text

        async with trio.open_nursery() as nursery:
            for index in range(len(prompts)):
                nursery.start_soon(one, index)
        assert most == 3  # by what each would need at its end only one would have been let in
        assert [together[index] for index in range(len(prompts))] == alone
        await until(lambda: not lone.service.stage.seats)
        assert pool.free == 6
