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
from blyan_node.errors import ProtocolViolation
from blyan_node.p2p import rpc
from blyan_node.p2p.transport import Network, PeerId
from blyan_node.relay.messages import (
    GET_CUTS,
    GET_SINCE,
    MAX_BLOCKS,
    MAX_CUTS,
    MAX_PAGE,
    Cursor,
    CutItem,
    Cuts,
    GetCuts,
    GetSince,
    Since,
)

BREATH = 16  # blocks accepted before other tasks get their turn
BARREN = 4  # pages one after the other without anything new, after which a neighbour sends them for nothing

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
        page = list(_within(_since(replica, request.after), lambda item: len(item[1]) + 5, MAX_BLOCKS))
        return Since(tuple(raw for _, raw in page), page[-1][0] if page else None)

    rpc.serve(network, GET_CUTS, cuts, concurrency=4)
    rpc.serve(network, GET_SINCE, since, concurrency=4)


async def catch_up(network: Network, peer: PeerId, replica: Replica, cut: int, take: Take, decide: Decide) -> None:
    """Bring here what a neighbour whose last final cut is ``cut`` has behind the last common cut.

    Raises PeerError, and RuleError for a cut that is not final.
    """
    waiting: deque[CutItem] = deque()
    cursor, barren = Cursor(min(cut, replica.final.k) + 1, 0, bytes(32)), 0
    while True:
        if not waiting and cut > replica.final.k:
            answer = await rpc.call(network, peer, GET_CUTS, GetCuts(replica.final.k + 1))
            waiting.extend(answer.items)
            if not waiting or [item.cut.k for item in waiting] != list(_following(replica.final.k, len(waiting))):
                raise ProtocolViolation("told of final cuts that it does not send")
        await _decide(waiting, replica, decide, peer)
        page = await rpc.call(network, peer, GET_SINCE, GetSince(cursor))
        if page.last is None:
            return
        if _place(page.last) <= _place(cursor):
            raise ProtocolViolation("sent blocks that do not follow what was asked for")
        before, cursor = replica.count(), page.last
        for number, raw in enumerate(page.blocks):
            take(raw, peer)
            if waiting and peek_id(raw) in waiting[0].cut.heads:
                await _decide(waiting, replica, decide, peer)
            if number % BREATH == BREATH - 1:
                await trio.lowlevel.checkpoint()
        barren = 0 if replica.count() > before else barren + 1
        if barren > BARREN:
            raise ProtocolViolation("sent pages of blocks that are of no use")


async def _decide(waiting: deque[CutItem], replica: Replica, decide: Decide, peer: PeerId) -> None:
    """Decide the cuts whose blocks are here, in turn."""
    while waiting and all(replica.has(head) for head in waiting[0].cut.heads):
        item = waiting.popleft()
        if item.cut.k > replica.final.k:
            await decide(item.cut, item.certificate, peer)


def _following(k: int, count: int) -> range:
    return range(k + 1, k + 1 + count)


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


def _since(replica: Replica, after: Cursor) -> Iterator[tuple[Cursor, bytes]]:
    for k in range(max(1, after.k), replica.final.k + 2):
        places = replica.window_of(k)
        start = bisect_right(places, (after.height, after.id)) if k == after.k else 0
        for height, id in islice(places, start, None):
            if (raw := replica.get(id)) is not None:
                yield Cursor(k, height, id), raw


def _within(items: Iterable[T], size: Callable[[T], int], most: int) -> Iterator[T]:
    """As many items as fit in a page; at least one."""
    total = 0
    for item in islice(items, most):
        total += size(item)
        if total > MAX_PAGE and total > size(item):
            return
        yield item
