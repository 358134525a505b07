"""A peer that computes something else is found out and routed around; one that only rounds differently is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trio
from trio.testing import MockClock

from blyan_node.errors import ModelUnavailable, ProtocolViolation, Refused
from blyan_node.inference.challenge import LONGEST
from blyan_node.inference.generation import Generate, Message, Sampling
from blyan_node.inference.messages import CHALLENGE, Challenge
from blyan_node.inference.route import plan
from blyan_node.model.shard import Shard
from blyan_node.p2p import rpc
from tests.support.models import tiny_checkpoint
from tests.support.swarm_net import Member, ask, open_swarm, publish, until

GREEDY = Generate((Message("user", "Tell me of the sea"),), max_tokens=4, sampling=Sampling(temperature=0))

Lie = Callable[[torch.Tensor], torch.Tensor]

LIES: dict[str, Lie] = {
    "noise": lambda rows: rows + 0.01 * rows.abs().mean() * torch.randn_like(rows),
    "rounding": lambda rows: rows.bfloat16().float(),
    "zeroes": torch.zeros_like,
    "other": lambda rows: rows.roll(1, dims=1),
}


def shard_of(member: Member) -> Shard:
    assert member.service.stage.loaded is not None
    return member.service.stage.loaded.shard


def make_lie(member: Member, lie: Lie) -> None:
    """Have a node give out something else than what its layers compute, in sessions and challenges alike."""
    shard = shard_of(member)
    real = shard._run

    def run(works: object) -> torch.Tensor:
        return lie(real(works))  # type: ignore[arg-type]

    shard._run = run  # type: ignore[method-assign]


def distrusted(judge: Member, peer: Member) -> bool:
    standing = judge.service.entry.measurements.standing
    return standing.is_distrusted(peer.service.network.peer_id, trio.current_time())


def route_of(judge: Member) -> set[str]:
    service = judge.service
    (model,) = service.library.models()
    legs = plan(
        service.view,
        model.id,
        model.version,
        model.units,
        service.entry.measurements,
        me=service.network.peer_id,
        now=trio.current_time(),
    )
    return {leg.peer for leg in legs}


def question_for(member: Member, first: int = 0, last: int = 2) -> Challenge:
    (model,) = member.service.library.models()
    return Challenge(model.id, model.version, first, last, bytes(32), bytes(16))


async def test_liars_are_found_out_and_honest_peers_are_not(tmp_path: Path, autojump_clock: MockClock) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint")
    async with open_swarm(tmp_path) as swarm:
        judge = await swarm.start(0)
        honest = [
            await swarm.start(1, bootstrap=judge),
            await swarm.start(2, bootstrap=judge, dtype="bfloat16"),
        ]
        liars = [await swarm.start(3 + index, bootstrap=judge) for index in range(len(LIES))]
        await publish(judge, checkpoint)
        await until(lambda: all(member.service.stage.loaded for member in [judge, *honest, *liars]))
        for liar, lie in zip(liars, LIES.values(), strict=True):
            make_lie(liar, lie)
        await until(lambda: all(distrusted(judge, liar) for liar in liars))
        await trio.sleep(150)  # after their time would have been up, twice
        assert all(distrusted(judge, liar) for liar in liars)
        assert not any(distrusted(judge, peer) for peer in honest)
        assert not any(distrusted(peer, judge) for peer in honest)
        trusted = {member.service.network.peer_id for member in [judge, *honest]}
        assert route_of(judge) <= trusted
        judge.service.stage.loaded = None
        judge.service.holder.draining = True
        await judge.service.holder.drain()
        assert route_of(judge) <= trusted - {judge.service.network.peer_id}
        finished, _ = await ask(judge, GREEDY)
        assert {hop.peer for hop in finished.route} <= trusted


async def test_who_refuses_to_be_asked_again_has_failed(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint")
    async with open_swarm(tmp_path) as swarm:
        judge = await swarm.start(0)
        liar = await swarm.start(1, bootstrap=judge)
        await publish(judge, checkpoint)
        await until(lambda: judge.service.stage.loaded and liar.service.stage.loaded)
        make_lie(liar, LIES["noise"])
        asked, real = 0, real_summary(liar)

        async def once(_loaded: object, question: Challenge, _peer: object) -> bytes:
            nonlocal asked
            asked += 1
            if asked > 1:
                raise Refused("busy; ask again later")
            summary: bytes = await real(_loaded, question, _peer)
            return summary

        monkeypatch.setattr(liar.service.challenger, "_compute_summary", once)
        await until(lambda: distrusted(judge, liar))
        assert asked > 1


def real_summary(member: Member) -> Any:
    return member.service.challenger._compute_summary


async def test_nothing_runs_through_a_liar_even_where_nobody_else_serves(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint")
    async with open_swarm(tmp_path) as swarm:
        judge, liar = await swarm.start(0), await swarm.start(1)
        await liar.service.network.connect(judge.service.network.addresses()[0])
        await publish(judge, checkpoint)
        await until(lambda: judge.service.stage.loaded and liar.service.stage.loaded)
        make_lie(liar, LIES["noise"])
        await until(lambda: distrusted(judge, liar))
        await judge.service.holder.drain()
        with pytest.raises(ModelUnavailable, match=r"embed\.\.head"):
            route_of(judge)


async def test_a_peer_that_was_mended_is_used_again_in_time(tmp_path: Path, autojump_clock: MockClock) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint")
    async with open_swarm(tmp_path) as swarm:
        judge = await swarm.start(0)
        peer = await swarm.start(1, bootstrap=judge)
        await publish(judge, checkpoint)
        await until(lambda: judge.service.stage.loaded and peer.service.stage.loaded)
        make_lie(peer, LIES["zeroes"])
        await until(lambda: distrusted(judge, peer))
        del shard_of(peer)._run  # type: ignore[method-assign]
        await until(lambda: not distrusted(judge, peer), within=200)
        await trio.sleep(300)
        assert not distrusted(judge, peer)


async def test_a_judge_whose_own_weights_changed_blames_nobody_and_loads_them_again(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint")
    async with open_swarm(tmp_path) as swarm:
        judge = await swarm.start(0)
        peer = await swarm.start(1, bootstrap=judge)
        await publish(judge, checkpoint)
        await until(lambda: judge.service.stage.loaded and peer.service.stage.loaded)
        tampered = shard_of(judge)
        tampered._layers[1]._down._weight.mul_(1.1)
        await until(lambda: judge.service.stage.loaded and shard_of(judge) is not tampered, within=300)
        assert not distrusted(judge, peer)
        shard_of(judge).verify()


async def test_challenges_are_bounded_and_never_run_while_sessions_wait(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint", layers=10)
    async with open_swarm(tmp_path) as swarm:
        asker = await swarm.start(0, memory_limit=1)
        peer = await swarm.start(1, bootstrap=asker)
        await publish(asker, checkpoint)
        await until(lambda: peer.service.stage.loaded is not None)
        network, there = asker.service.network, peer.service.network.peer_id
        question = question_for(peer)
        answer = await rpc.call(network, there, CHALLENGE, question)
        assert answer.dtype == "float32"
        with pytest.raises(Refused, match="busy"):
            await rpc.call(network, there, CHALLENGE, question)
        await trio.sleep(2)
        assert await rpc.call(network, there, CHALLENGE, question) == answer
        await trio.sleep(2)
        with pytest.raises(Refused, match="not served here"):
            await rpc.call(network, there, CHALLENGE, question_for(peer, 9, 12))
        monkeypatch.setattr(type(peer.service.stage), "is_waiting", True)
        with pytest.raises(Refused, match="busy"):
            await rpc.call(network, there, CHALLENGE, question)
        with pytest.raises(ProtocolViolation):
            await peer.service.challenger.answer(network.peer_id, question_for(peer, 0, LONGEST))
        assert shard_of(peer)._pool.free == shard_of(peer)._pool.pages
        assert not shard_of(peer)._sessions
