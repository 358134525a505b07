"""Validators that gossip, author and decide cuts: real replicas and cores on the memory network and virtual clock."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio
from trio.testing import MockClock

from blyan_node.chain.authoring import Pending, wants_to_write
from blyan_node.chain.candidates import Candidates
from blyan_node.chain.genesis import Genesis
from blyan_node.chain.keys import Key
from blyan_node.chain.records import Record, Transfer, make_record
from blyan_node.chain.replica import Replica
from blyan_node.p2p.memory import MemoryHub
from blyan_node.p2p.peers import Peers
from blyan_node.p2p.transport import Network
from blyan_node.relay.blocks import Relay
from blyan_node.relay.finality import Finality
from blyan_node.worker import Inline
from tests.support.network import eventually, secret

KEYS = [Key(secret(number)) for number in range(8)]


@dataclass
class Peer:
    network: Network
    replica: Replica
    relay: Relay
    finality: Finality
    key: Key

    async def acknowledge(self) -> None:
        candidates, mine = Candidates(self.replica), self.key.address
        seen = self.relay.changed.count
        while True:
            pending = Pending(
                False, candidates.is_unacknowledged(mine), candidates.has_content(), candidates.is_anchored(mine)
            )
            if wants_to_write(pending) and self.replica.final.state.may_author(mine):
                await self.relay.write([], chain="T", type="ack")
            seen = await self.relay.changed.after(seen)

    def pay(self, payee: int, amount: int) -> Record:
        nonce = self.replica.view().next_nonce(self.key.address)
        return make_record(self.key, self.replica.genesis.network, Transfer(KEYS[payee].address, amount), nonce=nonce)


@asynccontextmanager
async def validators(folder: Path, count: int, hub: MemoryHub) -> AsyncIterator[list[Peer]]:
    balances = {key.address: 1000 for key in KEYS}
    genesis = Genesis.make("test", {key.address: 10 for key in KEYS[:count]}, created_ms=0, balances=balances)
    async with AsyncExitStack() as stack:
        nursery = await stack.enter_async_context(trio.open_nursery())
        group: list[Peer] = []
        for number in range(count):
            network = await stack.enter_async_context(hub.open(secret(number)))
            replica = stack.enter_context(Replica.open(folder / f"chain{number}", genesis))
            relay = Relay(network, replica, KEYS[number], Inline())
            peers = Peers(network, bootstrap=(), path=folder / f"peers{number}.json")
            finality = Finality(network, peers, relay, KEYS[number], Inline())
            await nursery.start(relay.run)
            await nursery.start(finality.run)
            peer = Peer(network, replica, relay, finality, KEYS[number])
            nursery.start_soon(peer.acknowledge)
            for other in group:
                await network.connect(other.network.addresses()[0])
            group.append(peer)
        yield group
        nursery.cancel_scope.cancel()


async def test_a_payment_becomes_final_everywhere_and_the_net_comes_to_rest(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with validators(tmp_path, 4, MemoryHub(latency=0.01)) as group:
        await group[0].relay.write([group[0].pay(5, 7)], chain="T", type="transfer")
        await eventually(lambda: all(peer.replica.final.k == 1 for peer in group), within=5)
        assert len({peer.replica.final.root for peer in group}) == 1
        assert all(peer.replica.final.state.account(KEYS[5].address).balance == 1007 for peer in group)
        await trio.sleep(30)
        assert {peer.replica.final.k for peer in group} == {1}
        assert [group[1].relay.final_of(key.address) for key in KEYS[:5]] == [1, None, 1, 1, None]
        assert len({peer.replica.heads() for peer in group}) == 1


async def test_both_sides_of_a_partition_go_on_and_agree_once_it_heals(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    hub = MemoryHub(latency=0.01)
    async with validators(tmp_path, 6, hub) as group:
        hub.partition([peer.network.peer_id for peer in group[:3]], [peer.network.peer_id for peer in group[3:]])
        for _ in range(5):
            for peer in group:
                await peer.relay.write([peer.pay(7, 1)], chain="T", type="transfer")
            await trio.sleep(2)
        assert {peer.replica.final.k for peer in group} == {0}
        assert {peer.replica.view().tentative.account(KEYS[7].address).balance for peer in group} == {1015}
        hub.heal()
        for number, peer in enumerate(group):
            for other in group[:number]:
                await peer.network.connect(other.network.addresses()[0])
        await eventually(
            lambda: {peer.replica.final.state.account(KEYS[7].address).balance for peer in group} == {1030}, within=10
        )
        assert len({peer.replica.final.root for peer in group}) == 1
