"""The entry's promise: a token that was emitted is never changed, lost or doubled, whichever stages are lost."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from blyan_node.errors import RequestError
from blyan_node.inference.generation import Event, Finished, Generate, Piece, Sampling, Started
from tests.support.models import tiny_checkpoint
from tests.support.swarm_net import Member, ask, open_swarm, publish, until

PROMPT = "the old man and the sea " * 8
GREEDY = Generate(PROMPT, max_tokens=12, sampling=Sampling(temperature=0))
SAMPLED = Generate(PROMPT, max_tokens=12, sampling=Sampling(temperature=0.9, top_p=0.9, seed=5))


@asynccontextmanager
async def swarm_of_pairs(folder: Path) -> AsyncIterator[tuple[Member, list[Member]]]:
    """An entry without room for a unit, and six nodes that together hold the model twice, in thirds."""
    checkpoint = tiny_checkpoint(folder / "checkpoint", layers=6)
    async with open_swarm(folder, bonded=8) as swarm:
        entry = await swarm.start(0, memory_limit=1)
        holders = [await swarm.start(index, bootstrap=entry, memory_limit=8_000_000) for index in range(1, 7)]
        await publish(entry, checkpoint)
        await until(lambda: all(holder.service.stage.loaded for holder in holders))
        await until(lambda: min(entry.service.status().models[0].coverage) >= 2, within=300)
        yield entry, holders


def route_of(entry: Member) -> tuple[str, ...]:
    """The peers of the session under way."""
    (session,) = entry.service.entry.sessions.values()
    return tuple(leg.peer for leg in session.legs)


async def run(entry: Member, holders: list[Member], request: Generate, kill: tuple[int, ...], at: int) -> list[Event]:
    """Generate; when ``at`` tokens were shown (0: as soon as the route is open) kill those stages of the route."""
    events: list[Event] = []
    killed = False
    async with entry.service.generate(request) as stream:
        async for event in stream:
            events.append(event)
            shown = event.tokens if isinstance(event, Piece) else 0
            if not killed and shown >= at and not isinstance(event, Finished):
                route, killed = route_of(entry), True
                for index in kill:
                    victim = route[index]
                    await next(one for one in holders if one.service.network.peer_id == victim).kill()
    return events


@pytest.mark.parametrize(
    ("kill", "at", "request_"),
    [
        ((0,), 0, SAMPLED),
        ((0, -1), 0, GREEDY),
        ((-1,), 1, GREEDY),
        ((0,), 6, GREEDY),
        ((0, -1), 6, SAMPLED),
    ],
    ids=["first in prefill", "two in prefill", "last after a token", "first midway", "two midway"],
)
async def test_emitted_tokens_stand_whichever_stage_is_lost(
    tmp_path: Path, autojump_clock: MockClock, kill: tuple[int, ...], at: int, request_: Generate
) -> None:
    async with swarm_of_pairs(tmp_path) as (entry, holders):
        expected, _ = await ask(entry, request_)
        assert len({hop.peer for hop in expected.route}) >= 2
        events = await run(entry, holders, request_, kill, at)
        finished = events[-1]
        assert isinstance(finished, Finished)
        pieces = [event for event in events if isinstance(event, Piece)]
        assert "".join(piece.text for piece in pieces) == finished.text == expected.text
        assert finished.completion_tokens == expected.completion_tokens
        counts = [piece.tokens for piece in pieces]
        assert counts == sorted(counts)
        assert sum(isinstance(event, Started) for event in events) == 1
        alive = [holder for holder in holders if not holder.closed.is_set()]
        await until(lambda: not any(holder.service.stage.seats for holder in alive), within=130)
        assert not entry.service.entry.sessions


async def test_more_losses_than_attempts_are_borne_while_tokens_come(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with swarm_of_pairs(tmp_path) as (entry, holders):
        request = replace(GREEDY, max_tokens=24)
        expected, _ = await ask(entry, request)
        text = ""
        async with entry.service.generate(request) as stream:
            async for event in stream:
                if isinstance(event, Piece):
                    text += event.text
                    if event.tokens % 3 == 0:
                        last = route_of(entry)[-1]
                        stage = next(one for one in holders if one.service.network.peer_id == last).service.stage
                        for seat in list(stage.seats.values()):
                            stage._fail(seat, "the test says so")
        assert text == expected.text


@pytest.mark.parametrize("when", ["opening", "prefill", "decode"])
async def test_leaving_frees_every_seat_whenever_it_happens(
    tmp_path: Path, autojump_clock: MockClock, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with swarm_of_pairs(tmp_path) as (entry, holders):
        patience = 1000.0
        if when == "opening":
            entry.service.network._hub.latency = 0.05  # type: ignore[attr-defined]
            patience = 0.12  # the requests are under way, or just answered
        with trio.move_on_after(patience):
            async with entry.service.generate(replace(GREEDY, max_tokens=200)) as stream:
                async for event in stream:
                    if when == "prefill" or (isinstance(event, Piece) and event.tokens > 4):
                        break
        assert not entry.service.entry.sessions
        await until(lambda: not any(holder.service.stage.seats for holder in holders), within=5)
        await trio.sleep(1)
        for holder in holders:
            assert not holder.service.stage.seats
        await ask(entry, GREEDY)


async def test_the_context_is_used_to_its_last_position(tmp_path: Path, autojump_clock: MockClock) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint")
    async with open_swarm(tmp_path) as swarm:
        node = await swarm.start(0, context_limit=64)
        await publish(node, checkpoint)
        await until(lambda: node.service.ready() is None)
        model = node.service.library.models()[0]
        known = await node.service.library.know(model)
        words = "sea "
        while len(known.tokenizer.encode(words)) < 63:
            words += "a"
        assert len(known.tokenizer.encode(words)) == 63
        finished, _ = await ask(node, Generate(words, sampling=Sampling(temperature=0)))
        assert (finished.prompt_tokens, finished.completion_tokens) in ((63, 1), (63, 0))
        assert finished.reason in ("length", "stop")
        with pytest.raises(RequestError, match="context of this model here is 64"):
            await ask(node, Generate(words + "a" * 20))
        one, _ = await ask(node, Generate("sea", max_tokens=1, sampling=Sampling(temperature=0)))
        assert one.completion_tokens <= 1
        none, _ = await ask(node, Generate("sea", max_tokens=0, sampling=Sampling(temperature=0)))
        assert (none.completion_tokens, none.text, none.reason) == (0, "", "length")
        await until(lambda: not node.service.stage.seats)
