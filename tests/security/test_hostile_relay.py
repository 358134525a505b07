"""A hostile neighbour of a relay: false heads, endless pages, orphans, garbage. It costs it points, and us little."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from blyan_node.chain.block import Block
from blyan_node.errors import PeerError
from blyan_node.p2p import rpc
from blyan_node.relay.blocks import TOPIC
from blyan_node.relay.messages import GET_SINCE, Blocks, Cursor, GetSince, Since, Status
from tests.support.chains import KEYS, NETWORK, STRANGER, Forge
from tests.support.network import eventually
from tests.support.villain import foreign_heads, victim_and_villain


def cursor(block: Block, k: int = 1) -> Cursor:
    return Cursor(k, block.height, block.id)


async def test_heads_that_nobody_has_do_not_keep_a_node_busy(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with victim_and_villain(tmp_path) as (_victim, villain, _):
        villain.status = Status(NETWORK, 2**62, 0, NETWORK, 0, foreign_heads())
        villain.serve()
        await villain.connect()
        began = trio.current_time()
        for _ in range(500):
            if villain.is_out():
                break
            await villain.tell()
            await trio.sleep(0.01)
        spent = trio.current_time() - began
        assert villain.asked["status"] <= 2 + spent / 1.0
        assert villain.asked["blocks"] <= 4 * villain.asked["status"]


async def test_words_of_a_peer_that_left_are_not_kept(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with victim_and_villain(tmp_path) as (victim, villain, honest):
        villain.serve()
        await villain.connect()
        await villain.tell()
        await villain.network.disconnect(victim.id)
        await trio.sleep(0.1)
        await victim.relay._on_status(villain.network.peer_id, villain.status)  # a request that was under way
        assert set(victim.relay._heads_of) <= {honest.id}


async def test_garbage_for_blocks_costs_the_sender_its_place(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with victim_and_villain(tmp_path) as (victim, villain, _):
        villain.status = Status(NETWORK, 9, 0, NETWORK, 0, (bytes([1] * 32),))
        villain.serve(blocks=lambda _request: Blocks((b"garbage", b"", bytes(1000), b"more")))
        await villain.connect()
        await eventually(villain.is_out, within=30)
        assert victim.replica.count() == 0


async def test_blocks_of_strangers_are_not_taken(tmp_path: Path, autojump_clock: MockClock) -> None:
    forge = Forge()
    forged = [forge.block(STRANGER) for _ in range(10)]
    async with victim_and_villain(tmp_path) as (victim, villain, _):
        villain.status = Status(NETWORK, 9, 0, NETWORK, 0, (bytes([1] * 32),))
        villain.serve(since=lambda _request: Since(tuple(each.raw for each in forged), cursor(forged[-1])))
        await villain.connect()
        await eventually(villain.is_out, within=30)
        assert victim.replica.count() == 0


def orphans(count: int) -> list[Block]:
    """Blocks of a bonded author, whose first is never shown."""
    forge = Forge()
    return [forge.block(KEYS[6]) for _ in range(count + 1)][1:]


async def test_pages_of_orphans_come_to_an_end(tmp_path: Path, autojump_clock: MockClock) -> None:
    supply = orphans(600)

    def since(request: GetSince) -> Since:
        page = [block for block in supply if block.height > request.after.height][:4]
        return Since(tuple(block.raw for block in page), cursor(page[-1]) if page else None)

    async with victim_and_villain(tmp_path) as (victim, villain, _):
        villain.status = Status(NETWORK, 9, 0, NETWORK, 0, (supply[-1].id,))
        villain.serve(since=since)
        await villain.connect()
        await eventually(villain.is_out, within=200)
        assert villain.asked["since"] < 60
        assert victim.replica.count() == 0


async def test_a_page_that_repeats_itself_is_a_violation(tmp_path: Path, autojump_clock: MockClock) -> None:
    forge = Forge()
    same = [forge.block(KEYS[6]) for _ in range(3)]
    page = Since(tuple(block.raw for block in same), cursor(same[-1]))
    async with victim_and_villain(tmp_path) as (victim, villain, honest):
        villain.status = Status(NETWORK, 9, 0, NETWORK, 0, (bytes([7] * 32),))
        villain.serve(since=lambda _request: page)
        await villain.connect()
        await eventually(villain.is_out, within=200)
        assert villain.asked["since"] < 20
        await eventually(lambda: honest.replica.count() == 3)  # what was good in it is kept, and told
        assert victim.replica.count() == 3


async def test_a_storm_of_gossiped_orphans_is_borne(tmp_path: Path, autojump_clock: MockClock) -> None:
    storm = orphans(1500)
    async with victim_and_villain(tmp_path) as (victim, villain, _):
        villain.serve()
        await villain.connect()
        async with villain.network.subscribe(TOPIC, lambda _origin, _data: True, capacity=1):
            for block in storm:
                await villain.network.publish(TOPIC, block.raw)
            await trio.sleep(2)
        assert victim.replica.count() == 0
        assert len(victim.replica._orphans) <= 1024


async def test_gossip_that_is_wrong_in_itself_costs_points(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with victim_and_villain(tmp_path) as (_victim, villain, _):
        villain.serve()
        await villain.connect()
        for data in (b"", b"garbage", bytes(40_000), b"\x93\x01\x02\x03", bytes(10)):
            await villain.network.publish(TOPIC, data)
        await eventually(villain.is_out)


async def test_a_page_is_read_no_further_than_it_is_sent(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    from blyan_node.chain.records import sign_record

    async with victim_and_villain(tmp_path) as (victim, villain, honest):
        for nonce in range(20):
            records = [sign_record(KEYS[0], NETWORK, "note", bytes(100_000), nonce=nonce)] * 2
            victim.replica.author(KEYS[0], tuple(records), chain="T", type="data", now_ms=1)
        await eventually(lambda: honest.replica.count() == 20, within=30)
        villain.serve()
        await villain.connect()
        read = 0
        real = victim.replica.get

        def get(id: bytes) -> bytes | None:
            nonlocal read
            read += 1
            return real(id)

        monkeypatch.setattr(victim.replica, "get", get)
        page = await rpc.call(villain.network, victim.id, GET_SINCE, GetSince(Cursor(1, 0, bytes(32))))
        assert 1 <= len(page.blocks) <= 6
        assert read <= len(page.blocks) + 1


async def test_malformed_requests_cost_points(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with victim_and_villain(tmp_path) as (_victim, villain, _):
        villain.serve()
        await villain.connect()
        for heads in ((b"short",), (*foreign_heads(), bytes([9] * 32))):
            for _ in range(5):
                if villain.is_out():
                    return
                with pytest.raises(PeerError):
                    await villain.tell(Status(NETWORK, 0, 0, NETWORK, 0, heads))
        await eventually(villain.is_out)
