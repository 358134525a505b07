"""The journey of a blob: from whoever has it, many chunks at a time, each verified as it arrives."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable

import trio

from blyan_node.chain.blobs import BlobStore, chunk_count
from blyan_node.chain.records import BlobRef
from blyan_node.errors import IntegrityError, PeerError, ProtocolViolation, Refused, StoreError, Unreachable
from blyan_node.p2p import rpc
from blyan_node.p2p.peers import Peers
from blyan_node.p2p.transport import Network, PeerId
from blyan_node.relay.messages import GET_CHUNK, Chunk, GetChunk
from blyan_node.worker import Lane

log = logging.getLogger(__name__)

PER_PEER = 2  # requests under way to one peer: one on the wire while the other is verified and written
SOURCES = 4  # peers that one blob is fetched from at once
BAD_CHUNK = 50
LOOK_AGAIN = 1.0  # seconds between looks for somebody who has the blob
COMPLAIN_AFTER = 5  # such looks in vain, after which the operator is told
SLOW = 5.0  # seconds for one chunk before another peer is asked; doubles while nobody is faster

Providers = Callable[[], list[PeerId]]


class BlobExchange:
    """Fetches blobs from peers and serves one's own."""

    def __init__(self, network: Network, peers: Peers, blobs: BlobStore, disk: Lane) -> None:
        self._network, self._peers, self.blobs, self._disk = network, peers, blobs, disk
        self._fetching: dict[bytes, trio.Event] = {}

    def serve(self) -> None:
        """Answer requests for chunks from now on."""
        rpc.serve(self._network, GET_CHUNK, self._on_get_chunk, concurrency=16)

    async def _on_get_chunk(self, _peer: PeerId, request: GetChunk) -> Chunk:
        ref = BlobRef(request.root, request.size)
        if not self.blobs.has(ref):
            raise Refused("that blob is not here")
        if request.index >= chunk_count(ref):
            raise ProtocolViolation(f"asked for chunk {request.index} of a blob of {chunk_count(ref)}")
        try:
            data, proof = await self._disk.run(self.blobs.get_chunk, ref, request.index)
        except (IntegrityError, StoreError) as error:  # our disk's fault, not the asker's
            log.error("cannot read a chunk that a peer asked for: %s", error)
            raise Refused("that chunk is unreadable here") from error
        return Chunk(data, tuple(proof))

    async def fetch(
        self,
        ref: BlobRef,
        providers: Providers,
        *,
        patience: float = math.inf,
    ) -> None:
        """Bring a blob here, from the peers that ``providers`` names, waiting while there are none.

        Two callers that want the same blob share one fetch. A peer that sends a wrong chunk loses points and is not
        asked again. Raises Unreachable where no chunk came for ``patience`` seconds, DiskFull or StoreError,
        IntegrityError where the chunks do not add up.
        """
        while not self.blobs.has(ref):
            if (other := self._fetching.get(ref.root)) is not None:
                await other.wait()
                continue
            self._fetching[ref.root] = trio.Event()
            try:
                await _Fetch(self, ref, providers, patience).run()
            finally:
                self._fetching.pop(ref.root).set()

    def others(self, providers: Providers) -> list[PeerId]:
        """The providers without this node itself."""
        return [peer for peer in providers() if peer != self._network.peer_id]

    async def chunk_from(self, peer: PeerId, ref: BlobRef, index: int) -> None:
        """Fetch, verify and write one chunk."""
        await self._peers.ensure(peer)
        chunk = await rpc.call(self._network, peer, GET_CHUNK, GetChunk(ref.root, ref.size, index))
        try:
            await self._disk.run(self.blobs.put_chunk, ref, index, chunk.data, chunk.proof)
        except IntegrityError as error:
            self._network.penalise(peer, BAD_CHUNK, str(error))
            raise

    async def verify(self, *refs: BlobRef) -> None:
        """Read whole blobs and check them. Raises IntegrityError for one that the disk changed, which is then gone."""
        await self._disk.run(self._verify, refs)

    def _verify(self, refs: tuple[BlobRef, ...]) -> None:
        for ref in refs:
            try:
                self.blobs.verify(ref)
            except IntegrityError:
                self.blobs.remove(ref)  # what is left of it is worthless: it has to be fetched again
                raise

    async def missing(self, ref: BlobRef) -> list[int]:
        """The chunks that are not here yet; resumes what an earlier run began."""
        return list(await self._disk.run(self.blobs.missing, ref))


class _Fetch:
    """One blob on its way: chunks still wanted, peers that failed."""

    def __init__(
        self,
        exchange: BlobExchange,
        ref: BlobRef,
        providers: Providers,
        patience: float,
    ) -> None:
        self._exchange, self._ref, self._providers = exchange, ref, providers
        self._wanted: deque[int] = deque()
        self._failed: set[PeerId] = set()
        self._patience, self._progress_at = patience, trio.current_time()
        self._slow = SLOW
        self._disk_fault: StoreError | None = None

    async def run(self) -> None:
        in_vain = 0
        while wanted := await self._exchange.missing(self._ref):
            if trio.current_time() - self._progress_at > self._patience:
                raise Unreachable(f"nobody brought blob {self._ref.root.hex()[:16]}: {len(wanted)} chunks are missing")
            self._wanted = deque(wanted)
            sources = [peer for peer in self._exchange.others(self._providers) if peer not in self._failed][:SOURCES]
            if not sources:
                self._failed.clear()  # a peer may have come back; a bad one is kept out by its score
                if (in_vain := in_vain + 1) == COMPLAIN_AFTER:
                    log.warning("there is nobody who has blob %s; waiting for a peer that does", self._ref.root.hex())
                await trio.sleep(LOOK_AGAIN)
                continue
            async with trio.open_nursery() as nursery:
                for peer in sources:
                    for _ in range(PER_PEER):
                        nursery.start_soon(self._draw_from, peer)
            if self._disk_fault is not None:
                raise self._disk_fault

    async def _draw_from(self, peer: PeerId) -> None:
        """Take chunks from one peer until none is wanted or it fails; what it failed to bring is wanted again."""
        while self._wanted and peer not in self._failed and self._disk_fault is None:
            index = self._wanted.popleft()
            try:
                with trio.fail_after(self._slow):
                    await self._exchange.chunk_from(peer, self._ref, index)
                self._progress_at = trio.current_time()
            except trio.TooSlowError:
                log.info("chunk %d of blob %s: %s is slow", index, self._ref.root.hex()[:16], peer)
                self._slow = min(2 * self._slow, GET_CHUNK.timeout)  # it may be the link, not the peer
                self._failed.add(peer)
                self._wanted.append(index)
            except (PeerError, IntegrityError) as error:
                log.info("chunk %d of blob %s from %s: %s", index, self._ref.root.hex()[:16], peer, error)
                self._failed.add(peer)
                self._wanted.append(index)
            except StoreError as error:
                self._disk_fault = error
