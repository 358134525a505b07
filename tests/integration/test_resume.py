"""When a stage is lost only its range moves: the others keep what they hold, and no position is computed twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from blyan_node.inference.generation import Finished, Generate, Piece, Sampling, Started
from blyan_node.inference.messages import SERVING, Close, Drawn, Failed
from blyan_node.inference.seat import Loaded
from blyan_node.inference.stage import Stage
from blyan_node.model.importing import open_checkpoint
from blyan_node.model.shard import Shard, Work
from tests.support.models import import_units, tiny_checkpoint
from tests.support.swarm_net import Member, Swarm, ask, open_swarm, publish, until

PROMPT = "the old man and the sea " * 40
GREEDY = Generate(PROMPT, max_tokens=10, sampling=Sampling(temperature=0))
SAMPLED = Generate(PROMPT, max_tokens=10, sampling=Sampling(temperature=0.9, top_p=0.9, seed=5))
THIRDS = ((0, 2), (3, 5), (6, 7))  # of the model's units: embed, six layers, head


@dataclass
class Pair:
    """The two nodes that serve a third of the model each."""

    members: list[Member]

    def __contains__(self, peer: str) -> bool:
        return any(peer == member.service.network.peer_id for member in self.members)


@dataclass
class Net:
    """An entry that serves nothing, and two nodes for each third of the model."""

    swarm: Swarm
    entry: Member
    pairs: list[Pair]
    stepped: dict[str, Counter[int]] = field(default_factory=dict)

    def route(self) -> list[str]:
        (session,) = self.entry.service.entry.sessions.values()
        return [leg.peer for leg in session.legs]

    def member(self, peer: str) -> Member:
        return next(one for pair in self.pairs for one in pair.members if one.service.network.peer_id == peer)

    def alive(self) -> Iterator[Member]:
        return (member for pair in self.pairs for member in pair.members if not member.closed.is_set())


@asynccontextmanager
async def open_net(folder: Path, **changes: object) -> AsyncIterator[Net]:
    """The nodes load what the test says, not what they would choose."""
    path = tiny_checkpoint(folder / "checkpoint", layers=6, hidden=64)
    checkpoint = open_checkpoint(path)
    blobs = import_units(checkpoint, folder / "units")
    async with open_swarm(folder, bonded=7) as swarm:
        entry = await swarm.start(0, memory_limit=1)
        others = [await swarm.start(index, bootstrap=entry, memory_limit=1) for index in range(1, 7)]
        await publish(entry, path)
        net = Net(swarm, entry, [Pair(others[index : index + 2]) for index in (0, 2, 4)])
        for pair, (first, last) in zip(net.pairs, THIRDS, strict=True):
            for member in pair.members:
                await until(member.service.library.models)
                model = member.service.library.models()[0]
                shard = Shard.load(checkpoint.spec, first, last, blobs, cache_tokens=20_000)
                stage = member.service.stage
                net.stepped[member.service.network.peer_id] = _counting(shard, stage)
                stage.loaded = Loaded(model.id, model.version, first, last, shard, 1)
                stage.journals.limit = 10_000_000
                member.service.holder.plan = _plan(model, first, last)
                member.service.heart.urgent.beat()
        await until(lambda: min(entry.service.status().models[0].coverage) == 2)
        yield net


def _plan(model: object, first: int, last: int) -> object:
    from blyan_node.inference.holder import Plan
    from blyan_node.inference.placement import Range

    return Plan(model, Range(first, last), SERVING)  # type: ignore[arg-type]


def _counting(shard: Shard, stage: Stage) -> Counter[int]:
    """Have a shard count how often it computes each position for a session; challenges do not count."""
    counted, step = Counter[int](), shard.step

    def counting(works: list[Work]) -> object:
        results = step(works)
        seated = {id(seat.cache) for seat in stage.seats.values()}
        counted.update(
            work.position + offset for work in works if id(work.cache) in seated for offset in range(work.size)
        )
        return results

    shard.step = counting  # type: ignore[method-assign, assignment]
    return counted


@contextmanager
def counted_anew(net: Net) -> Iterator[None]:
    for counter in net.stepped.values():
        counter.clear()
    yield


@pytest.mark.parametrize(
    ("lost", "how"),
    [((0,), "killed"), ((1,), "muted"), ((2,), "killed"), ((0, 1), "muted"), ((1, 2), "killed"), ((0, 2), "killed")],
    ids=str,
)
async def test_no_position_is_computed_twice_in_decode(
    tmp_path: Path, autojump_clock: MockClock, lost: tuple[int, ...], how: str
) -> None:
    request = SAMPLED if 1 in lost else GREEDY
    async with open_net(tmp_path) as net:
        expected, _ = await ask(net.entry, request)
        with counted_anew(net):
            finished, before, after = await interrupted(net, request, lost, how)
        assert finished.text == expected.text
        assert finished.completion_tokens == expected.completion_tokens
        log = finished.prompt_tokens + finished.completion_tokens
        for index, (old, new) in enumerate(zip(before, after, strict=True)):
            assert (old != new) == (index in lost)
            once = Counter(net.stepped[new])
            if index not in lost:
                # the position that was on its way at the loss passes again, so that a token comes of it
                again = [position for position, count in once.items() if count > 1]
                assert len(again) <= 2, again
                assert all(position >= finished.prompt_tokens for position in again)
            assert set(range(log - 1)) <= set(once) <= set(range(log))
        await until(lambda: not any(member.service.stage.seats for member in net.alive()), within=200)
        assert not any(member.service.stage.journals.size for member in net.alive())


async def interrupted(
    net: Net, request: Generate, lost: tuple[int, ...], how: str, *, at: int = 4
) -> tuple[Finished, list[str], list[str]]:
    """Generate; lose these stages of the route when ``at`` tokens were shown. Returns the routes before and after."""
    before: list[str] = []
    after: list[str] = []
    text, counts = "", list[int]()
    async with net.entry.service.generate(request) as stream:
        async for event in stream:
            if isinstance(event, Piece):
                text += event.text
                counts.append(event.tokens)
                if not before and event.tokens >= at:
                    before = net.route()
                    await lose(net, [before[index] for index in lost], how)
                after = net.route()
            if isinstance(event, Started) and at == 0:
                before = net.route()
                await lose(net, [before[index] for index in lost], how)
            if isinstance(event, Finished):
                finished = event
    assert finished.text == text
    assert counts == sorted(set(counts))
    return finished, before, after


async def lose(net: Net, peers: list[str], how: str) -> None:
    for peer in peers:
        if how == "muted":
            net.swarm.hub.stall(peer)
    if how == "killed":
        async with trio.open_nursery() as nursery:
            for peer in peers:
                nursery.start_soon(net.member(peer).kill)


@pytest.mark.parametrize("lost", [(0,), (1, 2)], ids=str)
async def test_a_loss_in_the_middle_of_a_prompt(
    tmp_path: Path, autojump_clock: MockClock, lost: tuple[int, ...]
) -> None:
    async with open_net(tmp_path) as net:
        expected, _ = await ask(net.entry, GREEDY)
        assert expected.prompt_tokens > 128  # several chunks
        with counted_anew(net):
            finished, before, after = await interrupted(net, GREEDY, lost, "killed", at=0)
        assert finished.text == expected.text
        for index, (old, new) in enumerate(zip(before, after, strict=True)):
            assert (old != new) == (index in lost)
            if index not in lost:
                assert max(net.stepped[new].values()) <= 2


async def test_concurrent_sessions_all_go_on(tmp_path: Path, autojump_clock: MockClock) -> None:
    requests = [
        Generate(f"{word} and {PROMPT[:60]}", max_tokens=12, sampling=Sampling(0.8, 0.95, seed))
        for seed, word in enumerate(["sun", "moon", "sea", "wind", "rain"])
    ]
    async with open_net(tmp_path) as net:
        alone = [(await ask(net.entry, request))[0].text for request in requests]
        together: dict[int, str] = {}
        routes: dict[int, list[str]] = {}
        victims: list[str] = []

        async def one(index: int) -> None:
            async with net.entry.service.generate(requests[index]) as stream:
                async for event in stream:
                    if index == 0 and isinstance(event, Piece) and event.tokens >= 4 and not victims:
                        (session, *_) = net.entry.service.entry.sessions.values()
                        victims.extend(leg.peer for leg in session.legs[:2])
                        await lose(net, victims, "killed")
                    if isinstance(event, Finished):
                        together[index] = event.text
                        routes[index] = [hop.peer for hop in event.route]

        async with trio.open_nursery() as nursery:
            for index in range(len(requests)):
                nursery.start_soon(one, index)
        assert victims
        assert not any(set(victims) & set(route) for route in routes.values())
        assert [together[index] for index in range(len(requests))] == alone


async def test_a_journal_that_had_to_go_is_made_up_for_by_computing(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with open_net(tmp_path) as net:
        for member in net.alive():
            member.service.stage.journals.limit = 1000
        expected, _ = await ask(net.entry, GREEDY)
        with counted_anew(net):
            finished, _, after = await interrupted(net, GREEDY, (1,), "killed")
        assert finished.text == expected.text
        assert net.stepped[after[0]][0] == 2  # from the log, since nobody remembers it
        assert net.stepped[after[1]][0] == 1
        assert net.stepped[after[2]][0] == 1  # behind the gap nothing was lost


async def test_a_stage_that_wakes_up_after_it_was_replaced_does_no_harm(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    request = replace(GREEDY, max_tokens=30)
    async with open_net(tmp_path) as net:
        expected, _ = await ask(net.entry, request)
        text = ""
        async with net.entry.service.generate(request) as stream:
            async for event in stream:
                if isinstance(event, Piece):
                    text += event.text
                    if event.tokens == 5:
                        sleeper = net.route()[1]
                        net.swarm.hub.stall(sleeper)
                    if event.tokens == 15:
                        assert sleeper not in net.route()
                        net.swarm.hub.resume(sleeper)
                        await trio.sleep(5)
        assert text == expected.text
        await until(lambda: not any(member.service.stage.seats for member in net.alive()), within=200)


async def test_frames_of_an_old_epoch_are_dropped_by_the_entry(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with open_net(tmp_path) as net:
        expected, _ = await ask(net.entry, GREEDY)
        text = ""
        async with net.entry.service.generate(GREEDY) as stream:
            async for event in stream:
                if isinstance(event, Piece):
                    text += event.text
                    if event.tokens == 3:
                        (session,) = net.entry.service.entry.sessions.values()
                        old, first = session.epoch, net.route()[0]
                        await net.member(first).kill()
                    if event.tokens == 6:
                        assert session.epoch == old + 1
                        drawer, me = net.member(net.route()[-1]), net.entry.service.network.peer_id
                        position = event.tokens + expected.prompt_tokens
                        for frame in (
                            Drawn(session.id, old, position, 1, ((1, 0),) * 3),
                            Drawn(session.id, old + 2, position, 1, ((1, 0),) * 3),
                            Failed(session.id, old, "of before", net.route()[0]),
                        ):
                            drawer.service.pipeline.post(me, frame)
                        net.entry.service.pipeline.post(net.route()[1], Close(session.id, old))
                        await trio.sleep(0.1)
        assert session.epoch == old + 1
        assert text == expected.text


async def test_a_polite_leave_moves_the_session_before_the_leaver_goes(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    request = replace(GREEDY, max_tokens=30)
    async with open_net(tmp_path) as net:
        net.swarm.hub.latency = 0.02
        expected, _ = await ask(net.entry, request)
        text, stamps = "", list[float]()
        async with trio.open_nursery() as nursery, net.entry.service.generate(request) as stream:
            async for event in stream:
                if isinstance(event, Piece):
                    text += event.text
                    stamps.append(trio.current_time())
                    if event.tokens == 5:
                        leaver = net.member(net.route()[1])
                        nursery.start_soon(leaver.service.holder.drain)
                if isinstance(event, Finished):
                    finished = event
        me = leaver.service.network.peer_id
        assert text == expected.text
        assert me not in {hop.peer for hop in finished.route}
        assert not leaver.service.stage.seats  # it can go
        assert max(later - sooner for sooner, later in pairwise(stamps)) < 1
        assert not net.entry.service.entry.measurements.avoided(me, trio.current_time())


async def test_who_leaves_goes_on_serving_where_nobody_else_can(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with open_net(tmp_path) as net:
        expected, _ = await ask(net.entry, GREEDY)
        await net.pairs[1].members[0].kill()
        leaver = net.pairs[1].members[1]
        text = ""
        async with trio.open_nursery() as nursery, net.entry.service.generate(GREEDY) as stream:
            async for event in stream:
                if isinstance(event, Piece):
                    text += event.text
                    if event.tokens == 3:
                        nursery.start_soon(leaver.service.holder.drain)
                        await trio.sleep(2)
        assert text == expected.text


@pytest.mark.parametrize("index", [0, 1, 2])
async def test_a_stage_that_lives_but_lets_nothing_through_is_found_and_replaced(
    tmp_path: Path, autojump_clock: MockClock, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_net(tmp_path) as net:
        expected, _ = await ask(net.entry, GREEDY)
        text, began, route = "", 0.0, list[str]()
        async with net.entry.service.generate(GREEDY) as stream:
            async for event in stream:
                if isinstance(event, Piece):
                    text += event.text
                    if event.tokens == 4:
                        route, began = net.route(), trio.current_time()
                        stuck = route[index]
                        monkeypatch.setattr(net.member(stuck).service.stage, "_gather", list)
                    if event.tokens == 9:
                        assert [i for i, peer in enumerate(net.route()) if peer not in route] == [index]
        assert text == expected.text
        assert trio.current_time() - began < 15
