"""A payment that an equivocator carried, in a block on which nobody builds, is not lost and blocks nobody's account."""

from __future__ import annotations

from pathlib import Path

import pytest
from trio.testing import MockClock

from blyan_node.chain.records import Record
from blyan_node.relay import blocks
from blyan_node.relay.records import rank_carriers
from tests.support.network import eventually
from tests.support.validators import USERS, Group, fork, validators

CHEAT, ENTRY = 3, 4


async def strand(group: Group, record: Record) -> None:
    """Let the cheat carry a record in one of two blocks that reach everybody before anybody has built on one."""
    for block in fork(group[CHEAT], [(record,), ()]):
        await group[CHEAT].network.publish(blocks.TOPIC, block.raw)
    await eventually(lambda: all(node.replica.is_equivocator(group[CHEAT].key.address) for node in group))


def took_effect(group: Group, record: Record) -> bool:
    results = [node.replica.finals.result(record.id) for node in group]
    return all(result is not None and result.void is None for result in results)


async def test_an_acknowledged_payment_becomes_final_though_its_carrier_forks(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with validators(tmp_path, 4, users=1) as group:
        cheat, state = group[CHEAT], group[ENTRY].replica.final.state
        payer = next(key for key in USERS if rank_carriers(key.address, state)[0] == cheat.key.address)
        monkeypatch.setattr(cheat.submissions.mempool, "next_chain", lambda _view, now_ms: None)
        record = group.pay(payer, USERS[1], 5, 0)
        await group[ENTRY].submissions.submit(record)
        assert not any(node.carried("transfer") for node in group), "it is the turn of the cheat"
        await strand(group, record)
        await eventually(lambda: took_effect(group, record), within=60)


async def test_what_nobody_builds_on_is_not_counted_on(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with validators(tmp_path, 4, users=1) as group:
        stranded, other = (group.pay(USERS[0], payee, 5, 0) for payee in USERS[1:3])
        await strand(group, stranded)
        assert group[ENTRY].replica.view().next_nonce(USERS[0].address) == 0
        await group[ENTRY].submissions.submit(other)
        await eventually(lambda: took_effect(group, other), within=60)
