"""A validator whose disk was lost: it hears the others, abstains, then takes part again. Nobody ever votes twice."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from blyan_node.chain.keys import load_or_create_key, unused_mark
from blyan_node.chain.replica import Replica
from tests.support.network import eventually
from tests.support.validators import KEYS, USERS, Group, genesis_of, validators

LOST = 3


async def pay_until(group: Group, k: int, by: int) -> None:
    """Let one payment after the other become final, carried by a validator, until cut ``k`` is final everywhere."""
    while not group.agree(k):
        before = group[by].replica.final.k
        nonce = group[by].replica.view().next_nonce(USERS[0].address)
        await group[by].submissions.submit(group.pay(USERS[0], USERS[1], 1, nonce))
        await eventually(lambda before=before: group[by].replica.final.k > before, within=60)
        await eventually(group.agree, within=60)


async def test_a_validator_that_lost_its_disk_abstains_and_comes_back(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with validators(tmp_path, 4) as group:
        await pay_until(group, 3, by=0)
        await eventually(lambda: group.witness.heights_of(KEYS[LOST]) == {1, 2, 3})
        node = await group.restart_without_disk(LOST)
        assert node.finality.recovering
        await eventually(lambda: not node.finality.recovering, within=60)
        through = node.replica.finals.abstain_through()
        assert through == 5
        await pay_until(group, 8, by=0)
        voted = group.witness.heights_of(KEYS[LOST])
        assert voted & {4, 5} == set()
        assert voted >= {6, 7}
        await eventually(lambda: not node.author._candidates.is_unacknowledged(KEYS[LOST].address))
        assert {block.header.author for block in node.replica.blocks(limit=1000)} == {key.address for key in KEYS[:4]}
        assert group.witness.double_voters() == set()
        assert not any(peer.replica.is_equivocator(KEYS[LOST].address) for peer in group)


async def test_it_waits_for_the_word_of_more_than_two_thirds(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with validators(tmp_path, 4) as group:
        await pay_until(group, 2, by=0)
        await group[1].stop()
        await group[2].stop()
        blocks = group[0].replica.count()
        node = await group.restart_without_disk(LOST)
        await eventually(group.agree, within=60)
        await group[0].submissions.submit(group.pay(USERS[0], USERS[1], 1, 2))
        await trio.sleep(100)
        assert node.finality.recovering
        assert node.replica.count() == group[0].replica.count() == blocks + 1, "and it writes nothing meanwhile"
        heard = group.witness.heights_of(KEYS[LOST])
        await group.start(1)
        await trio.sleep(100)
        assert node.finality.recovering, "half of the stake is not enough"
        await group.start(2)
        await eventually(lambda: not node.finality.recovering, within=100)
        assert group.witness.heights_of(KEYS[LOST]) == heard
        assert group.witness.double_voters() == set()


async def test_a_loss_in_the_middle_of_a_vote_does_not_make_it_vote_again(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with validators(tmp_path, 4) as group:
        await pay_until(group, 2, by=0)
        await group[2].stop()
        await group[0].submissions.submit(group.pay(USERS[0], USERS[1], 1, 2))
        await eventually(lambda: 3 in group.witness.heights_of(KEYS[LOST]), within=100)
        assert group[0].replica.final.k == 2, "its vote is out, but nothing came of it yet"
        node = await group.restart_without_disk(LOST)
        await group.start(2)
        await eventually(lambda: not node.finality.recovering, within=100)
        assert node.replica.finals.abstain_through() == 4
        await pay_until(group, 6, by=0)
        assert group.witness.double_voters() == set()
        assert group.witness.heights_of(KEYS[LOST]) >= {1, 2, 3, 5}
        assert 4 not in group.witness.heights_of(KEYS[LOST])


async def test_the_memory_of_the_loss_outlives_another_restart(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with validators(tmp_path, 4) as group:
        await pay_until(group, 2, by=0)
        for number in (0, 1, 2):
            await group[number].stop()
        await group.restart_without_disk(LOST)
        node = await group.restart(LOST)
        assert node.finality.recovering
        for number in (0, 1, 2):
            await group.start(number)
        await eventually(lambda: not node.finality.recovering, within=100)
        node = await group.restart(LOST)
        assert node.finality.core.abstain_through == 4
        await pay_until(group, 6, by=0)
        assert group.witness.heights_of(KEYS[LOST]) & {3, 4} == set()
        assert group.witness.heights_of(KEYS[LOST]) >= {5}


async def test_where_nothing_is_final_yet_nobody_abstains(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with validators(tmp_path, 4) as group:
        node = await group.restart_without_disk(LOST)
        await eventually(lambda: not node.finality.recovering, within=60)
        assert node.replica.finals.abstain_through() == 0
        await group[0].stop()
        await pay_until(group, 1, by=1)
        assert group.witness.heights_of(KEYS[LOST]) == {1}


# What the composition root does on start


@pytest.mark.parametrize(
    ("is_new_chain", "is_new_key", "through"),
    [(True, True, 0), (True, False, None), (False, False, 0), (False, True, 0)],
)
def test_a_new_database_under_an_old_key_is_a_loss(
    is_new_chain: bool, is_new_key: bool, through: int | None, tmp_path: Path
) -> None:
    from blyan_node.node import _heed_lost_votes

    genesis, path = genesis_of(4), tmp_path / "node.key"
    load_or_create_key(path)
    if not is_new_key:
        unused_mark(path).unlink()
    if not is_new_chain:
        Replica.open(tmp_path / "chain", genesis).close()
    with Replica.open(tmp_path / "chain", genesis) as replica:
        _heed_lost_votes(replica, unused_mark(path))
        assert replica.finals.abstain_through() == through
        assert not unused_mark(path).exists(), "from now on it counts as used"
    with Replica.open(tmp_path / "chain", genesis) as replica:
        _heed_lost_votes(replica, unused_mark(path))
        assert replica.finals.abstain_through() == through, "and what was decided stays so"
