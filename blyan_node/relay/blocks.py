"""The journey of a block, between gossip, the replica and the neighbours' replicas.

Gossip is a hint, fetching is the truth: a block that is small is gossiped whole and usually arrives so; whatever was
missed is found by comparing heads with each neighbour, when something changed and every ten seconds otherwise, since
all that a replica holds lies in the past of its heads.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import islice

import trio

from blyan_node.chain.block import Block, decode_block
from blyan_node.chain.keys import Key, show_address
from blyan_node.chain.records import Record
from blyan_node.chain.replica import Accepted, Known, Orphan, Replica, Surplus
from blyan_node.chain.rules import check_in_isolation
from blyan_node.errors import ConfigError, PeerError, ProtocolViolation, RuleError, StoreError
from blyan_node.p2p import rpc
from blyan_node.p2p.transport import Network, PeerChange, PeerId
from blyan_node.pulse import Pulse
from blyan_node.relay.messages import (
    GET_AFTER,
    GET_BLOCKS,
    MAX_HEADS,
    MAX_IDS,
    MAX_PAGE,
    STATUS,
    Blocks,
    GetAfter,
    GetBlocks,
    Status,
)
from blyan_node.worker import Lane

log = logging.getLogger(__name__)

TOPIC = "blyan/blocks/1"
GOSSIPED = 32 * 1024  # larger blocks are not gossiped: neighbours hear of them by STATUS and fetch them
STATUS_EVERY = 10.0
SHALLOW = 4  # rounds of fetching parents by id before paging by height
PAGE = 512  # blocks in one answer, where they are small
BAD_BLOCK = 25  # points: four invalid blocks and the peer is out
FOREIGN = 100  # points: a peer of another network is refused for a while, lest both dial each other for ever
FAREWELL = 1.0  # seconds in which a peer of another network may find out the same
AGAIN = 1.0  # seconds before a neighbour is asked again that failed, or named heads that it did not send
DISK_AGAIN = 10.0  # seconds before blocks are fetched again that could not be stored
BARREN = 16  # pages with orphans, read from the very beginning, after which a neighbour has withheld their parents
BREATH = 16  # blocks accepted before other tasks get their turn
COMPARE = 30.0  # seconds that a first block of our own waits for the chains of new neighbours


class Relay:
    """Keeps the replica and those of the neighbours the same."""

    def __init__(self, network: Network, replica: Replica, key: Key, disk: Lane) -> None:
        self.network, self.replica, self._key, self._disk = network, replica, key, disk
        self.changed = Pulse()
        self.writing = trio.Lock()
        """To be held by whoever publishes records, from the look at what is there to the last of them."""
        self._heads_of: dict[PeerId, Status] = {}
        self._wakes: dict[PeerId, Pulse] = {}  # of the neighbours that are followed
        self._compared: set[PeerId] = set()  # those of them whose chain has been read, or could not be
        self._settled = Pulse()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve and follow until cancelled."""
        rpc.serve(self.network, STATUS, self._on_status, concurrency=32)
        rpc.serve(self.network, GET_BLOCKS, self._on_get_blocks, concurrency=8)
        rpc.serve(self.network, GET_AFTER, self._on_get_after, concurrency=4)
        async with (
            self.network.subscribe(TOPIC, self._plausible, capacity=1024) as gossip,
            self.network.watch_peers() as changes,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(self._follow_neighbours, changes, nursery)
            task_status.started()
            async for message in gossip:
                try:
                    if self._take(message.data, message.origin):
                        self._wake(message.origin)
                except StoreError as error:
                    log.error("cannot store a block: %s", error)  # comparing heads will bring it again

    # --- a block of our own ---

    async def publish(self, records: Sequence[Record], *, chain: str, type: str) -> Block:
        """Put records into a block of our own and send it out. When this returns, it survives a loss of power.

        First hears what the neighbours have: after a lost disk they know blocks of ours, and a second one in the same
        place would end this key. Raises ConfigError where the key may not write, LocalError, StoreError.
        """
        self.check_bonded()
        with trio.move_on_after(COMPARE):
            while unheard := self.network.neighbours() - self._compared:
                log.info("hearing what %d neighbours have before a block is written", len(unheard))
                await self._settled.after(self._settled.count)
        now_ms = time.time_ns() // 1_000_000
        block = self.replica.author(self._key, tuple(records), chain=chain, type=type, now_ms=now_ms)
        await self._disk.run(self.replica.flush)
        self._notify()
        if len(block.raw) <= GOSSIPED:
            await self.network.publish(TOPIC, block.raw)
        return block

    def check_bonded(self) -> None:
        """Raise ConfigError, with what to do, where this node's key may not write blocks."""
        if self._key.address not in self.replica.genesis.bonded:
            raise ConfigError(
                f"{show_address(self._key.address)} is not bonded on this network and cannot write blocks: "
                "publish from a node that is, or be named in the genesis"
            )

    # --- a block of somebody else's ---

    def _plausible(self, origin: PeerId, data: bytes) -> bool:
        """Judge a gossiped block in isolation: an orphan is not wrong."""
        if len(data) > GOSSIPED:
            return False
        try:
            check_in_isolation(decode_block(data), self.replica.genesis.network)
        except RuleError as error:
            log.info("refused a gossiped block from %s: %s", origin, error)
            return False
        return True

    def _take(self, raw: bytes, source: PeerId) -> tuple[bytes, ...]:
        """Accept one block from a peer; return the ids of parents that are missing here.

        An invalid block costs its sender points and is forgotten.
        """
        try:
            outcome = self.replica.accept(raw, source=source)
        except RuleError as error:
            log.warning("refused a block from %s: %s", source, error)
            self.network.penalise(source, BAD_BLOCK, f"invalid block: {error}")
            return ()
        match outcome:
            case Accepted(refused=refused):
                for refusal in refused:
                    self.network.penalise(PeerId(refusal.source), BAD_BLOCK, f"invalid block: {refusal.reason}")
                self._notify()
                return ()
            case Known() | Surplus():
                return ()
            case Orphan(missing=missing):
                return missing

    def _notify(self) -> None:
        self.changed.beat()
        for wake in self._wakes.values():
            wake.beat()

    def _wake(self, peer: PeerId) -> None:
        if peer in self._wakes:
            self._wakes[peer].beat()

    # --- following the neighbours ---

    async def _follow_neighbours(self, changes: trio.MemoryReceiveChannel[PeerChange], nursery: trio.Nursery) -> None:
        scopes: dict[PeerId, trio.CancelScope] = {}
        async for change in changes:
            if change.connected and change.peer not in scopes:
                scopes[change.peer] = scope = trio.CancelScope()
                self._wakes[change.peer] = wake = Pulse()
                nursery.start_soon(self._follow, change.peer, scope, wake)
            elif not change.connected and change.peer in scopes:
                scopes.pop(change.peer).cancel()
                del self._wakes[change.peer]
                self._heads_of.pop(change.peer, None)
                self._compared.discard(change.peer)
                self._settled.beat()

    async def _follow(self, peer: PeerId, scope: trio.CancelScope, wake: Pulse) -> None:
        """Tell a neighbour our heads, hear its own, and fetch what we lack: now, on every change, every ten seconds."""
        with scope:
            while True:
                seen = wake.count
                pause = await self._compare(peer)
                self._compared.add(peer)
                self._settled.beat()
                await trio.sleep(pause)
                await wake.after(seen, most=STATUS_EVERY)

    async def _compare(self, peer: PeerId) -> float:
        """Compare chains with a neighbour once; return the seconds to wait at least before the next time."""
        try:
            status = await rpc.call(self.network, peer, STATUS, self.status())
            if status.network != self.replica.genesis.network:
                await self._part_from(peer, status.network)
                return STATUS_EVERY
            self._heads_of[peer] = status
            await self._pull(peer)
        except (PeerError, RuleError) as error:
            log.info("could not compare chains with %s: %s", peer, error)
            return AGAIN
        except StoreError as error:
            log.error("cannot store the blocks of %s: %s", peer, error)
            return DISK_AGAIN
        return AGAIN if self._lacking(peer) else 0.0

    async def _part_from(self, peer: PeerId, network: bytes) -> None:
        """Two honest nodes of different networks say so, and leave each other alone for a while."""
        log.warning(
            "%s is of network %s, this node of %s: parting. To join that one, start with its genesis or invite and a "
            "data directory of its own",
            peer, network.hex()[:16], self.replica.genesis.network.hex()[:16],
        )  # fmt: skip
        await trio.sleep(FAREWELL)
        self.network.penalise(peer, FOREIGN, "is of another network")

    def status(self) -> Status:
        """What this replica holds."""
        network = self.replica.genesis.network
        # Finality is yet to come: the genesis is the only cut.
        return Status(network, self.replica.height(), 0, network, self.replica.heads()[:MAX_HEADS])

    def _lacking(self, peer: PeerId) -> list[bytes]:
        status = self._heads_of.get(peer)
        return [head for head in status.heads if self.replica.wants(head)] if status else []

    async def _pull(self, peer: PeerId) -> None:
        """Fetch what lies under a neighbour's heads: a few levels by id, then, when further behind, by height."""
        wanted = deque(self._lacking(peer))
        for _ in range(SHALLOW):
            if not wanted:
                break
            ids = tuple(wanted.popleft() for _ in range(min(len(wanted), MAX_IDS)))
            answer = await rpc.call(self.network, peer, GET_BLOCKS, GetBlocks(ids))
            missing = await self._take_all(answer, peer)
            wanted.extend(id for id in dict.fromkeys(missing) if self.replica.wants(id) and id not in wanted)
        if self._lacking(peer):
            await self._page(peer)

    async def _page(self, peer: PeerId) -> None:
        """Read the neighbour's blocks in (height, id) order, from the height where ours and theirs part.

        That height is found by stepping back, doubling, until a page brings no orphan.
        """
        back, height, barren = 16, max(0, self.replica.height() - 16), 0
        cursor = (height, bytes(32))
        while True:
            page = await rpc.call(self.network, peer, GET_AFTER, GetAfter(*cursor))
            if not page.blocks:
                return
            if await self._take_all(page, peer):
                if height > 0:
                    back *= 2
                    height = max(0, height - back)
                    cursor = (height, bytes(32))
                    continue
                # From here on every parent comes first, except of an equivocator's branch that was not kept.
                if (barren := barren + 1) > BARREN:
                    raise ProtocolViolation("sent blocks without their parents")
            last = decode_block(page.blocks[-1])
            if (last.height, last.id) <= cursor:
                raise ProtocolViolation("sent blocks that do not follow what was asked for")
            cursor = (last.height, last.id)

    async def _take_all(self, page: Blocks, peer: PeerId) -> list[bytes]:
        """Accept blocks one by one; return the ids of parents that are missing."""
        missing: list[bytes] = []
        for number, raw in enumerate(page.blocks):
            missing.extend(self._take(raw, peer))
            if number % BREATH == BREATH - 1:
                await trio.lowlevel.checkpoint()
        return missing

    # --- answering ---

    async def _on_status(self, peer: PeerId, status: Status) -> Status:
        if status.network == self.replica.genesis.network and peer in self._wakes:
            self._heads_of[peer] = status
            if self._lacking(peer):
                self._wake(peer)
        return self.status()

    async def _on_get_blocks(self, _peer: PeerId, request: GetBlocks) -> Blocks:
        return Blocks(_fitting(raw for id in request.ids if (raw := self.replica.get(id)) is not None))

    async def _on_get_after(self, _peer: PeerId, request: GetAfter) -> Blocks:
        return Blocks(_fitting(islice(self.replica.encoded(after=(request.height, request.id)), PAGE)))


def _fitting(blocks: Iterable[bytes]) -> tuple[bytes, ...]:
    """As many blocks, in order, as one page holds; at least one."""
    page: list[bytes] = []
    size = 0
    for raw in blocks:
        size += len(raw) + 5
        if page and (size > MAX_PAGE or len(page) == 4096):
            break
        page.append(raw)
    return tuple(page)
