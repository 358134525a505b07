"""What validators write under load: real authors, mempools and replicas on the memory network and virtual clock."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from blyan_node.chain.genesis import Genesis
from blyan_node.chain.keys import Key
from blyan_node.chain.mempool import Mempool
from blyan_node.chain.records import Record, Transfer, make_record
from blyan_node.chain.replica import Replica
from blyan_node.p2p.memory import MemoryHub
from blyan_node.p2p.peers import Peers
from blyan_node.relay.author import Author
from blyan_node.relay.blocks import Relay
from blyan_node.relay.finality import Finality
from blyan_node.relay.records import Submissions
from blyan_node.worker import Inline
from tests.support.network import eventually, secret

KEYS = [Key(secret(number)) for number in range(4)]
PAYEE = Key(secret(9)).address


class Validator:
    def __init__(self, replica: Replica, submissions: Submissions, key: Key) -> None:
        self.replica, self.submissions, self.key = replica, submissions, key

    def payment(self, nonce: int) -> Record:
        return make_record(self.key, self.replica.genesis.network, Transfer(PAYEE, 1), nonce=nonce)

    def arrived(self) -> int:
        return self.replica.final.state.account(PAYEE).balance


@asynccontextmanager
async def validators(folder: Path) -> AsyncIterator[list[Validator]]:
    genesis = Genesis.make(
        "test", dict.fromkeys((key.address for key in KEYS), 10), created_ms=0, balances={KEYS[0].address: 1000}
    )
    hub, group, addresses = MemoryHub(latency=0.01), [], []
    async with AsyncExitStack() as stack:
        nursery = await stack.enter_async_context(trio.open_nursery())
        for number, key in enumerate(KEYS):
            network = await stack.enter_async_context(hub.open(secret(number)))
            replica = stack.enter_context(Replica.open(folder / f"chain{number}", genesis))
            relay, peers = Relay(network, replica, key, Inline()), Peers(network)
            submissions = Submissions(network, peers, replica, Mempool(genesis.network), key)
            for part in (relay, Finality(network, peers, relay, key, Inline()), submissions):
                await nursery.start(part.run)
            await nursery.start(Author(relay, submissions, key).run)
            for address in addresses:
                await network.connect(address)
            addresses.append(network.addresses()[0])
            group.append(Validator(replica, submissions, key))
        yield group
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(("payments", "every", "most"), [(1, 0.0, 4), (60, 0.0, 40), (60, 0.05, 60)])
async def test_payments_that_come_together_share_blocks_and_acknowledgements(
    tmp_path: Path, autojump_clock: MockClock, payments: int, every: float, most: int
) -> None:
    async with validators(tmp_path) as group:
        for nonce in range(payments):
            await group[0].submissions.submit(group[0].payment(nonce))
            await trio.sleep(every)
        await eventually(lambda: all(each.arrived() == payments for each in group), within=3)
        await trio.sleep(10)
        assert len({each.replica.heads() for each in group}) == 1
        assert group[0].replica.count() <= most
