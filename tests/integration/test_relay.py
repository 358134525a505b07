"""Replicas that gossip and compare heads: whatever is lost, late, deep or split, all hold the same in the end."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import trio
import trio.lowlevel
from trio.testing import MockClock

from blyan_node.chain.genesis import Genesis
from blyan_node.chain.keys import Key
from blyan_node.chain.replica import Replica
from blyan_node.errors import ConfigError, DiskFull
from blyan_node.p2p.memory import MemoryHub
from blyan_node.p2p.transport import Network, PeerId
from blyan_node.relay.blocks import Relay
from blyan_node.relay.identity import address_of_peer
from blyan_node.worker import Inline
from tests.support.chains import GENESIS, KEYS, NETWORK, STRANGER, Forge
from tests.support.network import eventually, secret


@dataclass
class Peer:
    """A replica, its relay and its network."""

    network: Network
    replica: Replica
    relay: Relay

    @property
    def id(self) -> PeerId:
        return self.network.peer_id

    async def write(self, count: int = 1) -> None:
        for _ in range(count):
            await self.relay.write([], chain="T", type="data")

    async def meet(self, *others: Peer) -> None:
        for other in others:
            await self.network.connect(other.network.addresses()[0])


@asynccontextmanager
async def peers(
    folder: Path, count: int, *, hub: MemoryHub | None = None, genesis: dict[int, Genesis] | None = None
) -> AsyncIterator[list[Peer]]:
    """Running relays that do not know each other yet; each writes with the key of its number."""
    hub = hub or MemoryHub(latency=0.01)
    async with AsyncExitStack() as stack:
        nursery = await stack.enter_async_context(trio.open_nursery())
        of = genesis or {}
        yield [await started(stack, nursery, hub, folder, number, of.get(number, GENESIS)) for number in range(count)]
        nursery.cancel_scope.cancel()


async def started(
    stack: AsyncExitStack, nursery: trio.Nursery, hub: MemoryHub, folder: Path, number: int, genesis: Genesis
) -> Peer:
    network = await stack.enter_async_context(hub.open(secret(number)))
    replica = stack.enter_context(Replica.open(folder / f"chain{number}", genesis))
    relay = Relay(network, replica, key_of(number), Inline())
    await nursery.start(relay.run)
    return Peer(network, replica, relay)


def key_of(number: int) -> Key:
    return KEYS[number] if number < len(KEYS) else STRANGER


def same(group: list[Peer]) -> bool:
    return len({peer.replica.heads() for peer in group}) == 1


async def test_a_block_reaches_everybody_along_a_line(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with peers(tmp_path, 4) as group:
        for left, right in pairwise(group):
            await left.meet(right)
        await group[0].write()
        await eventually(lambda: same(group), within=1)
        await group[3].write()
        await eventually(lambda: same(group), within=1)
        assert group[0].replica.count() == 2


async def test_what_gossip_loses_is_found_by_comparing_heads(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def lose(_topic: str, _data: bytes) -> None:
        await trio.lowlevel.checkpoint()

    async with peers(tmp_path, 3) as group:
        for peer in group:
            monkeypatch.setattr(peer.network, "publish", lose)
        await group[0].meet(group[1])
        await group[1].meet(group[2])
        await group[0].write(3)
        await eventually(lambda: same(group), within=3)
        assert group[2].replica.count() == 3


async def test_a_newcomer_catches_up_with_some_thousands_of_blocks(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with peers(tmp_path, 2) as group:
        for _ in range(3000):
            group[0].replica.author(KEYS[0], (), chain="T", type="data", now_ms=1)
        await group[1].meet(group[0])
        await eventually(lambda: same(group), within=30)
        assert group[1].replica.count() == 3000


async def test_two_sides_of_a_partition_become_one(tmp_path: Path, autojump_clock: MockClock) -> None:
    hub = MemoryHub(latency=0.01)
    async with peers(tmp_path, 4, hub=hub) as group:
        for number, peer in enumerate(group):
            await peer.meet(*group[:number])
        await group[0].write(5)
        await eventually(lambda: same(group))
        hub.partition([group[0].id, group[1].id], [group[2].id, group[3].id])
        for _ in range(30):
            for peer in group:
                await peer.write()
        assert not same(group)
        hub.heal()
        await group[0].meet(group[3])
        await group[1].meet(group[0])
        await group[2].meet(group[3])
        await eventually(lambda: same(group), within=30)
        assert group[0].replica.count() == 5 + 4 * 30
        await group[2].write()
        await eventually(lambda: same(group))
        assert len(group[0].replica.heads()) == 1


async def test_a_neighbour_that_comes_and_goes_in_a_blink_harms_nothing(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with peers(tmp_path, 2) as group:
        for _ in range(40):  # the change of neighbours is told before anybody has acted on the one before
            await group[0].meet(group[1])
            group[0].network.unlink(group[0].network.links[group[1].id])  # type: ignore[attr-defined]
        await group[0].meet(group[1])
        await group[0].write()
        await eventually(lambda: same(group))


async def test_networks_that_differ_part_politely(
    tmp_path: Path, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    other = Genesis.make("other", {KEYS[1].address: 1}, created_ms=5)
    async with peers(tmp_path, 2, genesis={1: other}) as group:
        with caplog.at_level(logging.WARNING, logger="blyan_node.relay"):
            await group[0].meet(group[1])
            await eventually(lambda: not group[0].network.neighbours())
            await trio.sleep(30)
        said = [record.getMessage() for record in caplog.records if "parting" in record.getMessage()]
        assert len(said) == 2  # each, once
        assert any(other.network.hex()[:16] in line and NETWORK.hex()[:16] in line for line in said)
        await group[0].write()  # each goes on by itself
        await group[1].write()


async def test_a_key_without_a_bond_is_told_what_to_do(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with peers(tmp_path, 9) as group:
        with pytest.raises(ConfigError, match="no validator"):
            await group[8].write()


async def test_after_a_lost_disk_nothing_is_written_before_the_neighbours_were_heard(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    hub = MemoryHub(latency=0.2)
    async with peers(tmp_path, 2, hub=hub) as group, AsyncExitStack() as stack:
        await group[0].meet(group[1])
        await group[0].write(40)
        await eventually(lambda: same(group), within=30)
        hub.kill(group[0].id)
        nursery = await stack.enter_async_context(trio.open_nursery())
        again = await started(stack, nursery, hub, tmp_path / "new", 0, GENESIS)
        await again.meet(group[1])
        await trio.lowlevel.checkpoint()
        await again.write()
        await eventually(lambda: same([again, group[1]]))
        assert again.replica.count() == 41
        assert not group[1].replica.is_equivocator(KEYS[0].address)
        nursery.cancel_scope.cancel()


async def test_a_full_disk_stops_the_fetching_not_the_node(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with peers(tmp_path, 2) as group:
        real, full = group[1].replica.accept, True

        def accept(raw: bytes, *, source: str = "") -> object:
            if full:
                raise DiskFull("no space left")
            return real(raw, source=source)

        monkeypatch.setattr(group[1].replica, "accept", accept)
        await group[1].meet(group[0])
        await group[0].write(3)
        await trio.sleep(30)
        assert group[1].replica.count() == 0
        full = False
        await eventually(lambda: same(group), within=30)


async def test_large_blocks_are_fetched_where_they_are_too_large_for_gossip(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    from blyan_node.chain.records import sign_record

    async with peers(tmp_path, 2) as group:
        await group[0].meet(group[1])
        for nonce in range(12):
            record = sign_record(KEYS[0], NETWORK, "note", bytes(100_000), nonce=nonce)
            await group[0].relay.write([record, sign_record(KEYS[0], NETWORK, "note", bytes(99_000), nonce=99)],
                                         chain="T", type="data")  # fmt: skip
        await eventually(lambda: same(group), within=30)
        assert group[1].replica.count() == 12


async def test_gossip_out_of_order_is_put_in_order(tmp_path: Path, autojump_clock: MockClock) -> None:
    forge = Forge()
    blocks = [forge.block(KEYS[5]) for _ in range(20)]
    async with peers(tmp_path, 2) as group:
        await group[0].meet(group[1])
        for block in reversed(blocks):
            await group[0].network.publish("blyan/blocks/1", block.raw)
        await eventually(lambda: group[1].replica.count() == 20, within=5)


async def test_a_neighbour_with_another_kind_of_key_is_nobody(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with peers(tmp_path, 2) as group:
        await group[0].meet(group[1])
        await eventually(lambda: bool(group[0].relay.finals()))
        ed25519 = PeerId("12D3KooWA4Xop1JaT3MHxwYMkCepYsv4iPVopMXwCz5iHYdBfeSB")
        group[0].relay._heads_of[ed25519] = group[1].relay.status()
        address = address_of_peer(group[1].id)
        assert group[0].relay.finals() == {address: 0}
        assert group[0].relay.final_of(address or b"") == 0
        assert group[0].relay.final_of(KEYS[5].address) is None
