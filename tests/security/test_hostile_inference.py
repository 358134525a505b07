"""A hostile member of the swarm, speaking raw requests and frames to an honest node: it may harm its own sessions."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pytest
import trio
from trio.testing import MockClock

from blyan_node.chain.keys import Key
from blyan_node.chain.records import BlobRef, Layer, Manifest
from blyan_node.errors import GenerationFailed, ModelUnavailable, PeerError, Refused
from blyan_node.inference import stage as stage_module
from blyan_node.inference.generation import Generate, Piece, Sampling, Started
from blyan_node.inference.messages import (
    DRAINING,
    FRAMES,
    HEARTBEAT_TOPIC,
    MAX_FRAME,
    OPEN,
    PROBE,
    REPLAY,
    RESUME,
    SERVING,
    Activations,
    Close,
    Drawn,
    Failed,
    Held,
    Leg,
    Open,
    Opened,
    Probe,
    Replay,
    Resume,
    Stored,
    Tokens,
)
from blyan_node.inference.swarm import bits_of, sign
from blyan_node.model.importing import open_checkpoint
from blyan_node.p2p import rpc
from blyan_node.p2p.channel import Channels
from blyan_node.p2p.transport import Network, PeerId
from blyan_node.worker import Lane
from tests.support.models import tiny_checkpoint
from tests.support.swarm import heartbeat
from tests.support.swarm_net import Member, Swarm, ask, open_swarm, publish, until

UNITS, HIDDEN, VOCABULARY = 6, 256, 1000
GREEDY = Generate("the sea", max_tokens=4, sampling=Sampling(temperature=0))
SESSION = bytes(range(16))


@dataclass
class Villain:
    """A peer with a key of its own and no code but what a test makes it do."""

    network: Network
    key: Key
    channels: Channels
    victim: Member
    heard: list[Any] = field(default_factory=list)
    sequence: int = 10**18

    @property
    def me(self) -> PeerId:
        return self.network.peer_id

    @property
    def target(self) -> PeerId:
        return self.victim.service.network.peer_id

    def opening(self, *, stage: int = 0, route: tuple[Leg, ...] = (), **changes: Any) -> Open:
        model = self.victim.service.library.models()[0]
        made = Open(
            session=SESSION,
            epoch=0,
            model=model.id,
            version=model.version,
            route=route or (Leg(self.target, 0, UNITS - 1),),
            stage=stage,
            limit=64,
            temperature=0,
            top_p=1_000_000,
            seed=0,
            stop_tokens=(2,),
        )
        return replace(made, **changes)

    async def open(self, request: Open) -> Opened:
        return await rpc.call(self.network, self.target, OPEN, request)

    async def send(self, frame: Any) -> None:
        await self.channels.send(self.target, frame)

    async def claim(self, *held: Held, **changes: Any) -> None:
        """Gossip a heartbeat."""
        self.sequence += 1
        word = replace(
            heartbeat(self.me, self.sequence, *held),
            network=self.victim.service.relay.replica.genesis.network,
            addresses=self.network.addresses(),
            **changes,
        )
        await self.network.publish(HEARTBEAT_TOPIC, sign(word, self.key))
        await until(lambda: self.victim.service.view.is_active(self.me, trio.current_time()))

    def failures(self) -> list[Failed]:
        return [frame for frame in self.heard if isinstance(frame, Failed)]


@asynccontextmanager
async def open_villain(swarm: Swarm, victim: Member, *, index: int = 15) -> AsyncIterator[Villain]:
    key, heard = swarm.keys[index], list[Any]()

    async def hear(_peer: PeerId, frame: Any) -> None:
        heard.append(frame)

    async with swarm.hub.open(key.secret) as network, trio.open_nursery() as nursery:
        channels = Channels(
            network,
            "/blyan/pipeline/1",
            FRAMES,
            largest=MAX_FRAME + 4096,
            on_message=hear,
            on_lost=lambda _peer: None,
        )
        await nursery.start(channels.run)
        await network.connect(victim.service.network.addresses()[0])
        async with network.subscribe(HEARTBEAT_TOPIC, lambda _origin, _data: True, capacity=1000):
            yield Villain(network, key, channels, victim, heard)
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def victim_and_villain(folder: Path) -> AsyncIterator[tuple[Member, Villain]]:
    """A node that serves a whole model alone, and a villain beside it; at the end the node is as good as ever."""
    checkpoint = tiny_checkpoint(folder / "checkpoint", vocab=VOCABULARY, hidden=HIDDEN)
    async with open_swarm(folder) as swarm:
        victim = await swarm.start(0)
        await publish(victim, checkpoint)
        await until(lambda: victim.service.ready() is None)
        shard = victim.service.stage.loaded.shard  # type: ignore[union-attr]
        free = shard.free_tokens()
        expected = await ask(victim, GREEDY)
        async with open_villain(swarm, victim) as villain:
            yield victim, villain
        again = await ask(victim, GREEDY)
        assert again[0].text == expected[0].text
        await until(lambda: not victim.service.stage.seats)
        assert shard.free_tokens() == free


def activations(**changes: Any) -> Activations:
    made = Activations(SESSION, 0, 0, 1, False, "float32", bytes(4 * HIDDEN), ((1, 1),))
    return replace(made, **changes)


# --- opening ---


async def test_routes_that_cannot_be_are_refused(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with victim_and_villain(tmp_path) as (_victim, villain):
        peer, me = villain.target, villain.me
        wrong = [
            (Leg(peer, 0, 3),),  # ends in the middle: its output would have no way to go
            (Leg(peer, 1, UNITS - 1),),
            (Leg(me, 0, 1), Leg(peer, 3, UNITS - 1)),
            (Leg(me, 0, 3), Leg(peer, 3, UNITS - 1)),
            (Leg(peer, 0, 2), Leg(me, 3, 3), Leg(peer, 4, UNITS - 1)),
            (Leg(peer, 0, 4096),),
        ]
        for route in wrong:
            for stage in (index for index, leg in enumerate(route) if leg.peer == peer):
                with pytest.raises(PeerError):
                    await villain.open(villain.opening(route=route, stage=stage))
                if me not in villain.victim.service.network.neighbours():  # it lost its points
                    return
        raise AssertionError("a peer that sends six impossible routes is disconnected")


@pytest.mark.parametrize(
    "changes",
    [
        {"stage": 5},
        {"route": (Leg("somebody", 0, UNITS - 1),)},
        {"model": bytes(32)},
        {"version": bytes(32)},
        {"limit": 2**24},
        {"top_p": 0},
    ],
)
async def test_an_opening_that_cannot_be_served_is_refused_with_a_reason(
    tmp_path: Path, autojump_clock: MockClock, changes: dict[str, Any]
) -> None:
    async with victim_and_villain(tmp_path) as (victim, villain):
        with pytest.raises(Refused):
            await villain.open(villain.opening(**changes))
        assert not victim.service.stage.seats


async def test_a_session_is_opened_once_and_closed_by_its_entry_only(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with victim_and_villain(tmp_path) as (victim, villain):
        await villain.open(villain.opening())
        with pytest.raises(Refused, match="open already"):
            await villain.open(villain.opening())
        victim.service.pipeline.post(
            villain.target, Close(SESSION, 0)
        )  # from the victim itself, which is not its entry
        assert SESSION in victim.service.stage.seats
        await villain.send(Close(SESSION, 0))
        await until(lambda: not victim.service.stage.seats)


async def test_a_close_that_overtakes_its_open_leaves_no_seat(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with victim_and_villain(tmp_path) as (victim, villain):
        for _ in range(3):
            await villain.send(Close(SESSION, 0))
        await trio.sleep(1)
        with pytest.raises(Refused, match="closed before"):
            await villain.open(villain.opening())
        assert not victim.service.stage.seats


async def test_one_peer_cannot_take_all_the_cache_nor_all_seats(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with victim_and_villain(tmp_path) as (victim, villain):
        shard = victim.service.stage.loaded.shard  # type: ignore[union-attr]
        monkeypatch.setattr(shard, "_free", 4000)

        refusals: list[str] = []

        async def flood(limit: int) -> int:
            for opened in range(10_000):
                try:
                    await villain.open(villain.opening(session=secrets.token_bytes(16), limit=limit))
                except Refused as refusal:
                    refusals.append(str(refusal))
                    return opened
            raise AssertionError("no end to it")

        assert await flood(500) == 6
        assert shard.free_tokens() == 1000
        await ask(victim, GREEDY)  # others still have room
        await drop(villain)
        await until(lambda: not victim.service.stage.seats)
        monkeypatch.setattr(stage_module, "MAX_SEATS", 40)
        await villain.network.connect(victim.service.network.addresses()[0])
        assert await flood(1) == 30
        assert all("share" in refusal for refusal in refusals)
        await drop(villain)
        await until(lambda: not victim.service.stage.seats)
        monkeypatch.undo()


async def drop(villain: Villain) -> None:
    await villain.network.disconnect(villain.target)


async def test_a_session_that_memory_has_no_room_for_is_refused(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: Any, **_settings: Any) -> None:
        raise RuntimeError("CUDA out of memory")

    async with victim_and_villain(tmp_path) as (victim, villain):
        with monkeypatch.context() as patch:
            patch.setattr("blyan_node.model.shard.Cache", fail)
            with pytest.raises(Refused, match="no memory"):
                await villain.open(villain.opening())
        assert not victim.service.stage.seats


# --- frames ---


async def test_frames_of_unknown_sessions_and_of_strangers_do_nothing(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with victim_and_villain(tmp_path) as (victim, villain):
        for frame in (
            Tokens(SESSION, 0, 0, (1,), False),
            activations(),
            Drawn(SESSION, 0, 0, 1, ()),
            Failed(SESSION, 0, "x" * 2000, "y"),
            Close(SESSION, 0),
        ):
            await villain.send(frame)
        async with victim.service.generate(replace(GREEDY, max_tokens=40)) as stream:
            async for event in stream:
                if isinstance(event, Started):
                    (session,) = victim.service.entry.sessions
                    for forged in (
                        Drawn(session, 0, event.prompt_tokens, 5, ((1, 0),)),
                        Failed(session, 0, "no", villain.target),
                        Tokens(session, 0, 0, (1,), False),
                        activations(session=session),
                        Close(session, 0),
                    ):
                        await villain.send(forged)
                    await trio.sleep(0.1)
        assert villain.me in victim.service.network.neighbours()  # an entry may have had these sent by an honest peer


@pytest.mark.parametrize(
    "frame",
    [
        Tokens(SESSION, 0, 0, (VOCABULARY,), False),
        Tokens(SESSION, 0, 0, (2**31,), True),
        Tokens(SESSION, 0, 1, (1,), False),
        Tokens(SESSION, 0, 2**62, (1,), False),
        Tokens(SESSION, 0, 0, (1,) * 65, True),
    ],
)
async def test_wrong_tokens_end_their_session(tmp_path: Path, autojump_clock: MockClock, frame: Tokens) -> None:
    async with victim_and_villain(tmp_path) as (victim, villain):
        await villain.open(villain.opening())
        await villain.send(frame)
        await until(lambda: villain.failures())
        assert not victim.service.stage.seats
        assert villain.failures()[0].culprit == villain.me


@pytest.mark.parametrize(
    "frame",
    [
        activations(dtype="float64"),
        activations(dtype="float16"),
        activations(data=bytes(8)),
        activations(data=b"\xff" * (4 * HIDDEN)),
        activations(count=2),
        activations(position=1),
        activations(trace=()),
        activations(trace=((1, 1),) * 64),
    ],
)
async def test_wrong_activations_end_their_session(
    tmp_path: Path, autojump_clock: MockClock, frame: Activations
) -> None:
    async with victim_and_villain(tmp_path) as (victim, villain):
        route = (Leg(villain.me, 0, 2), Leg(villain.target, 3, UNITS - 1))
        await villain.open(villain.opening(route=route, stage=1))
        await villain.send(frame)
        await until(lambda: villain.failures())
        assert not victim.service.stage.seats
        assert villain.failures()[0].culprit == villain.me


async def test_a_prompt_that_never_ends_expires(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with victim_and_villain(tmp_path) as (victim, villain):
        await villain.open(villain.opening())
        for position in range(64):
            await villain.send(Tokens(SESSION, 0, position, (5,), True))
        await until(lambda: not victim.service.stage.seats[SESSION].inputs, within=5)
        await until(lambda: villain.failures(), within=200)


async def test_a_stage_told_to_send_to_nobody_fails_that_session(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with victim_and_villain(tmp_path) as (_victim, villain):
        route = (Leg(villain.target, 0, 2), Leg("nobody at all", 3, UNITS - 1))
        await villain.open(villain.opening(route=route))
        await villain.send(Tokens(SESSION, 0, 0, (5,), False))
        await until(lambda: villain.failures())
        assert villain.failures()[0].culprit == "nobody at all"


# --- another epoch ---


def resuming(villain: Villain, **changes: Any) -> Resume:
    made = Resume(SESSION, 1, (Leg(villain.target, 0, UNITS - 1),), 0, 2)
    return replace(made, **changes)


async def fed(victim: Member, villain: Villain) -> None:
    """A session of the villain's in which three positions are done."""
    await villain.open(villain.opening())
    await villain.send(Tokens(SESSION, 0, 0, (5, 6, 7), False))
    await until(lambda: any(isinstance(frame, Drawn) and frame.position > 5 for frame in villain.heard))


