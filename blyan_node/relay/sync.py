"""Catching up with a neighbour: its final cuts and what lies under them, then what is not final yet.

The last cut that both know is the common base. Everything behind it comes in the order in which it became final, so
each block finds its parents here, and each cut can be decided as soon as its heads are.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator
from itertools import islice
from typing import TypeVar

import trio

from blyan_node.chain.block import peek_id
from blyan_node.chain.cut import Certificate, Cut
from blyan_node.chain.replica import Replica
from blyan_node.codec import pack
from blyan_node.errors import PeerTimeout, ProtocolViolation, Refused, RuleError
from blyan_node.p2p import rpc
from blyan_node.p2p.guard import VIOLATION
from blyan_node.p2p.transport import Network, PeerId
from blyan_node.relay.messages import (
    GET_BLOCKS,
    GET_CUTS,
    GET_SINCE,
    GET_STATE,
    GET_STUBS,
    MAX_BLOCKS,
    MAX_CUTS,
    MAX_IDS,
    MAX_PAGE,
    Cursor,
    CutItem,
    Cuts,
    GetBlocks,
    GetCuts,
    GetSince,
    GetState,
    Since,
    StatePage,
)

BREATH = 16  # blocks accepted before other tasks get their turn
BARREN = 4  # pages one after the other that are of no use, after which a neighbour sends them for nothing
PATIENCE = 60.0  # seconds for which a neighbour may take the place of another without bringing anything of use

T = TypeVar("T")
Take = Callable[[bytes, PeerId], Iterable[bytes]]
"""Accepts a block from a peer; returns what is missing below it."""
Decide = Callable[[Cut, Certificate, PeerId], Awaitable[None]]
"""Takes a cut that is final elsewhere. Raises RuleError or SignatureError for one that is not."""


def serve_sync(network: Network, replica: Replica) -> None:
    """Answer those who are behind."""

    async def cuts(_peer: PeerId, request: GetCuts) -> Cuts:
        return Cuts(tuple(_within(_cuts_from(replica, request.first), lambda item: len(pack(item)), MAX_CUTS)))

    async def since(_peer: PeerId, request: GetSince) -> Since:
        if request.after.k <= replica.finals.stripped:
            raise Refused(f"bodies of blocks are kept here from cut {replica.finals.stripped + 1} on")
        return page_of(request, replica.final.k + 1, replica.get)

    async def stubs(_peer: PeerId, request: GetSince) -> Since:
        return page_of(request, replica.final.k, replica.stub)

    async def state(_peer: PeerId, request: GetState) -> StatePage:
        provable = [k for k in replica.finals.snapshots if k < replica.final.k]  # by the cut after it
        k = request.k if request.k is not None else provable[-1] if provable else 0
        page = replica.finals.page(k, request.page) if k in provable else None
        if page is None:
            raise Refused("that part of a snapshot is not here")
        return StatePage(k, page)

    def page_of(request: GetSince, last: int, read: Callable[[bytes], bytes | None]) -> Since:
        items = _since(replica, request.after, last, read)
        page = list(_within(items, lambda item: len(item[1]) + 5, MAX_BLOCKS))
        return Since(tuple(raw for _, raw in page), page[-1][0] if page else None)

    rpc.serve(network, GET_CUTS, cuts, concurrency=4)
    rpc.serve(network, GET_SINCE, since, concurrency=4)
    rpc.serve(network, GET_STUBS, stubs, concurrency=4)
    rpc.serve(network, GET_STATE, state, concurrency=4)


async def catch_up(network: Network, peer: PeerId, replica: Replica, cut: int, take: Take, decide: Decide) -> None:
    """Bring here what a neighbour whose last final cut is ``cut`` has behind the last common cut.

    Raises PeerError, and RuleError for a cut that is not final.
    """
    await _CatchUp(network, peer, replica, cut, take, decide).run()


class _CatchUp:
    """One neighbour's chain, read from the last common cut on."""

    def __init__(self, network: Network, peer: PeerId, replica: Replica, cut: int, take: Take, decide: Decide) -> None:
        self._network, self._peer, self._replica, self._cut = network, peer, replica, cut
        self._take, self._decide_cut = take, decide
        self._waiting: deque[CutItem] = deque()
        self._barren = self._known = 0
        self._ids: dict[int, bytes] = {}  # of the cuts that lead to the checkpoint
        self._patience = trio.CancelScope()

    async def run(self) -> None:
        with self._patience:
            self._be_patient()
            await self._read()
        if self._patience.cancelled_caught:
            raise PeerTimeout(f"{self._peer} brought nothing new for {PATIENCE:g} s")

    def _be_patient(self) -> None:
        self._patience.deadline = trio.current_time() + PATIENCE

    async def _read(self) -> None:
        if self._replica.is_below_checkpoint and not await self._find_checkpoint():
            return
        cursor = Cursor(min(self._cut, self._replica.final.k) + 1, 0, bytes(32))
        while True:
            await self._decide()
            page = await rpc.call(self._network, self._peer, GET_SINCE, GetSince(cursor))
            if page.last is None:
                break
            if _place(page.last) <= _place(cursor):
                raise self._violation("sent blocks that do not follow what was asked for")
            cursor = page.last
            await self._take_page(page)
        if self._waiting and not self._is_here(self._waiting[0]):
            raise self._violation("told of a final cut, but not what lies under it")

    async def _take_page(self, page: Since) -> None:
        """Take a page in, and see that it was of use: something new, or full of what a restarted node has already."""
        count, final = self._replica.count(), self._replica.final.k
        missing: list[bytes] = []
        for number, raw in enumerate(page.blocks, 1):
            id, is_breath = peek_id(raw), number % BREATH == 0
            self._known += self._replica.has(id)
            missing += self._take(raw, self._peer)
            if is_breath:
                await self._fetch(missing)
                await trio.lowlevel.checkpoint()
            if is_breath or (self._waiting and id in self._waiting[0].cut.heads):
                await self._decide()
        await self._fetch(missing)
        is_full = len(page.blocks) == MAX_BLOCKS or sum(map(len, page.blocks)) >= MAX_PAGE // 2
        is_new = self._replica.count() > count or self._replica.final.k > final
        if is_new or (is_full and self._known <= count):  # an honest neighbour sends no block twice
            self._barren = 0
            self._be_patient()
            return
        self._barren += 1
        if self._barren > BARREN:
            raise self._violation("sent pages of blocks that are of no use")

    async def _fetch(self, missing: list[bytes]) -> None:
        """Fetch what was surplus until something on top of it followed."""
        ids = tuple(id for id in dict.fromkeys(missing) if self._replica.wants(id))[:MAX_IDS]
        missing.clear()
        if ids:
            answer = await rpc.call(self._network, self._peer, GET_BLOCKS, GetBlocks(ids))
            for raw in answer.blocks:
                self._take(raw, self._peer)

    async def _decide(self) -> None:
        """Decide the cuts whose blocks are here, in turn, and ask for more of them when they are used up."""
        while True:
            if not self._waiting and self._cut > self._replica.final.k:
                await self._fetch_cuts()
            if not self._waiting or not self._is_here(self._waiting[0]):
                return
            item = self._waiting[0]
            if item.cut.k > self._replica.final.k:
                await self._decide_cut(item.cut, item.certificate, self._peer)
            if item.cut.k > self._replica.final.k:
                return  # the consensus has not begun yet: later
            self._waiting.popleft()

    async def _fetch_cuts(self) -> None:
        items = await self._cuts_from(self._replica.final.k + 1)
        if any(self._ids.get(item.cut.k, item.cut.id) != item.cut.id for item in items):
            raise self._violation("sent another cut than it did before")
        self._waiting.extend(items)

    async def _cuts_from(self, first: int) -> tuple[CutItem, ...]:
        answer = await rpc.call(self._network, self._peer, GET_CUTS, GetCuts(first))
        numbers = [item.cut.k for item in answer.items]
        if not numbers or numbers != list(range(first, first + len(numbers))):
            raise self._violation("told of final cuts that it does not send")
        return answer.items

    async def _find_checkpoint(self) -> bool:
        """Read which cuts lead to the checkpoint, before any of them is decided here; False where it is not there yet.

        Each names the one before by its hash, so no other history leads there. Raises RuleError where this one does
        not.
        """
        checkpoint = self._replica.checkpoint
        if checkpoint is None or self._cut < checkpoint.k:
            return False
        last, k = self._replica.final.id, self._replica.final.k
        while k < checkpoint.k:
            for item in await self._cuts_from(k + 1):
                if item.cut.prev_cut != last:
                    raise RuleError(f"cut {item.cut.k} does not follow the one before it")
                checkpoint.check(item.cut)
                k, last = item.cut.k, item.cut.id
                self._ids[k] = last
            self._be_patient()
        return True

    def _is_here(self, item: CutItem) -> bool:
        return all(self._replica.has(head) for head in item.cut.heads)

    def _violation(self, what: str) -> ProtocolViolation:
        self._network.penalise(self._peer, VIOLATION, what)
        return ProtocolViolation(f"{self._peer} {what}")


def _place(cursor: Cursor) -> tuple[int, int, bytes]:
    return cursor.k, cursor.height, cursor.id


def _cuts_from(replica: Replica, first: int) -> Iterator[CutItem]:
    told, before = None, replica.finals.stored(first - 1)
    for k in range(first, replica.final.k + 1):
        if (stored := replica.finals.stored(k)) is None:
            return
        deciders = None if before is None else before.deciders
        yield CutItem(stored.cut, stored.certificate, None if deciders == told else deciders)
        told, before = deciders, stored


def _since(
    replica: Replica, after: Cursor, last: int, read: Callable[[bytes], bytes | None]
) -> Iterator[tuple[Cursor, bytes]]:
    for k in range(max(1, after.k), last + 1):
        places = replica.window_of(k)
        start = bisect_right(places, (after.height, after.id)) if k == after.k else 0
        for height, id in islice(places, start, None):
            if (raw := read(id)) is not None:
                yield Cursor(k, height, id), raw


def _within(items: Iterable[T], size: Callable[[T], int], most: int) -> Iterator[T]:
    """As many items as fit in a page; at least one."""
    total = 0
    for item in islice(items, most):
        total += size(item)
        if total > MAX_PAGE and total > size(item):
            return
        yield item
