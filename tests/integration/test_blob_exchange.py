"""Blobs between peers: many sources, each chunk verified, whatever the sources do."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from blyan_node.chain.blobs import CHUNK, BlobStore
from blyan_node.chain.records import BlobRef
from blyan_node.errors import DiskFull, PeerError, Refused, Unreachable
from blyan_node.p2p import rpc
from blyan_node.p2p.memory import MemoryHub
from blyan_node.p2p.peers import Peers
from blyan_node.p2p.transport import Network, PeerId
from blyan_node.relay.blobs import BlobExchange
from blyan_node.relay.messages import GET_CHUNK, Chunk, GetChunk
from blyan_node.worker import Inline
from tests.support.network import secret

CONTENT = random.Random(7).randbytes(5 * CHUNK + 1234)


@dataclass
class Side:
    """One node's blobs and its exchange, and the chunks that it was asked for."""

    network: Network
    blobs: BlobStore
    exchange: BlobExchange
    asked: list[int]

    @property
    def id(self) -> PeerId:
        return self.network.peer_id


@asynccontextmanager
async def sides(folder: Path, count: int, *, holding: int) -> AsyncIterator[tuple[list[Side], BlobRef, MemoryHub]]:
    """Connected nodes, the first without the blob, the next ``holding`` ones with it."""
    hub = MemoryHub(latency=0.01)
    async with AsyncExitStack() as stack:
        made: list[Side] = []
        ref = BlobRef(bytes(32), 0)
        for number in range(count):
            network = await stack.enter_async_context(hub.open(secret(number)))
            blobs = BlobStore(folder / f"blobs{number}")
            exchange = BlobExchange(network, Peers(network), blobs, Inline())
            exchange.serve()
            made.append(Side(network, blobs, exchange, []))
            if 0 < number <= holding:
                ref = blobs.add([CONTENT])
            for other in made[:-1]:
                await network.connect(other.network.addresses()[0])
        yield made, ref, hub


def answer_with(side: Side, answer: object) -> None:
    """Let a node answer requests for chunks in a way of its own: a function of (request) to Chunk."""

    async def handler(_peer: PeerId, request: GetChunk) -> Chunk:
        side.asked.append(request.index)
        return await answer(request)  # type: ignore[operator,no-any-return]

    rpc.serve(side.network, GET_CHUNK, handler, concurrency=16)


def honest(side: Side) -> object:
    async def answer(request: GetChunk) -> Chunk:
        await trio.sleep(0.1)
        data, proof = side.blobs.get_chunk(BlobRef(request.root, request.size), request.index)
        return Chunk(data, proof)

    return answer


@contextmanager
def faults_of(side: Side) -> Iterator[list[PeerId]]:
    faults: list[PeerId] = []
    side.network.penalise = lambda peer, _points, _why: faults.append(peer)  # type: ignore[method-assign]
    yield faults


