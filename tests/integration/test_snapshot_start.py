"""Newcomers and late-comers on the memory network: they start from a neighbour's snapshot where that is due."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from blyan_node.chain.checkpoint import Checkpoint
from blyan_node.chain.replica import Replica
from blyan_node.chain.retention import Retention
from blyan_node.chain.verify import Fault, verify
from blyan_node.p2p import rpc
from blyan_node.p2p.memory import MemoryHub
from blyan_node.p2p.peers import Peers
from blyan_node.p2p.transport import Network
from blyan_node.relay.blocks import Relay
from blyan_node.relay.finality import Finality
from blyan_node.relay.messages import GET_STATE, GET_STUBS, GetSince, GetState, Since, StatePage
from blyan_node.worker import Inline
from tests.support.chains import STRANGER
from tests.support.decided import GENESIS, Decided, write_chain
from tests.support.network import eventually, secret

ARCHIVE = Retention(every=2, bodies=None)
PRUNING = Retention(every=2, bodies=3)


@dataclass
class Node:
    network: Network
    replica: Replica
    relay: Relay


@dataclass
class Net:
    """Nodes that have no say: they follow what was decided before."""

    stack: AsyncExitStack
    nursery: trio.Nursery
    hub: MemoryHub
    folder: Path

    async def start(
        self,
        number: int,
        retention: Retention,
        *,
        checkpoint: Checkpoint | None = None,
        lie: Callable[[Node], None] | None = None,
    ) -> Node:
        network = await self.stack.enter_async_context(self.hub.open(secret(number)))
        replica = Replica.open(self.folder / f"chain{number}", GENESIS, retention=retention, checkpoint=checkpoint)
        self.stack.enter_context(replica)
        relay = Relay(network, replica, STRANGER, Inline())
        peers = Peers(network, bootstrap=(), path=self.folder / f"peers{number}.json")
        finality = Finality(network, peers, relay, STRANGER, Inline())
        await self.nursery.start(relay.run)
        await self.nursery.start(finality.run)
        node = Node(network, replica, relay)
        if lie is not None:
            lie(node)
        return node


@asynccontextmanager
async def net(folder: Path) -> AsyncIterator[Net]:
    """A net to be; node 0 will have a chain of nine cuts without the bodies of the first ones, node 1 all of it."""
    write_chain(folder / "chain0", PRUNING)
    write_chain(folder / "chain1", ARCHIVE)
    async with AsyncExitStack() as stack:
        nursery = await stack.enter_async_context(trio.open_nursery())
        yield Net(stack, nursery, MemoryHub(latency=0.01), folder)
        nursery.cancel_scope.cancel()


def same(one: Node, other: Node) -> bool:
    return (one.replica.final.root, one.replica.heads()) == (other.replica.final.root, other.replica.heads())


async def test_a_newcomer_starts_from_a_snapshot_and_follows(tmp_path: Path, autojump_clock: MockClock):
    async with net(tmp_path) as made:
        old, new = await made.start(0, PRUNING), await made.start(2, PRUNING)
        await new.network.connect(old.network.addresses()[0])
        await eventually(lambda: same(old, new), within=5)
        assert new.replica.finals.stripped == 8
        Decided(old.replica).decide()
        old.relay.changed.beat()
        await eventually(lambda: new.replica.final.k == 10, within=15)
        assert same(old, new)
    assert [each for each in verify(tmp_path / "chain2", GENESIS) if isinstance(each, Fault)] == []


async def test_an_archive_replays_everything_from_another_and_nothing_from_who_has_pruned(
    tmp_path: Path, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
):
    async with net(tmp_path) as made:
        pruned, whole, new = [await made.start(n, r) for n, r in enumerate([PRUNING, ARCHIVE, ARCHIVE])]
        await new.network.connect(pruned.network.addresses()[0])
        await eventually(lambda: "It needs an archive to follow" in caplog.text, within=5)
        assert new.replica.final.k == 0
        await new.network.connect(whole.network.addresses()[0])
        await eventually(lambda: same(whole, new), within=15)
        assert new.replica.finals.stripped == 0
        assert pruned.network.peer_id in new.network.neighbours()


async def test_who_was_away_for_too_long_starts_anew_and_keeps_what_was_its_own(
    tmp_path: Path, autojump_clock: MockClock
):
    async with net(tmp_path) as made:
        whole, late = await made.start(1, ARCHIVE), await made.start(2, PRUNING)
        for k in (1, 2):
            for _, id in whole.replica.window_of(k):
                late.replica.accept(whole.replica.get(id) or b"")
            stored = whole.replica.finals.stored(k)
            assert stored is not None
            late.replica.commit(stored.cut, stored.certificate)
        mine = late.replica.window_of(2)[0][1]
        old = await made.start(0, PRUNING)
        await late.network.connect(old.network.addresses()[0])
        await eventually(lambda: same(old, late), within=5)
        assert late.replica.finals.stripped == 8
        assert late.replica.has(mine)


def left_behind(folder: Path) -> list[Path]:
    return [*folder.glob("*.new"), *folder.glob("*.old")]


def tampering(node: Node) -> None:
    async def state(_peer: object, request: GetState) -> StatePage:
        page = node.replica.finals.page(8, 0)
        assert page is not None
        return StatePage(8, replace(page, rows=page.rows[:-1]))

    rpc.serve(node.network, GET_STATE, state, concurrency=4)


def withholding(node: Node) -> None:
    async def stubs(_peer: object, request: GetSince) -> Since:
        return Since((), request.after)

    rpc.serve(node.network, GET_STUBS, stubs, concurrency=4)


@pytest.mark.parametrize("lie", [tampering, withholding])
async def test_a_neighbour_that_lies_pays_and_changes_nothing(
    tmp_path: Path, autojump_clock: MockClock, lie: Callable[[Node], None]
):
    async with net(tmp_path) as made:
        liar, new = await made.start(0, PRUNING, lie=lie), await made.start(2, PRUNING)
        await new.network.connect(liar.network.addresses()[0])
        await eventually(lambda: liar.network.peer_id not in new.network.neighbours(), within=120)
        assert (new.replica.final.k, new.replica.count()) == (0, 0)
        honest = await made.start(1, ARCHIVE)
        await new.network.connect(honest.network.addresses()[0])
        await eventually(lambda: same(honest, new), within=5)
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize("retention", [PRUNING, ARCHIVE])
async def test_only_a_history_that_goes_through_the_checkpoint_is_followed(
    tmp_path: Path, autojump_clock: MockClock, retention: Retention
):
    async with net(tmp_path) as made:
        old = await made.start(1, ARCHIVE)
        right, wrong = Checkpoint(5, old.replica.finals.anchor(5)[0]), Checkpoint(5, bytes(32))
        good = await made.start(2, retention, checkpoint=right)
        bad = await made.start(3, retention, checkpoint=wrong)
        for node in (good, bad):
            await node.network.connect(old.network.addresses()[0])
        await eventually(lambda: same(old, good), within=5)
        await eventually(lambda: old.network.peer_id not in bad.network.neighbours(), within=120)
        assert bad.replica.final.k == 0


async def test_below_the_checkpoint_nothing_is_decided_however_many_sign(tmp_path: Path, autojump_clock: MockClock):
    async with net(tmp_path) as made:
        old = await made.start(1, ARCHIVE)
        ahead = await made.start(2, ARCHIVE, checkpoint=Checkpoint(100, bytes(32)))
        await ahead.network.connect(old.network.addresses()[0])
        await trio.sleep(30)
        assert ahead.replica.final.k == 0
