"""Whoever forks its chain or votes twice is brought to the chain by one of the others, once, and is slashed."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from blyan_node.chain.cut import PRECOMMIT, sign_vote
from blyan_node.chain.effects import pack_message
from blyan_node.chain.records import Arguments, Record
from blyan_node.errors import Overloaded
from blyan_node.relay import blocks, finality
from blyan_node.relay.accuser import TURN
from tests.support.network import eventually
from tests.support.validators import KEYS, STAKE, USERS, WEALTH, Group, Node, fork, validators

CHEAT = KEYS[3]
SUPPLY = 4 * STAKE + len(USERS) * WEALTH
BURNT = STAKE // 2


async def cheat_by_forking(group: Group) -> None:
    for block in fork(group[3]):
        await group[3].network.publish(blocks.TOPIC, block.raw)


async def cheat_by_voting(group: Group) -> None:
    for cut in (None, bytes([1] * 32), bytes([2] * 32)):
        vote = sign_vote(CHEAT, group.genesis.network, k=1, round=0, step=PRECOMMIT, cut=cut)
        await group[3].network.publish(finality.TOPIC, pack_message(vote))


FAULTS = {"double-block": cheat_by_forking, "double-vote": cheat_by_voting}


def is_slashed(node: Node) -> bool:
    return set(node.replica.final.state.slashed) == {CHEAT.address}


def line(group: Group) -> list[int]:
    """The validators in the order in which they accuse."""
    return sorted((0, 1, 2), key=lambda number: group[number].accuser._rank(CHEAT.address))


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_cheat_is_accused_once_and_slashed(fault: str, tmp_path: Path, autojump_clock: MockClock) -> None:
    async with validators(tmp_path, 4) as group:
        await FAULTS[fault](group)
        await eventually(lambda: all(map(is_slashed, group)), within=10)
        await trio.sleep(10 * TURN)
        for node in group:
            ((_, accusation),) = node.carried("evidence")
            assert accusation.sender == KEYS[line(group)[0]].address
            assert fault.encode() in accusation.arguments
            assert not node.replica.final.state.may_author(CHEAT.address)
            assert node.replica.final.state.supply == SUPPLY - BURNT
        assert group.agree()


@pytest.mark.parametrize("fault", FAULTS)
async def test_where_the_first_in_the_line_is_away_the_next_accuses(
    fault: str, tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with validators(tmp_path, 4) as group:
        first, second, _ = line(group)
        await group[first].stop()
        began = trio.current_time()
        await FAULTS[fault](group)
        await eventually(lambda: bool(group[second].carried("evidence")))
        ((_, accusation),) = group[second].carried("evidence")
        assert accusation.sender == KEYS[second].address
        assert trio.current_time() - began >= TURN
        await group.start(first)
        await eventually(lambda: all(map(is_slashed, group)), within=30)
        await trio.sleep(10 * TURN)
        assert all(len(node.carried("evidence")) == 1 for node in group)


async def test_what_could_not_be_brought_is_brought_again(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with validators(tmp_path, 4) as group:
        first, second, _ = line(group)
        failures = 0

        async def refuse(_arguments: Arguments) -> Record:
            nonlocal failures
            await trio.lowlevel.checkpoint()
            failures += 1
            raise Overloaded("not now")

        with monkeypatch.context() as patch:
            patch.setattr(group[first].submissions, "originate", refuse)
            patch.setattr(group[second].submissions, "originate", refuse)
            await cheat_by_forking(group)
            await eventually(lambda: failures >= 3, within=2 * TURN)  # the first one twice, the second one in its turn
        assert caplog.text.count("could not bring the proof") >= 3
        await eventually(lambda: all(map(is_slashed, group)))
        await trio.sleep(10 * TURN)
        effects = [group[0].replica.finals.result(record.id) for _, record in group[0].carried("evidence")]
        assert [effect.void for effect in effects if effect].count(None) == 1, "another one may have tried meanwhile"
        assert group[0].replica.final.state.supply == SUPPLY - BURNT


async def test_a_node_without_a_seat_accuses_nobody(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with validators(tmp_path, 4, users=1) as group:
        for number in (0, 1, 2):
            await group[number].stop()
        await cheat_by_forking(group)
        await eventually(lambda: group[4].replica.is_equivocator(CHEAT.address))
        await trio.sleep(10 * TURN)
        assert len(group[4].submissions.mempool) == 0
        assert group[4].replica.count() == 2


async def test_a_validator_that_votes_and_writes_once_is_left_alone(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with validators(tmp_path, 4) as group:
        vote = sign_vote(CHEAT, group.genesis.network, k=1, round=0, step=PRECOMMIT, cut=None)
        for _ in range(3):
            await group[3].network.publish(finality.TOPIC, pack_message(vote))
        block = fork(group[3], [()])[0]
        for _ in range(2):
            await group[3].network.publish(blocks.TOPIC, block.raw)
        await trio.sleep(10 * TURN)
        assert [node.carried("evidence") for node in group] == [[]] * 4
