"""A node's replica of the chain: the DAG of accepted blocks, what of it is final, and the ledger that follows.

Synchronous, for one thread; only :meth:`Replica.flush` may run on another. Every block is written in one atomic batch
before memory changes, so a failed write leaves all as it was, and a crash at any point leaves a database that opens.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

from blyan_node.chain.block import (
    CHAINS,
    Anchor,
    Block,
    Header,
    decode_block,
    is_stripped,
    make_block,
    peek_id,
    strip,
)
from blyan_node.chain.catalog import Catalog
from blyan_node.chain.checkpoint import Checkpoint
from blyan_node.chain.closing import Closing
from blyan_node.chain.cut import Certificate, Cut
from blyan_node.chain.dag import Dag, Node, Past
from blyan_node.chain.finals import FinalCut, Finals
from blyan_node.chain.genesis import Genesis
from blyan_node.chain.keys import Key, show_address
from blyan_node.chain.ledger import fold
from blyan_node.chain.order import item_of
from blyan_node.chain.orphans import Orphans
from blyan_node.chain.outcome import Accepted, Committed, Known, Orphan, Outcome, Refusal, Surplus
from blyan_node.chain.records import Record
from blyan_node.chain.retention import Retention
from blyan_node.chain.rules import check_anchor, check_in_context, check_in_isolation
from blyan_node.chain.store import Store, finish_swap, swap
from blyan_node.chain.tables import Tables
from blyan_node.chain.view import View
from blyan_node.chain.windows import Windows
from blyan_node.errors import ConfigError, LocalError, RuleError

MAX_EVIDENCE = 2
"""Blocks of one author with one seq that are kept without being needed: a pair proves the equivocation."""
MAX_REFUSED = 4096


class Replica(Closing):
    """See the module. A context manager; opening reads heads, branches and the final state, not all blocks."""

    def __init__(
        self,
        store: Store,
        genesis: Genesis,
        *,
        orphans: Orphans | None = None,
        retention: Retention | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        """Use an open store, which the replica closes.

        Raises StoreError where it is of another network or format, LocalError where it goes past the checkpoint by
        another cut.
        """
        self.genesis, self.checkpoint = genesis, checkpoint
        self.retention = Retention() if retention is None else retention
        self._orphans = Orphans() if orphans is None else orphans
        self._refused: OrderedDict[bytes, str] = OrderedDict()
        self._surplus: OrderedDict[bytes, None] = OrderedDict()
        self._use(store)

    def _use(self, store: Store) -> None:
        self.directory = store.directory
        self._tables = Tables(store, self.genesis)
        self.finals = Finals(store, self.genesis, self.retention)
        self._count = self._tables.count()
        self.dag = Dag(
            self.genesis.network,
            load=self._tables.node,
            heads=self._tables.heads(),
            branches=self._tables.branches(),
        )
        self._windows = Windows(self.dag, self._tables, self.finals, self.genesis)
        if (fixed := self.checkpoint) and 0 < fixed.k <= self.final.k and self.finals.anchor(fixed.k)[0] != fixed.cut:
            raise LocalError(
                f"the chain in {self.directory} is not the one that the checkpoint names: its cut {fixed.k} is "
                f"{self.finals.anchor(fixed.k)[0].hex()}. Move it away, or correct the setting checkpoint"
            )

    @classmethod
    def open(
        cls,
        directory: Path,
        genesis: Genesis,
        *,
        retention: Retention | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> Replica:
        """Open or create the replica in a directory. Raises AlreadyRunning, DiskFull, StoreError or LocalError."""
        finish_swap(directory)
        store = Store(directory)
        try:
            return cls(store, genesis, retention=retention, checkpoint=checkpoint)
        except BaseException:
            store.close()
            raise

    def close(self) -> None:
        """Close the database."""
        self._tables.close()

    # What is here

    @property
    def created(self) -> bool:
        """Whether the database was empty when it was opened."""
        return self._tables.created

    def heads(self) -> tuple[bytes, ...]:
        """Return the ids of the blocks without children, sorted; of an empty chain, the network's id."""
        return self.dag.heads()

    def height(self) -> int:
        """Return the greatest height of a block, 0 for an empty chain."""
        return max(node.height for head in self.dag.heads() if (node := self.dag.node(head)))

    def count(self) -> int:
        """Return the number of blocks, without the genesis."""
        return self._count

    def has(self, id: bytes) -> bool:
        """Tell whether a block is part of the DAG; the genesis always is."""
        return self.dag.node(id) is not None

    def wants(self, id: bytes) -> bool:
        """Tell whether fetching a block could be of use: not here, not refused, no surplus (see :class:`Surplus`)."""
        if self.has(id) or id in self._refused:
            return False
        if (waiting := self._orphans.get(id)) is not None and not self._fetchable(waiting.missing):
            return False  # held: what it waits for is a cut
        return id not in self._surplus or any(True for _ in self._orphans.above(id))

    def get(self, id: bytes) -> bytes | None:
        """Return a block as it was received, None where it is not here, or not any more with its body."""
        raw = self._tables.raw(id)
        return None if raw is None or is_stripped(raw) else raw

    def stub(self, id: bytes) -> bytes | None:
        """Return a block without its body."""
        raw = self._tables.raw(id)
        return None if raw is None else strip(raw)

    def block(self, id: bytes) -> Block | None:
        """Return a block, decoded; it may have been stripped of its body."""
        return self._tables.block(id)

    def blocks(
        self,
        chain: str | None = None,
        *,
        after: tuple[int, bytes] | None = None,
        limit: int,
        reverse: bool = False,
    ) -> list[Block]:
        """Return up to ``limit`` blocks of one chain, or of all, in (height, id) order, behind the one at ``after``.

        Parents come before children, so a page after the other can be accepted elsewhere without orphans. ``reverse``:
        the highest first.
        """
        chains = CHAINS if chain is None else (chain,)
        return list(islice(self._tables.ordered(chains, after, reverse=reverse), limit))

    @property
    def final(self) -> FinalCut:
        """The last final cut, and the state after it."""
        return self.finals.last

    @property
    def is_below_checkpoint(self) -> bool:
        """Whether the cut that the history must go through is still to come: until then nothing is decided here."""
        return self.checkpoint is not None and self.final.k < self.checkpoint.k

    def is_final(self, id: bytes) -> bool:
        """Tell whether a block that is here, or the genesis, lies under the last final cut."""
        return self._windows.is_final(id)

    def window(self, heads: Iterable[bytes], above: Past | None = None) -> set[bytes]:
        """Return the ids of the blocks under ``heads`` that do not lie in a past (of the last cut, if None)."""
        return self._windows.under(heads, above)

    def window_of(self, k: int) -> list[tuple[int, bytes]]:
        """Return (height, id), in order, of the blocks that cut ``k`` made final; for the next cut, of all the rest."""
        return self._windows.places(k)

    def view(self) -> View:
        """Return the ledger as of now, tentative and final."""
        return self._windows.view()

    def catalog(self) -> Catalog:
        """Return the models on the chain, tentatively."""
        return self._windows.catalog()

    def is_equivocator(self, author: bytes) -> bool:
        """Tell whether two blocks here prove that an author forked its own chain."""
        return self.dag.is_equivocator(author)

    def fork_of(self, author: bytes) -> tuple[Block, Block] | None:
        """Return two blocks of an equivocator with one seq, its first fork: the same wherever they are all here."""
        forks = [branch.first for branch in self.dag.branches_of(author)[1:]]
        if not forks:
            return None
        one, other = self._tables.rivals(author, min(forks))[:2]
        return self._tables.indexed(one), self._tables.indexed(other)

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
            return Orphan(waiting.block, self._fetchable(waiting.missing))
        block = decode_block(raw)
        check_in_isolation(block, self.genesis.network)
        try:
            if missing := self._missing(block.header):
                self._orphans.add(block, missing, source)
                return Orphan(block, self._fetchable(missing))
            if self._is_surplus(block):
                return Surplus(block)
            self._add(block)
        except RuleError as error:
            self._refuse(block, source, str(error))
            raise
        return Accepted(block, *self._adopt(block.id))

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
        if not self.final.state.may_author(key.address):
            raise ConfigError(f"{show_address(key.address)} is no validator of this network: it cannot write blocks")
        branches = self.dag.branches_of(key.address)
        if len(branches) > 1:
            raise LocalError(
                f"{show_address(key.address)} has written two blocks in the same place: the key runs on two machines, "
                "or an old copy of its data came back. Nobody builds on it any more; start with a new key"
            )
        nodes = self._parent_nodes(parents) if parents is not None else dict(self.dag.choose_parents(key.address))
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
            anchor=Anchor(self.final.k, self.final.id),
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
            tips = (self.dag.node(branch.tip) for branch in self.dag.branches_of(key.address))
            if all(any(node.reaches(tip) for node in nodes) for tip in tips if tip):
                return key
        raise RuleError(f"all {len(keys)} keys have blocks beside these parents: build on one of those first")

    def _parent_nodes(self, parents: tuple[bytes, ...]) -> dict[bytes, Node]:
        nodes = {parent: node for parent in parents if (node := self.dag.node(parent))}
        if not nodes or len(nodes) < len(set(parents)):
            raise RuleError("a block takes parents that are here, at least one")
        return nodes

    def flush(self) -> None:
        """Return once everything accepted is on the disk. May run on another thread."""
        self._tables.flush()

    def _is_surplus(self, block: Block) -> bool:
        """Tell whether a block is a further branch of an equivocator, or on too old an anchor, and nobody needs it."""
        header = block.header
        if header.anchor.k + self.genesis.parameters.unbonding >= self.final.k:
            if not self.dag.is_equivocator(header.author):
                return False
            if len(self._tables.rivals(header.author, header.seq)) < MAX_EVIDENCE:
                return False
        for waiting in self._orphans.above(block.id):
            if not self.dag.is_equivocator(waiting.block.header.author):
                return False
        self._surplus[block.id] = None
        if len(self._surplus) > MAX_REFUSED:
            self._surplus.popitem(last=False)
        return True

    def _missing(self, header: Header) -> tuple[bytes, ...]:
        """Return what a block waits for: parents, and the cut that it is anchored at if that is not final here.

        Raises RuleError where a parent was refused, the anchor is wrong, or the author may not write on it.
        """
        for parent in header.parents:
            if (reason := self._refused.get(parent)) is not None:
                raise RuleError(_on_refused(reason))
        missing = self.dag.missing(header)
        if header.anchor.k > self.final.k:
            return (*missing, _held(header.anchor.k))
        check_anchor(header, *self.finals.anchor(header.anchor.k))
        return missing

    def _fetchable(self, missing: Iterable[bytes]) -> tuple[bytes, ...]:
        return tuple(id for id in self._orphans.below(missing) if len(id) == len(self.genesis.network))

    def _add(self, block: Block) -> None:
        check_anchor(block.header, *self.finals.anchor(block.header.anchor.k))
        parents = [node for parent in block.header.parents if (node := self.dag.node(parent))]
        check_in_context(block.header, parents, self.dag)
        placed = self.dag.place(block, parents)
        self._tables.add(block, placed, count=self._count + 1)
        self.dag.apply(placed)
        self._count += 1
        self._surplus.pop(block.id, None)
        self._windows.added(item_of(block))

    def _adopt(self, awaited: bytes) -> tuple[tuple[Block, ...], tuple[Refusal, ...]]:
        """Add what waited for a block or a cut, and what waited for that, level by level."""
        adopted: list[Block] = []
        refused: list[Refusal] = []
        arrived = deque([awaited])
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
        return tuple(adopted), tuple(refused)

    def _refuse(self, block: Block, source: str, reason: str) -> list[Refusal]:
        """Remember that a block breaks a rule, and so does all that waits for it."""
        refusals = [Refusal(block.id, source, reason)]
        for waiting in list(self._orphans.above(block.id)):
            self._orphans.remove(waiting.block.id)
            refusals.append(Refusal(waiting.block.id, waiting.source, _on_refused(reason)))
        for refusal in refusals:
            self._refused[refusal.id] = refusal.reason
        while len(self._refused) > MAX_REFUSED:
            self._refused.popitem(last=False)
        return refusals

    # What becomes final

    def commit(self, cut: Cut, certificate: Certificate) -> Committed:
        """Make a cut final that was decided on the last one, and whose heads are here: fold it, write its effect.

        Flush before relying on it. Raises DiskFull or StoreError: then nothing has changed, or all but the blocks that
        were held for the cut are written. To commit the last cut again goes on with these.
        """
        if cut.id != self.final.id:
            self._finalise(cut, certificate)
        return Committed(self.final, *self._adopt(_held(cut.k)))

    def _finalise(self, cut: Cut, certificate: Certificate) -> None:
        if (cut.k, cut.prev_cut, cut.prev_state_root) != (self.final.k + 1, self.final.id, self.final.root):
            raise LocalError(f"cut {cut.k} was decided on another cut or state than {self.final.k}, the last one here")
        if self.checkpoint is not None:
            self.checkpoint.check(cut)
        items, records = self._windows.ordered(cut.heads)
        folded = fold(self.final.state, records, network=self.genesis.network)
        self.finals.commit(cut, certificate, (item.id for item in items), folded)
        self._windows.committed()
        self._prune()

    def _prune(self) -> None:
        """Take the bodies away that are not kept any more: two cuts for each new one, so no commit takes long."""
        for _ in range(2):
            if (k := self.finals.to_strip()) is not None:
                self.finals.strip(k, self._tables.strip(self._windows.of_cut(k)))

    # Starting anew from a snapshot

    def adopt(self, directory: Path) -> None:
        """Go on with the chain in another directory, which was started from a snapshot, and lose nothing of this one.

        What this validator has signed goes along, and what is in the DAG here and not final there. The directory takes
        the place of this replica's own. Raises DiskFull or StoreError: then the replica is as it was.
        """
        heads = self.dag.heads()
        tentative = sorted((self.dag.known(id).height, id) for id in self.window(heads))
        blocks = [raw for _, id in tentative if (raw := self._tables.raw(id)) is not None]
        with Store(directory) as other:
            other.write(self.finals.signed())
            other.flush()
        self._tables.close()
        try:
            swap(self.directory, directory)
        finally:
            finish_swap(self.directory)
            self._reopen()
        for raw in blocks:
            try:
                self.accept(raw)
            except RuleError:
                pass  # it had a place here only: what it builds on is not part of the chain that was decided

    def _reopen(self) -> None:
        for kept in (self._refused, self._surplus, self._orphans):
            kept.clear()  # comparing heads brings again what waited
        self._use(Store(self.directory))


def _held(k: int) -> bytes:
    """Return what a block on cut ``k`` waits for among the orphans: no block has an id of this length.

    Whichever cut of that number comes, the wait is over: a block that is anchored at another one is refused then.
    """
    return k.to_bytes(8)


def _on_refused(reason: str) -> str:
    """Return why a block is refused that builds on a refused one: of a long row of them all give the first reason."""
    prefix = "builds on a refused block: "
    return prefix + reason.removeprefix(prefix)