@pytest.mark.parametrize(
    "changes",
    [
        {"session": bytes(16)},
        {"epoch": 0},
        {"stage": 1},
        {"route": (Leg("somebody", 0, UNITS - 1),)},
        {"route": (Leg("somebody", 0, 2), Leg("somebody else", 3, UNITS - 1))},
        {"position": 64},
        {"position": 2**24},
    ],
)
async def test_a_resume_that_cannot_be_is_refused_and_changes_nothing(
    tmp_path: Path, autojump_clock: MockClock, changes: dict[str, Any]
) -> None:
    async with victim_and_villain(tmp_path) as (victim, villain):
        await fed(victim, villain)
        seat = victim.service.stage.seats[SESSION]
        with pytest.raises(Refused):
            await rpc.call(villain.network, villain.target, RESUME, resuming(villain, **changes))
        assert victim.service.stage.seats[SESSION] is seat
        assert seat.open.epoch == 0


async def test_a_resume_along_an_impossible_route_is_refused_and_costs_points(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with victim_and_villain(tmp_path) as (victim, villain):
        await villain.open(villain.opening(route=(Leg(villain.me, 0, 2), Leg(villain.target, 3, UNITS - 1)), stage=1))
        wrong = (Leg(villain.me, 0, 1), Leg(villain.target, 3, UNITS - 1))
        with pytest.raises(PeerError):
            await rpc.call(villain.network, villain.target, RESUME, resuming(villain, route=wrong, stage=1))
        assert victim.service.stage.seats[SESSION].open.epoch == 0


@pytest.mark.parametrize("keep", [5, 2**24])
async def test_a_replay_of_what_is_not_there_is_refused(tmp_path: Path, autojump_clock: MockClock, keep: int) -> None:
    async with victim_and_villain(tmp_path) as (victim, villain):
        route = (Leg(villain.target, 0, 2), Leg(villain.me, 3, UNITS - 1))
        await villain.open(villain.opening(route=route))
        await villain.send(Tokens(SESSION, 0, 0, (5, 6, 7), False))
        await until(lambda: any(isinstance(frame, Activations) for frame in villain.heard))
        answer = await rpc.call(villain.network, villain.target, RESUME, resuming(villain, route=route))
        assert (answer.held, answer.journal) == (2, 0)
        for replay in (
            Replay(SESSION, 1, keep, 0),
            Replay(SESSION, 0, 2, 0),
            Replay(SESSION, 2, 2, 0),
            Replay(SESSION, 1, 2, 64),
            Replay(bytes(16), 1, 2, 0),
        ):
            with pytest.raises(Refused):
                await rpc.call(villain.network, villain.target, REPLAY, replay)
        victim.service.stage.journals.drop(SESSION)
        with pytest.raises(Refused, match="remembered from position 2"):
            await rpc.call(villain.network, villain.target, REPLAY, Replay(SESSION, 1, 2, 0))
        assert victim.service.stage.seats[SESSION].expected == 2


async def test_only_its_entry_resumes_replays_and_probes_a_session(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with victim_and_villain(tmp_path) as (victim, villain):
        async with victim.service.generate(replace(GREEDY, max_tokens=40)) as stream:
            async for event in stream:
                if isinstance(event, Piece) and event.tokens == 3:
                    (session,) = victim.service.entry.sessions
                    for method, request in (
                        (RESUME, resuming(villain, session=session)),
                        (REPLAY, Replay(session, 0, 0, 0)),
                        (PROBE, Probe(session)),
                    ):
                        with pytest.raises(Refused, match="no such session"):
                            await rpc.call(villain.network, villain.target, method, request)
                    with pytest.raises(Refused, match="open already"):
                        await villain.open(villain.opening(session=session, epoch=9))


async def test_after_a_resume_frames_of_before_are_dropped(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with victim_and_villain(tmp_path) as (victim, villain):
        await fed(victim, villain)
        await rpc.call(villain.network, villain.target, RESUME, resuming(villain))
        seat = victim.service.stage.seats[SESSION]
        assert (seat.expected, seat.cache.length) == (2, 2)
        for frame in (Tokens(SESSION, 0, 2, (7,), False), Tokens(SESSION, 2, 2, (7,), False), Close(SESSION, 0)):
            await villain.send(frame)
        await trio.sleep(1)
        assert victim.service.stage.seats[SESSION] is seat
        assert seat.expected == 2
        first = [frame for frame in villain.heard if isinstance(frame, Drawn) and frame.epoch == 0]
        await villain.send(Tokens(SESSION, 1, 2, (7,), False))
        await until(lambda: any(isinstance(frame, Drawn) and frame.epoch == 1 for frame in villain.heard))
        again = [frame for frame in villain.heard if isinstance(frame, Drawn) and frame.epoch == 1]
        assert (again[0].position, again[0].token) == (first[0].position, first[0].token)


async def test_an_opening_at_a_higher_epoch_takes_the_place_of_the_old_seat(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with victim_and_villain(tmp_path) as (victim, villain):
        await fed(victim, villain)
        await villain.open(villain.opening(epoch=1))
        assert len(victim.service.stage.seats) == 1
        assert victim.service.stage.seats[SESSION].expected == 0
        await villain.send(Close(SESSION, 3))
        await until(lambda: not victim.service.stage.seats)
        await villain.send(Close(SESSION, 3))
        await trio.sleep(1)
        with pytest.raises(Refused, match="closed before"):
            await villain.open(villain.opening(epoch=3))
        await villain.open(villain.opening(epoch=4))


async def test_a_resume_during_a_step_waits_for_its_end(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with victim_and_villain(tmp_path) as (victim, villain):
        gate = Gate(victim.service.workers.compute)
        monkeypatch.setattr(victim.service.stage, "_compute", gate)
        await villain.open(villain.opening())
        await villain.send(Tokens(SESSION, 0, 0, (5, 6, 7), False))
        await gate.reached.wait()
        answers: list[Any] = []

        async def resume() -> None:
            answers.append(await rpc.call(villain.network, villain.target, RESUME, resuming(villain)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(resume)
            await trio.sleep(1)
            assert not answers
            gate.open.set()
        assert answers[0].held == 2
        assert not any(isinstance(frame, Drawn) for frame in villain.heard)  # what came of the old step is void


class Gate:
    """A compute lane whose next step waits to be let through."""

    def __init__(self, inner: Lane) -> None:
        self.inner, self.reached, self.open = inner, trio.Event(), trio.Event()
        self.closed_meanwhile: bool | None = None

    async def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.reached.set()
        await self.open.wait()
        self.closed_meanwhile = any(work.cache.closed for work in args[0])
        return await self.inner.run(function, *args, **kwargs)


async def test_a_close_during_a_step_does_not_free_what_the_step_uses(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with victim_and_villain(tmp_path) as (victim, villain):
        gate = Gate(victim.service.workers.compute)
        monkeypatch.setattr(victim.service.stage, "_compute", gate)
        await villain.open(villain.opening())
        await villain.send(Tokens(SESSION, 0, 0, (5,), False))
        await gate.reached.wait()
        await villain.send(Close(SESSION, 0))
        await until(lambda: not victim.service.stage.seats)
        gate.open.set()
        await until(lambda: gate.closed_meanwhile is not None)
        assert gate.closed_meanwhile is False


# --- a hostile stage in the route of an honest entry ---


@asynccontextmanager
async def villain_draws(villain: Villain, reply: Callable[[bytes, int], list[Any]]) -> AsyncIterator[None]:
    """Let the villain claim to serve everything, faster than anybody, and answer prompts with ``reply``."""
    await until(lambda: villain.victim.service.library.models())
    model = villain.victim.service.library.models()[0]

    async def accept(_peer: PeerId, request: Open) -> Opened:
        await trio.lowlevel.checkpoint()
        return Opened(request.epoch)

    rpc.serve(villain.network, OPEN, accept, concurrency=8)
    await villain.claim(Held(model.id, model.version, 0, UNITS - 1, SERVING), layer_us=1)
    entry = villain.victim.service.entry
    entry.measurements.round_trips[villain.me] = 1e-6
    monkey = cast(Any, villain.victim.service.stage)
    monkey.layer_us = 10**6
    villain.victim.service.heart.urgent.beat()
    await trio.sleep(1)

    async def answer() -> None:
        done = 0
        while True:
            await trio.sleep(0.01)
            for frame in villain.heard[done:]:
                if isinstance(frame, Tokens) and not frame.more:
                    for back in reply(frame.session, frame.position + len(frame.ids)):
                        await villain.send(back)
            done = len(villain.heard)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(answer)
        yield
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "reply",
    [
        lambda session, position: [Drawn(session, 0, position, VOCABULARY, ((1, 0),))],
        lambda session, position: [Drawn(session, 0, position, 2**31, ((1, 0),))],
        lambda session, position: [Drawn(session, 0, position + 1, 7, ((1, 0),))],
        lambda session, _position: [Failed(session, 0, "won't", "a third party")],
    ],
)
async def test_a_stage_that_draws_nonsense_is_left_and_the_text_is_right(
    tmp_path: Path, autojump_clock: MockClock, reply: Callable[[bytes, int], list[Any]]
) -> None:
    async with victim_and_villain(tmp_path) as (victim, villain):
        expected, _ = await ask(victim, GREEDY)
        async with villain_draws(villain, reply):
            finished, events = await ask(victim, GREEDY)
        assert any(isinstance(frame, Tokens) for frame in villain.heard)
        assert finished.text == expected.text
        assert sum(isinstance(event, Started) for event in events) == 1


async def test_a_stage_that_floods_tokens_fills_a_bounded_mailbox(tmp_path: Path, autojump_clock: MockClock) -> None:
    def flood(session: bytes, position: int) -> list[Any]:
        return [Drawn(session, 0, position, 7, ((1, 0),) * 64)] * 300

    async with victim_and_villain(tmp_path) as (victim, villain):
        async with villain_draws(villain, flood):
            finished, _ = await ask(victim, GREEDY)
        assert finished.completion_tokens == 4


async def test_an_entry_hears_of_its_route_after_a_first_refusal(tmp_path: Path, autojump_clock: MockClock) -> None:
    """The first event is Started, however many routes were refused before one opened."""
    async with victim_and_villain(tmp_path) as (victim, villain):
        async with villain_draws(villain, lambda _session, _position: []):

            async def refuse(_peer: PeerId, _request: Open) -> Opened:
                await trio.lowlevel.checkpoint()
                raise Refused("full")

            rpc.serve(villain.network, OPEN, refuse, concurrency=8)
            _, events = await ask(victim, GREEDY)
        assert isinstance(events[0], Started)


# --- claims ---


async def test_a_claim_beyond_the_model_disturbs_nobody(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with victim_and_villain(tmp_path) as (victim, villain):
        model = victim.service.library.models()[0]
        await villain.claim(Held(model.id, model.version, 0, 4096, SERVING), stored=(Stored(model.id, b"\xff" * 512),))
        await trio.sleep(3)
        assert victim.service.status().models[0].coverage == (1,) * UNITS
        await ask(victim, GREEDY)


@pytest.mark.parametrize("spec", [b"{}", b"\xff", b'{"layers": 1000000000}'])
async def test_a_model_of_no_sense_neither_stops_nor_hides_a_good_one(
    tmp_path: Path, autojump_clock: MockClock, spec: bytes
) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint")
    async with open_swarm(tmp_path) as swarm:
        node = await swarm.start(0)
        submissions = node.service.submissions
        manifest = await submissions.originate(Manifest("bad", spec, ("u",), BlobRef(bytes(32), 1)))
        layer = await submissions.originate(Layer(manifest.id, 0, BlobRef(bytes(32), 1)))
        await submissions.carried([manifest.id, layer.id])
        assert node.service.models() == ()
        with pytest.raises(ModelUnavailable):
            await ask(node, GREEDY)
        await publish(node, checkpoint)
        await until(lambda: node.service.ready() is None)
        await ask(node, GREEDY)


async def test_a_model_that_nobody_has_keeps_nobody_from_serving_another(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint")
    spec = open_checkpoint(checkpoint).spec
    async with open_swarm(tmp_path) as swarm:
        node = await swarm.start(0)
        submissions = node.service.submissions
        lost = Manifest("lost", spec.to_json(), spec.units, BlobRef(bytes([9] * 32), 99))
        manifest = await submissions.originate(lost)
        layers = [Layer(manifest.id, unit, BlobRef(bytes([unit] * 32), 99)) for unit in range(UNITS)]
        await submissions.carried([(await submissions.originate(layer)).id for layer in layers])
        await trio.sleep(5)
        assert node.service.holder.plan is None
        async with open_villain(swarm, node) as villain:
            # it claims to have it, and has not
            await villain.claim(stored=(Stored(manifest.id, bits_of(frozenset(range(UNITS)))),))
            await publish(node, checkpoint)
            await until(lambda: node.service.stage.loaded is not None, within=300)
            assert node.service.stage.loaded is not None
            assert node.service.stage.loaded.model != manifest.id


# --- the holder of the victim ---


async def test_a_node_that_leaves_says_so_and_takes_no_new_session(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with victim_and_villain(tmp_path) as (victim, villain):
        loaded = victim.service.stage.loaded
        opening = villain.opening()
        await victim.service.holder.drain()
        with pytest.raises(Refused):
            await villain.open(opening)
        await trio.sleep(5)
        assert victim.service.holder.plan is not None
        assert victim.service.holder.plan.state == DRAINING
        victim.service.holder.draining = False  # for the check at the end
        victim.service.stage.loaded = loaded
        victim.service.holder._announce(victim.service.holder._serving)
        await trio.sleep(1)


async def test_a_shard_that_cannot_be_loaded_is_tried_again_and_the_node_lives(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    from blyan_node.model.shard import Shard

    checkpoint = tiny_checkpoint(tmp_path / "checkpoint")
    real, failures = Shard.load, [RuntimeError("out of memory"), MemoryError(), OSError("mmap")]

    def load(*args: Any, **kwargs: Any) -> Shard:
        if failures:
            raise failures.pop()
        return real(*args, **kwargs)

    monkeypatch.setattr(Shard, "load", load)
    async with open_swarm(tmp_path) as swarm:
        node = await swarm.start(0)
        await publish(node, checkpoint)
        await until(lambda: node.service.ready() is None)
        await ask(node, GREEDY)


async def test_a_generation_that_ends_early_keeps_its_text(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with victim_and_villain(tmp_path) as (victim, _):
        text, stage, loaded = "", victim.service.stage, victim.service.stage.loaded

        async def generate() -> None:
            nonlocal text
            async with victim.service.generate(replace(GREEDY, max_tokens=60)) as stream:
                async for event in stream:
                    if isinstance(event, Piece):
                        text += event.text
                        if event.tokens >= 5:
                            stage.loaded = None
                            for seat in list(stage.seats.values()):
                                stage._fail(seat, "the test says so")

        with pytest.raises(GenerationFailed) as caught:
            await generate()
        assert caught.value.partial == text
        stage.loaded = loaded
        await trio.sleep(130)  # until nobody is avoided any more


async def test_a_heartbeat_forged_for_another_is_not_believed(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with victim_and_villain(tmp_path) as (victim, villain):
        word = replace(
            heartbeat(victim.service.network.peer_id, 2**62), network=victim.service.relay.replica.genesis.network
        )
        await villain.network.publish(HEARTBEAT_TOPIC, sign(word, villain.key))
        await trio.sleep(1)
        assert victim.service.status().models[0].coverage == (1,) * UNITS
