"""Verification of a stopped node's chain: everything is recomputed, and nothing believed but the genesis.

Reads only. Memory is bounded by what a running replica holds: blocks are streamed, the nodes of the DAG read where they
are needed, and the records of one cut are in memory at a time.

Three passes:

1. *Blocks.* Each by itself: encoding, id, signature, records; and that the indexes by height and by author have it.
2. *The DAG*, in the order (height, id), so parents come before children. A fresh :class:`~blyan_node.chain.dag.Dag`
   grows block by block. The node of a block follows from its header and from the nodes of its parents, except for the
   number of its branch, which depends on the order in which blocks once arrived. So the stored number is taken,
   if some order of arrival can have led to it: the block goes on with the branch that has its ``prev`` for a tip, or
   begins one. By induction the stored nodes are then exactly those that a replica makes of these blocks, so those of
   parents need not be kept but can be read again. At the end every number must have one unbroken path of one author's
   blocks, as its stored branch says, and no branch may begin where its author's last could have gone on: otherwise an
   honest author would count as an equivocator.
3. *Cuts*, one after the other. Each must be the next one on the last, keep the rules of cuts, and be proven by those
   who decide it, which follows from the state before. What lies under its heads and not under the last is read,
   ordered and folded; that gives the next state, and with it all that must be stored of this cut. The anchors of
   blocks are checked here, against the states as recomputed, those beyond the last cut too.

What is wrong is told and then replaced by what should be there, so one fault is told once, and the rest is checked all
the same. Where that is impossible (the blocks of a cut are damaged) the fault says what was not checked.

A body that is missing is a fault, unless it was pruned (see :mod:`blyan_node.chain.retention`). Then the ledger is
folded from the snapshot on that stands for what was pruned; cuts before it are checked as a light client would.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from blyan_node.chain.genesis import Genesis
from blyan_node.chain.store import Prefix, Store
from blyan_node.chain.tables import Tables
from blyan_node.chain.verify_blocks import BlockChecks, Entries, Fault, Finding, Progress
from blyan_node.chain.verify_cuts import CutChecks
from blyan_node.errors import StoreError

__all__ = ["Fault", "Progress", "Verified", "verify", "verify_store"]

MAX_FAULTS = 100


@dataclass(frozen=True)
class Verified:
    """The end: what was found. Not ``complete`` where so much was wrong that the search was given up."""

    blocks: int
    cuts: int
    faults: int
    complete: bool


def verify(directory: Path, genesis: Genesis, *, most: int = MAX_FAULTS) -> Iterator[Finding | Verified]:
    """Verify the database in a directory that no node uses: progress and faults as they come, then one Verified.

    Raises AlreadyRunning where it is in use, StoreError where it cannot be opened or is of another network or format.
    """
    with Store(directory) as store:
        yield from verify_store(store, genesis, most=most)


def verify_store(store: Store, genesis: Genesis, *, most: int = MAX_FAULTS) -> Iterator[Finding | Verified]:
    """Verify an open database; see :func:`verify`."""
    entries, faults = Entries(store), 0
    for finding in _guarded(store, genesis, entries):
        yield finding
        faults += isinstance(finding, Fault)
        if faults == most:
            break
    blocks, cuts = entries.counts[Prefix.BLOCK], entries.counts[Prefix.CUT]
    yield Verified(blocks, cuts, faults, complete=faults < most)


def _guarded(store: Store, genesis: Genesis, entries: Entries) -> Iterator[Finding]:
    yield from entries.survey()
    if not entries.counts:
        return
    if store.get(Prefix.STATE.key()) is None:
        yield Fault("the database", "it does not say of which network and format it is: nothing else was checked")
        return
    tables = Tables(store, genesis)
    blocks = BlockChecks(entries, tables, genesis)
    cuts = CutChecks(entries, tables, genesis, blocks)
    for check in (blocks.each_alone, blocks.in_order, cuts.each_cut, cuts.state, cuts.votes):
        try:
            yield from check()
        except StoreError as error:
            yield Fault("the database", str(error))
