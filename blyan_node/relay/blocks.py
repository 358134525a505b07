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
from pathlib import Path

import trio

from blyan_node.chain.block import Block, decode_block
from blyan_node.chain.cut import Certificate, Cut, check_certificate
from blyan_node.chain.keys import Key
from blyan_node.chain.outcome import Accepted, Committed, Known, Orphan, Refusal, Surplus
from blyan_node.chain.records import Record
from blyan_node.chain.replica import Replica
from blyan_node.chain.rules import check_in_isolation
from blyan_node.errors import PeerError, RuleError, StoreError
from blyan_node.p2p import rpc
from blyan_node.p2p.transport import Network, PeerChange, PeerId
from blyan_node.pulse import Pulse
from blyan_node.relay.identity import address_of_peer
from blyan_node.relay.messages import (
    GET_BLOCKS,
    MAX_HEADS,
    MAX_IDS,
    MAX_PAGE,
    STATUS,
    Blocks,
    GetBlocks,
    Status,
)
from blyan_node.relay.snapshot import Adopt, start_from_snapshot
from blyan_node.relay.sync import BREATH, Decide, catch_up, serve_sync
from blyan_node.worker import Lane

log = logging.getLogger(__name__)

TOPIC = "blyan/blocks/1"
GOSSIPED = 32 * 1024  # larger blocks are not gossiped: neighbours hear of them by STATUS and fetch them
STATUS_EVERY = 10.0
TELL_AFTER = 0.3  # seconds after a change in which gossip mostly makes the comparison needless
SHALLOW = 4  # rounds of fetching parents by id before reading all behind the last common cut
BAD_BLOCK = 25  # points: four invalid blocks and the peer is out
FOREIGN = 100  # points: a peer of another network is refused for a while, lest both dial each other for ever
FAREWELL = 1.0  # seconds in which a peer of another network may find out the same
AGAIN = 1.0  # seconds before a neighbour is asked again that failed, or named heads that it did not send
DISK_AGAIN = 10.0  # seconds before blocks are fetched again that could not be stored
DEEP = 2  # neighbours from whom this node catches up at once: the second, lest one slow peer hold it up
SOUGHT = 512  # blocks that the consensus asks for
COMPARE = 30.0  # seconds that a first block of our own waits for the chains of new neighbours


