"""Starting from a neighbour's snapshot: for who is new, or was away for so long that replaying everything is no use.

The chain is built beside the replica's own, which goes on meanwhile, and takes its place once all of it is proven (see
:mod:`blyan_node.chain.snapshot`). Until then nothing that the neighbour sends has any effect here.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

from blyan_node.chain.replica import Replica
from blyan_node.chain.snapshot import SnapshotStart
from blyan_node.errors import Refused, RuleError
from blyan_node.p2p import rpc
from blyan_node.p2p.transport import Network, PeerId
from blyan_node.relay.messages import GET_CUTS, GET_STATE, GET_STUBS, Cursor, CutItem, GetCuts, GetSince, GetState
from blyan_node.worker import Lane

log = logging.getLogger(__name__)

Adopt = Callable[[Path], Awaitable[None]]
"""Lets the chain in a directory take the place of the replica's own."""


async def start_from_snapshot(network: Network, peer: PeerId, replica: Replica, disk: Lane, adopt: Adopt) -> bool:
    """Start from the newest snapshot of a neighbour; False where it has none that is ahead of this replica.

    Raises PeerError, RuleError for what is not proven, DiskFull or StoreError. Then the replica is as it was.
    """
    try:
        k, rows = await _fetch_rows(network, peer, replica)
    except Refused:
        return False
    if k <= replica.final.k:
        return False
    log.info("starting from a snapshot of cut %d that %s has (%d rows)", k, peer, len(rows))
    directory = replica.directory.with_name(f"{replica.directory.name}.new")
    await disk.run(shutil.rmtree, directory, ignore_errors=True)  # left behind by a crash
    try:
        start = await disk.run(lambda: SnapshotStart(directory, replica.genesis, rows, checkpoint=replica.checkpoint))
        with start:
            if start.k != k:
                raise RuleError(f"a snapshot of cut {start.k} where one of cut {k} was offered")
            await _fetch_cuts(network, peer, start, disk)
            await _fetch_stubs(network, peer, start, disk)
            await disk.run(start.finish)
        await adopt(directory)
    finally:
        await disk.run(shutil.rmtree, directory, ignore_errors=True)
    log.info("the chain begins with the state after cut %d; its history before is headers and cuts", k)
    return True


async def _fetch_rows(network: Network, peer: PeerId, replica: Replica) -> tuple[int, list[bytes]]:
    """Return the newest provable snapshot: its cut and all its rows, or none of them if it is of no use."""
    first = await rpc.call(network, peer, GET_STATE, GetState(None, 0))
    rows = list(first.page.rows)
    if first.k <= replica.final.k:
        return first.k, []
    for number in range(1, first.page.pages):
        answer = await rpc.call(network, peer, GET_STATE, GetState(first.k, number))
        if (answer.k, answer.page.pages) != (first.k, first.page.pages):
            raise RuleError("pages of different snapshots")
        rows += answer.page.rows
    return first.k, rows


async def _fetch_cuts(network: Network, peer: PeerId, start: SnapshotStart, disk: Lane) -> None:
    while (first := start.next_cut) is not None:
        answer = await rpc.call(network, peer, GET_CUTS, GetCuts(first))
        if not answer.items:
            raise RuleError(f"a snapshot of cut {start.k}, but no cut {first}")
        await disk.run(_take_cuts, start, answer.items)


def _take_cuts(start: SnapshotStart, items: tuple[CutItem, ...]) -> None:
    for item in items:
        if start.next_cut is not None:
            start.take_cut(item.cut, item.certificate, item.deciders)


async def _fetch_stubs(network: Network, peer: PeerId, start: SnapshotStart, disk: Lane) -> None:
    cursor = Cursor(1, 0, bytes(32))
    while not start.is_complete:
        page = await rpc.call(network, peer, GET_STUBS, GetSince(cursor))
        if page.last is None or not page.blocks:
            raise RuleError(f"a snapshot of cut {start.k}, but not the blocks under it")
        cursor = page.last
        await disk.run(_take_stubs, start, page.blocks)


def _take_stubs(start: SnapshotStart, blocks: tuple[bytes, ...]) -> None:
    for raw in blocks:
        if not start.is_complete:
            start.take_stub(raw)
