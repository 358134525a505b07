"""A node's replica of the chain: the DAG of accepted blocks, kept in LevelDB, with what is derived from it.

Synchronous, for one thread; only :meth:`Replica.flush` may run on another. Every block is written in one atomic batch
before memory changes, so a failed write leaves all as it was, and a crash at any point leaves a database that opens.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from blyan_node.chain.block import CHAINS, Anchor, Block, decode_block, make_block, peek_id
from blyan_node.chain.catalog import Catalog
from blyan_node.chain.closing import Closing
from blyan_node.chain.dag import Dag, Node
from blyan_node.chain.genesis import Genesis
from blyan_node.chain.keys import Key, show_address
from blyan_node.chain.order import item_of
from blyan_node.chain.orphans import Orphans
from blyan_node.chain.records import Record
from blyan_node.chain.rules import check_author, check_in_context, check_in_isolation
from blyan_node.chain.state import genesis_state
from blyan_node.chain.store import Store
from blyan_node.chain.tables import Tables
from blyan_node.chain.view import View, make_view
from blyan_node.errors import ConfigError, LocalError, RuleError

FORMAT = 1
MAX_EVIDENCE = 2
"""Blocks of one author with one seq that are kept without being needed: a pair proves the equivocation."""
MAX_REFUSED = 4096


@dataclass(frozen=True)
class Refusal:
    """A waiting block that turned out to break the rules, or to build on one that does; ``source`` sent it."""

    id: bytes
    source: str
    reason: str


@dataclass(frozen=True)
class Accepted:
    """The block is part of the DAG, and so are ``adopted``, blocks that waited for it, in order."""

    block: Block
    adopted: tuple[Block, ...] = ()
    refused: tuple[Refusal, ...] = ()


@dataclass(frozen=True)
class Known:
    """The block was part of the DAG already."""

    id: bytes


@dataclass(frozen=True)
class Orphan:
    """The block waits; ``missing`` are the ancestors to fetch, themselves neither here nor waiting."""

    block: Block
    missing: tuple[bytes, ...]


@dataclass(frozen=True)
class Surplus:
    """One more branch of a proven equivocator, which nobody needs: valid, not kept. Fetching it again is no use
    until another author's block builds on it.
    """  # noqa: D205

    block: Block


Outcome = Accepted | Known | Orphan | Surplus


class Replica(Closing):
    """See the module. A context manager; opening reads heads and branches, not all blocks."""

    def __init__(self, store: Store, genesis: Genesis, *, orphans: Orphans | None = None) -> None:
        """Use an open store, which the replica closes. Raises StoreError where it is of another network or format."""
        self.genesis = genesis
        self._tables = Tables(store, genesis)
        self._orphans = Orphans() if orphans is None else orphans
        self._refused: OrderedDict[bytes, str] = OrderedDict()
        self._surplus: OrderedDict[bytes, None] = OrderedDict()
        self._count = self._tables.count()
        self._dag = Dag(
            genesis.network,
            load=self._tables.node,
            heads=self._tables.heads(),
            branches=self._tables.branches(),
        )
        self._view: View | None = None
        self._catalog: Catalog | None = None

    @classmethod
    def open(cls, directory: Path, genesis: Genesis) -> Replica:
        """Open or create the replica in a directory. Raises AlreadyRunning, DiskFull or StoreError."""
        store = Store(directory)
        try:
            return cls(store, genesis)
        except BaseException:
            store.close()
            raise

    def close(self) -> None:
        """Close the database."""
        self._tables.close()

    # What is here

    def heads(self) -> tuple[bytes, ...]:
        """Return the ids of the blocks without children, sorted; of an empty chain, the network's id."""
        return self._dag.heads()

    def height(self) -> int:
        """Return the greatest height of a block, 0 for an empty chain."""
        return max(node.height for head in self._dag.heads() if (node := self._dag.node(head)))

    def count(self) -> int:
        """Return the number of blocks, without the genesis."""
        return self._count

    def has(self, id: bytes) -> bool:
        """Tell whether a block is part of the DAG; the genesis always is."""
        return self._dag.node(id) is not None

    def wants(self, id: bytes) -> bool:
        """Tell whether fetching a block could be of use: not here, not refused, no surplus (see :class:`Surplus`)."""
        if self.has(id) or id in self._refused:
            return False
        return id not in self._surplus or any(True for _ in self._orphans.above(id))

    def get(self, id: bytes) -> bytes | None:
        """Return a block as it was received, None where it is not here."""
        return self._tables.raw(id)

    def block(self, id: bytes) -> Block | None:
        """Return a block, decoded."""
        return self._tables.block(id)

    def blocks(self, chain: str | None = None, *, after: tuple[int, bytes] | None = None, limit: int) -> list[Block]:
        """Return up to ``limit`` blocks of one chain, or of all, in (height, id) order, behind the one at ``after``.

        Parents come before children, so a page after the other can be accepted elsewhere without orphans.
        """
        return list(islice(self._tables.ordered(CHAINS if chain is None else (chain,), after), limit))

    def encoded(self, *, after: tuple[int, bytes]) -> Iterator[bytes]:
        """Iterate over the blocks of all chains as they were received, in the order of :meth:`blocks`, one by one."""
        return (raw for id in self._tables.ids(CHAINS, after) if (raw := self.get(id)) is not None)

    def catalog(self) -> Catalog:
        """Return the models on the chain, tentatively: folded anew where blocks arrived since the last call."""
        if self._catalog is None:
            self._catalog = Catalog(self.view().tentative)
        return self._catalog

    def next_nonce(self, address: bytes) -> int:
        """Return the nonce of an address's next record, behind all that are here and take effect."""
        return self.view().next_nonce(address)

    def view(self) -> View:
        """Return the ledger as of now, on top of the genesis: no cut is final here yet."""
        if self._view is None:
            self._view = make_view(
                genesis_state(self.genesis),
                map(item_of, self._tables.ordered(CHAINS, None)),
                network=self.genesis.network,
                reaches=self._reaches,
                equivocators=frozenset(),  # all blocks lie in the window, so their order finds these
                lookup=lambda _: None,
            )
        return self._view

    def _reaches(self, one: bytes, other: bytes) -> bool:
        above, below = self._dag.node(one), self._dag.node(other)
        return above is not None and below is not None and above.reaches(below)

    def is_equivocator(self, author: bytes) -> bool:
        """Tell whether two blocks here prove that an author forked its own chain."""
        return self._dag.is_equivocator(author)

    # What comes in

    def accept(self, raw: bytes, *, source: str = "") -> Outcome:
        """Take in an encoded block from a source, whose waiting blocks are counted together.

        Raises RuleError where it breaks a rule, or builds on a block that does; DiskFull or StoreError where it could
        not be written, in which case nothing has changed.
        """
        id = peek_id(raw)
        if self.has(id):
            return Known(id)
        if (reason := self._refused.get(id)) is not None:
            raise RuleError(reason)
        if (waiting := self._orphans.get(id)) is not None:
            return Orphan(waiting.block, self._orphans.below(waiting.missing))
        block = decode_block(raw)
        check_in_isolation(block, self.genesis.network)
        check_author(block.header, self.genesis)
        for parent in block.header.parents:
            if parent in self._refused:
                self._refuse(block, source, f"builds on a refused block: {self._refused[parent]}")
                raise RuleError(self._refused[id])
        if missing := self._dag.missing(block.header):
            self._orphans.add(block, missing, source)
            return Orphan(block, self._orphans.below(missing))
        if self._is_surplus(block):
            return Surplus(block)
        try:
            self._add(block)
        except RuleError as error:
            self._refuse(block, source, str(error))
            raise
        return self._adopt(block)

    def author(
        self,
        key: Key,
        records: tuple[Record, ...],
        *,
        chain: str,
        type: str,
        now_ms: int,
        parents: tuple[bytes, ...] | None = None,
    ) -> Block:
        """Write a block on the current tips (or on ``parents``) and accept it. Flush before announcing it.

        Raises ConfigError where the key may not author, LocalError where it has been used twice, RuleError where the
        block breaks a rule (too large; parents that are no antichain).
        """
        if key.address not in self.genesis.bonded:
            raise ConfigError(f"{show_address(key.address)} is not bonded on this network: it cannot write blocks")
        branches = self._dag.branches_of(key.address)
        if len(branches) > 1:
            raise LocalError(
                f"{show_address(key.address)} has written two blocks in the same place: the key runs on two machines, "
                "or an old copy of its data came back. Nobody builds on it any more; start with a new key"
            )
        nodes = self._parent_nodes(parents) if parents is not None else dict(self._dag.choose_parents(key.address))
        block = make_block(
            key,
            self.genesis.network,
            records,
            chain=chain,
            type=type,
            seq=branches[0].last + 1 if branches else 0,
            prev=branches[0].tip if branches else None,
            parents=tuple(nodes),
            height=1 + max(node.height for node in nodes.values()),
            anchor=Anchor(0, self.genesis.network),
            timestamp_ms=now_ms,
        )
        self.accept(block.raw)
        return block

    def choose_author(self, keys: Sequence[Key], parents: tuple[bytes, ...] | None) -> Key:
        """Return the first key that may write on ``parents`` (on the tips, if None): one whose last block they cover.

        Raises RuleError where there is none, or a parent is not here.
        """
        if parents is None:
            return keys[0]
        nodes = self._parent_nodes(parents).values()
        for key in keys:
            tips = (self._dag.node(branch.tip) for branch in self._dag.branches_of(key.address))
            if all(any(node.reaches(tip) for node in nodes) for tip in tips if tip):
                return key
        raise RuleError(f"all {len(keys)} keys have blocks beside these parents: build on one of those first")

    def _parent_nodes(self, parents: tuple[bytes, ...]) -> dict[bytes, Node]:
        nodes = {parent: node for parent in parents if (node := self._dag.node(parent))}
        if not nodes or len(nodes) < len(set(parents)):
            raise RuleError("a block takes parents that are here, at least one")
        return nodes

    def flush(self) -> None:
        """Return once everything accepted is on the disk. May run on another thread."""
        self._tables.flush()

    def _is_surplus(self, block: Block) -> bool:
        """Tell whether a block is a further branch of an equivocator that no other author's waiting block needs."""
        header = block.header
        if not self._dag.is_equivocator(header.author):
            return False
        if self._tables.rivals(header.author, header.seq) < MAX_EVIDENCE:
            return False
        for waiting in self._orphans.above(block.id):
            if not self._dag.is_equivocator(waiting.block.header.author):
                return False
        self._surplus[block.id] = None
        if len(self._surplus) > MAX_REFUSED:
            self._surplus.popitem(last=False)
        return True

    def _add(self, block: Block) -> None:
        parents = [node for parent in block.header.parents if (node := self._dag.node(parent))]
        check_in_context(block.header, parents, self._dag)
        placed = self._dag.place(block, parents)
        self._tables.add(block, placed, count=self._count + 1, in_catalog=False)
        self._dag.apply(placed)
        self._count += 1
        self._surplus.pop(block.id, None)
        self._view = self._catalog = None

    def _adopt(self, block: Block) -> Accepted:
        """Add what waited for a block, and what waited for that, level by level."""
        adopted: list[Block] = []
        refused: list[Refusal] = []
        arrived = deque([block.id])
        while arrived:
            for waiting in self._orphans.release(arrived.popleft()):
                if self._is_surplus(waiting.block):
                    continue
                try:
                    self._add(waiting.block)
                except RuleError as error:
                    refused += self._refuse(waiting.block, waiting.source, str(error))
                else:
                    adopted.append(waiting.block)
                    arrived.append(waiting.block.id)
        return Accepted(block, tuple(adopted), tuple(refused))

    def _refuse(self, block: Block, source: str, reason: str) -> list[Refusal]:
        """Remember that a block breaks a rule, and so does all that waits for it."""
        refusals = [Refusal(block.id, source, reason)]
        for waiting in list(self._orphans.above(block.id)):
            self._orphans.remove(waiting.block.id)
            refusals.append(Refusal(waiting.block.id, waiting.source, f"builds on a refused block: {reason}"))
        for refusal in refusals:
            self._refused[refusal.id] = refusal.reason
        while len(self._refused) > MAX_REFUSED:
            self._refused.popitem(last=False)
        return refusals