class Relay:
    """Keeps the replica and those of the neighbours the same."""

    def __init__(self, network: Network, replica: Replica, key: Key, disk: Lane) -> None:
        self.network, self.replica, self._key, self._disk = network, replica, key, disk
        self.changed = Pulse()
        self._heads_of: dict[PeerId, Status] = {}
        self._wakes: dict[PeerId, Pulse] = {}  # of the neighbours that are followed
        self._compared: set[PeerId] = set()  # those of them whose chain has been read, or could not be
        self._settled = Pulse()
        self._sought: dict[bytes, None] = {}
        self._deep = trio.CapacityLimiter(DEEP)
        self._starting = trio.Lock()
        self.decide: Decide = self.follow
        """What takes a cut that is final elsewhere."""
        self.adopt: Adopt = self._adopt
        """What lets a chain that was started from a snapshot take the place of this one."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve and follow until cancelled."""
        rpc.serve(self.network, STATUS, self._on_status, concurrency=32)
        rpc.serve(self.network, GET_BLOCKS, self._on_get_blocks, concurrency=8)
        serve_sync(self.network, self.replica)
        async with (
            self.network.subscribe(TOPIC, self._plausible, capacity=1024) as gossip,
            self.network.watch_peers() as changes,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(self._follow_neighbours, changes, nursery)
            nursery.start_soon(self._compare_after_changes)
            task_status.started()
            async for message in gossip:
                try:
                    if self._take(message.data, message.origin):
                        self.wake(message.origin)
                except StoreError as error:
                    log.error("cannot store a block: %s", error)  # comparing heads will bring it again

    # --- a block of our own ---

    async def write(self, records: Sequence[Record], *, chain: str, type: str) -> Block:
        """Put records into a block of our own and send it out. When this returns, it survives a loss of power.

        First hears what the neighbours have: after a lost disk they know blocks of ours, and a second one in the same
        place would end this key. Raises ConfigError where the key may not write, LocalError, StoreError.
        """
        with trio.move_on_after(COMPARE):
            while unheard := self.network.neighbours() - self._compared:
                log.info("hearing what %d neighbours have before a block is written", len(unheard))
                await self._settled.after(self._settled.count)
        now_ms = time.time_ns() // 1_000_000
        block = self.replica.author(self._key, tuple(records), chain=chain, type=type, now_ms=now_ms)
        await self._disk.run(self.replica.flush)
        self._notify(block)
        if len(block.raw) <= GOSSIPED:
            await self.network.publish(TOPIC, block.raw)
        return block

    # --- what the consensus needs ---

    def seek(self, ids: Iterable[bytes]) -> None:
        """Fetch these blocks from whichever neighbour has them."""
        self._sought.update(dict.fromkeys(ids))
        self._sought = {id: None for id in self._sought if self.replica.wants(id)}
        while len(self._sought) > SOUGHT:
            del self._sought[next(iter(self._sought))]
        self._wake_all()

    def wake(self, peer: PeerId) -> None:
        """Compare chains with a neighbour now."""
        if peer in self._wakes:
            self._wakes[peer].beat()

    def committed(self, committed: Committed) -> None:
        """Tell that a cut became final."""
        self._blame(committed.refused)
        self._notify()

    def finals(self) -> dict[bytes, int]:
        """Return, by address, the last final cut that each neighbour told, of those that are final here too."""
        told = {address_of_peer(peer): status.cut for peer, status in self._heads_of.items()}
        return {address: cut for address, cut in told.items() if address is not None and cut <= self.replica.final.k}

    def final_of(self, address: bytes) -> int | None:
        """Return the last cut that is final at a neighbour, as it told; None where there is no such neighbour."""
        told = (status.cut for peer, status in self._heads_of.items() if address_of_peer(peer) == address)
        return next(told, None)

    async def follow(self, cut: Cut, certificate: Certificate, _peer: PeerId) -> None:
        """Take a cut without a part in the consensus. Raises RuleError where it is not proven."""
        check_certificate(certificate, cut, self.replica.final.base().validators, self.replica.genesis.network)
        self.committed(self.replica.commit(cut, certificate))
        await trio.lowlevel.checkpoint()

    async def _adopt(self, directory: Path) -> None:
        self.replica.adopt(directory)
        await trio.lowlevel.checkpoint()

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
            case Accepted(block, adopted, refused):
                self._blame(refused)
                self._notify(block, *adopted)
                return ()
            case Known() | Surplus():
                return ()
            case Orphan(missing=missing):
                return missing

    def _notify(self, *blocks: Block) -> None:
        """Tell of a change: neighbours only after a while, unless gossip does not bring them the blocks."""
        self.changed.beat()
        if any(len(block.raw) > GOSSIPED for block in blocks):
            self._wake_all()

    def _wake_all(self) -> None:
        for wake in self._wakes.values():
            wake.beat()

    async def _compare_after_changes(self) -> None:
        seen = self.changed.count
        while True:
            await self.changed.after(seen)
            await trio.sleep(TELL_AFTER)
            seen = self.changed.count
            self._wake_all()

    def _blame(self, refused: Iterable[Refusal]) -> None:
        for refusal in refused:
            self.network.penalise(PeerId(refusal.source), BAD_BLOCK, f"invalid block: {refusal.reason}")

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
            self._check_common(peer, status)
            await self._pull(peer, status.cut)
        except RuleError as error:
            self.network.penalise(peer, BAD_BLOCK, f"wrong about the chain: {error}")
            return STATUS_EVERY
        except PeerError as error:
            log.info("could not compare chains with %s: %s", peer, error)
            return AGAIN
        except StoreError as error:
            log.error("cannot store the blocks of %s: %s", peer, error)
            return DISK_AGAIN
        return AGAIN if self._lacking(peer) else 0.0

    def _check_common(self, peer: PeerId, status: Status) -> None:
        """Look whether both finalised the same; if not, more than a third of stake has cheated."""
        if status.cut <= self.replica.final.k and self.replica.finals.anchor(status.cut)[0] != status.cut_id:
            log.critical("%s says that cut %d is another one than here: %s", peer, status.cut, status.cut_id.hex())
            raise RuleError(f"cut {status.cut} is another one than {status.cut_id.hex()}")

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
        final = self.replica.final
        return Status(
            self.replica.genesis.network,
            self.replica.height(),
            final.k,
            final.id,
            self.replica.finals.stripped,
            self.replica.heads()[:MAX_HEADS],
        )

    def _lacking(self, peer: PeerId) -> list[bytes]:
        status = self._heads_of.get(peer)
        return [id for id in (*status.heads, *self._sought) if self.replica.wants(id)] if status else []

    def _is_behind(self, peer: PeerId) -> bool:
        status = self._heads_of.get(peer)
        return status is not None and status.cut > self.replica.final.k

    async def _pull(self, peer: PeerId, cut: int) -> None:
        """Fetch what a neighbour has and this node lacks: final cuts first, then a few levels by id, then the rest."""
        if self._is_behind(peer) and not await self._come_near(peer):
            return
        if self._is_behind(peer):
            await self._catch_up(peer, cut)
        wanted = deque(self._lacking(peer))
        for _ in range(SHALLOW):
            if not wanted:
                break
            ids = tuple(wanted.popleft() for _ in range(min(len(wanted), MAX_IDS)))
            answer = await rpc.call(self.network, peer, GET_BLOCKS, GetBlocks(ids))
            missing = await self._take_all(answer, peer)
            wanted.extend(id for id in dict.fromkeys(missing) if self.replica.wants(id) and id not in wanted)
        if any(self.replica.wants(head) for head in self._heads_of[peer].heads):
            await self._catch_up(peer, cut)

    async def _come_near(self, peer: PeerId) -> bool:
        """Where replaying would take long, or the neighbour has not all that it takes, start from its snapshot.

        False where there is no way to follow this neighbour.
        """
        retention = self.replica.retention
        async with self._starting:
            status = self._heads_of[peer]
            is_far = status.cut - self.replica.final.k > 2 * retention.every or self._lacks_bodies(status)
            may_start = retention.bodies is not None and is_far
            if may_start and await start_from_snapshot(self.network, peer, self.replica, self._disk, self.adopt):
                self._notify()
        if not self._lacks_bodies(status):
            return True
        log.warning(
            "cannot follow %s: it has bodies of blocks from cut %d on only, and this node is at cut %d. It needs %s",
            peer,
            status.stripped + 1,
            self.replica.final.k,
            "an archive to follow, or archive = false" if retention.bodies is None else "a neighbour with a snapshot",
        )
        return False

    def _lacks_bodies(self, status: Status) -> bool:
        """Whether a neighbour does not have the bodies that would be replayed here."""
        return status.stripped > self.replica.final.k

    async def _catch_up(self, peer: PeerId, cut: int) -> None:
        async with self._deep:
            lacks = self._is_behind(peer) or any(self.replica.wants(head) for head in self._heads_of[peer].heads)
            if lacks:  # else another neighbour has brought it while this one waited
                await catch_up(self.network, peer, self.replica, cut, self._take, self.decide)

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
            if self._lacking(peer) or self._is_behind(peer):
                self.wake(peer)
        return self.status()

    async def _on_get_blocks(self, _peer: PeerId, request: GetBlocks) -> Blocks:
        return Blocks(_fitting(raw for id in request.ids if (raw := self.replica.get(id)) is not None))


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