async def test_chunks_come_from_several_peers(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with sides(tmp_path, 4, holding=3) as (nodes, ref, _):
        for node in nodes[1:]:
            answer_with(node, honest(node))
        await nodes[0].exchange.fetch(ref, lambda: [node.id for node in nodes])
        assert nodes[0].blobs.path(ref).read_bytes() == CONTENT
        assert all(node.asked for node in nodes[1:])
        assert sorted(index for node in nodes for index in node.asked) == list(range(6))


async def test_a_tampered_chunk_is_fetched_elsewhere_and_its_sender_pays(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with sides(tmp_path, 4, holding=3) as (nodes, ref, _):
        liar = nodes[2]
        truth = honest(liar)

        async def tampered(request: GetChunk) -> Chunk:
            chunk: Chunk = await truth(request)  # type: ignore[operator]
            return Chunk(b"\0" + chunk.data[1:], chunk.proof)

        answer_with(nodes[1], honest(nodes[1]))
        answer_with(liar, tampered)
        with faults_of(nodes[0]) as faults:
            await nodes[0].exchange.fetch(ref, lambda: [node.id for node in nodes])
        assert nodes[0].blobs.path(ref).read_bytes() == CONTENT
        assert set(faults) == {liar.id}
        nodes[0].blobs.verify(ref)


async def test_a_source_that_goes_away_midway_is_replaced(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with sides(tmp_path, 3, holding=2) as (nodes, ref, hub):
        truth = honest(nodes[1])

        async def leaving(request: GetChunk) -> Chunk:
            if len(nodes[1].asked) == 4:
                hub.kill(nodes[1].id)
            return await truth(request)  # type: ignore[operator,no-any-return]

        answer_with(nodes[1], leaving)
        answer_with(nodes[2], honest(nodes[2]))
        providers = [nodes[1].id]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(nodes[0].exchange.fetch, ref, lambda: providers)
            await trio.sleep(3)
            missing = nodes[0].blobs.missing(ref)
            assert 0 < len(missing) < 6
            providers.append(nodes[2].id)
        assert nodes[0].blobs.path(ref).read_bytes() == CONTENT
        assert sorted(nodes[2].asked) == missing  # nothing was fetched twice


async def test_a_fetch_goes_on_where_a_former_run_ended(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with sides(tmp_path, 2, holding=1) as (nodes, ref, _):
        answer_with(nodes[1], honest(nodes[1]))
        with trio.move_on_after(0.25):
            await nodes[0].exchange.fetch(ref, lambda: [nodes[1].id])
        had = 6 - len(nodes[0].blobs.missing(ref))
        assert 0 < had < 6
        again = BlobStore(tmp_path / "blobs0")  # as after a restart
        exchange = BlobExchange(nodes[0].network, Peers(nodes[0].network), again, Inline())
        asked_before = len(nodes[1].asked)
        await exchange.fetch(ref, lambda: [nodes[1].id])
        assert len(nodes[1].asked) == asked_before + 6 - had
        assert again.path(ref).read_bytes() == CONTENT


async def test_two_who_want_the_same_share_one_fetch_and_outlive_each_other(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with sides(tmp_path, 2, holding=1) as (nodes, ref, _):
        answer_with(nodes[1], honest(nodes[1]))
        first = trio.CancelScope()

        async def fetch(scope: trio.CancelScope) -> None:
            with scope:
                await nodes[0].exchange.fetch(ref, lambda: [nodes[1].id])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetch, first)
            await trio.sleep(0.05)
            nursery.start_soon(fetch, trio.CancelScope())
            nursery.start_soon(fetch, trio.CancelScope())
            await trio.sleep(0.2)
            first.cancel()
        assert nodes[0].blobs.has(ref)
        assert len(nodes[1].asked) <= 6 + 2  # besides what the first was cut off from


async def test_a_source_that_stalls_holds_the_blob_up_for_seconds_only(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with sides(tmp_path, 3, holding=2) as (nodes, ref, _):

        async def never(_request: GetChunk) -> Chunk:
            await trio.sleep_forever()

        answer_with(nodes[1], never)
        answer_with(nodes[2], honest(nodes[2]))
        began = trio.current_time()
        await nodes[0].exchange.fetch(ref, lambda: [nodes[1].id, nodes[2].id])
        assert trio.current_time() - began < 10


async def test_a_slow_link_is_borne_with_where_there_is_no_other(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with sides(tmp_path, 2, holding=1) as (nodes, ref, _):
        truth = honest(nodes[1])

        async def slow(request: GetChunk) -> Chunk:
            await trio.sleep(25)
            return await truth(request)  # type: ignore[operator,no-any-return]

        answer_with(nodes[1], slow)
        with trio.fail_after(400):
            await nodes[0].exchange.fetch(ref, lambda: [nodes[1].id])


async def test_peers_that_promise_and_do_not_bring_are_given_up_in_time(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with sides(tmp_path, 3, holding=0) as (nodes, _, _hub):
        ref = BlobRef(bytes([3] * 32), CHUNK)
        for providers in ([], [node.id for node in nodes]):
            began = trio.current_time()
            with pytest.raises(Unreachable, match="1 chunks are missing"):
                await nodes[0].exchange.fetch(ref, lambda found=providers: found, patience=30)  # type: ignore[misc]
            assert 30 <= trio.current_time() - began < 60


async def test_a_full_disk_ends_a_fetch_with_a_clear_error(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with sides(tmp_path, 2, holding=1) as (nodes, ref, _):
        nodes[0].blobs.cap = 3 * CHUNK
        with pytest.raises(DiskFull):
            await nodes[0].exchange.fetch(ref, lambda: [nodes[1].id])
        nodes[0].blobs.cap = None
        await nodes[0].exchange.fetch(ref, lambda: [nodes[1].id])


async def ask(side: Side, peer: Side, request: GetChunk) -> Chunk:
    return await rpc.call(side.network, peer.id, GET_CHUNK, request)


async def test_requests_for_what_is_not_here_are_refused(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with sides(tmp_path, 2, holding=1) as (nodes, ref, _):
        for root, size in ((bytes(32), 5), (ref.root, ref.size + 1), (ref.root, 2**62)):
            with pytest.raises(Refused):
                await ask(nodes[0], nodes[1], GetChunk(root, size, 0))
        with faults_of(nodes[1]) as faults, pytest.raises(PeerError):
            await ask(nodes[0], nodes[1], GetChunk(ref.root, ref.size, 6))
        assert faults == [nodes[0].id]  # whoever knows the size knows the number of chunks


async def test_a_disk_that_fails_is_not_the_askers_fault(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with sides(tmp_path, 2, holding=1) as (nodes, ref, _):
        path = nodes[1].blobs.path(ref)
        path.write_bytes(bytes(len(CONTENT)))
        with faults_of(nodes[1]) as faults, pytest.raises(Refused, match="unreadable"):
            await ask(nodes[0], nodes[1], GetChunk(ref.root, ref.size, 0))
        assert faults == []
