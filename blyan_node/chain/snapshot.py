"""Starting a chain from a snapshot of its state instead of replaying all that led to it.

What a peer sends is believed as far as it is proven, in this order:

1. the *rows* of the state after some cut k;
2. the *cuts* 1 to k + 1, each on the one before, with the certificate of the validators that the cut before it names.
   This proves every cut back to the genesis, and cut k + 1 names the root of the state: the rows are the right ones;
3. the *stubs* of all blocks under cut k, which are blocks without their bodies, cut by cut. A cut names its heads, a
   header its parents, by hash: so just these blocks are the ones that were decided.

What is believed beyond that is what finality rests on anyway: that more than 2/3 of stake does not sign a wrong state.
Whoever will not believe it replays everything (an archive does).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from pathlib import Path

from blyan_node.chain.block import Block, decode_stored
from blyan_node.chain.checkpoint import Checkpoint
from blyan_node.chain.closing import Closing
from blyan_node.chain.cut import Certificate, Cut, check_certificate
from blyan_node.chain.dag import Dag
from blyan_node.chain.finals import MAX_ENTRY, StoredCut, final_entry, row_key, snapshot_entries, stripped_entry
from blyan_node.chain.genesis import Genesis
from blyan_node.chain.order import window
from blyan_node.chain.rules import check_in_context, check_stub
from blyan_node.chain.state import authors_between, root_of, state_of_rows
from blyan_node.chain.store import Prefix, Store
from blyan_node.chain.tables import Tables
from blyan_node.chain.validators import ValidatorSet
from blyan_node.codec import pack, unpack
from blyan_node.errors import RuleError

MAX_GROUP = 256 * 2**20
"""Bytes of the blocks of one cut that are held at a time until their cut is complete."""


class SnapshotStart(Closing):
    """Builds a chain in a directory of its own; see the module. For one thread at a time."""

    def __init__(
        self, directory: Path, genesis: Genesis, rows: Sequence[bytes], *, checkpoint: Checkpoint | None = None
    ) -> None:
        """Begin with the rows of a state, sorted. Raises RuleError where they are not, DiskFull or StoreError."""
        self._state, self._rows, self._root = state_of_rows(rows), rows, root_of(rows)
        self.k = self._state.k
        """The cut that the chain will begin with."""
        self._network, self._checkpoint = genesis.network, checkpoint
        self._last_id, self._following = genesis.network, ValidatorSet(genesis.validators)
        self._named = self._following.hash  # of the validators who decide the next cut
        self._recent: deque[tuple[Cut, Certificate, ValidatorSet]] = deque(maxlen=3)
        self._cuts: list[bytes] = []  # as they will be stored
        self._store = Store(directory)
        self._tables = Tables(self._store, genesis)
        self._dag = Dag(genesis.network, load=self._tables.node)
        self._group: dict[bytes, Block] = {}
        self._size = self._blocks = self._built = 0

    def close(self) -> None:
        """Close the database."""
        self._store.close()

    # The cuts

    @property
    def next_cut(self) -> int | None:
        """The number of the cut that is needed next; None once the state is proven."""
        following = self._recent[-1][0].k + 1 if self._recent else 1
        return following if following <= self.k + 1 else None

    def take_cut(self, cut: Cut, certificate: Certificate, deciders: ValidatorSet | None) -> None:
        """Take the next cut; ``deciders`` are those who decided it, where they are not those of the cut before.

        Raises RuleError where it is not the next cut, or not proven.
        """
        if cut.k != self.next_cut or cut.prev_cut != self._last_id:
            raise RuleError(f"cut {cut.k} does not follow: cut {self.next_cut} was due")
        self._following = deciders or self._following
        if self._following.hash != self._named:
            raise RuleError(f"cut {cut.k} comes with other validators than the cut before it names")
        check_certificate(certificate, cut, self._following, self._network)
        if self._checkpoint is not None:
            self._checkpoint.check(cut)
        self._recent.append((cut, certificate, self._following))
        self._last_id, self._named = cut.id, cut.next_validators_hash
        if len(self._recent) == 3:
            self._remember_cut()
        if cut.k > self.k:
            if cut.prev_state_root != self._root:
                raise RuleError(f"the rows are not those of the state after cut {self.k}")
            self._recent.popleft() if len(self._recent) == 3 else None
            self._remember_last()

    def _remember_cut(self) -> None:
        """Work out what is stored of the oldest of three cuts."""
        (cut, certificate, _), (after, _, deciders), (_, _, later) = self._recent
        authors = authors_between(deciders, later, cut.k, self._state)
        self._cuts.append(pack(StoredCut(cut, certificate, after.prev_state_root, deciders, authors)))

    def _remember_last(self) -> None:
        cut, certificate, _ = self._recent[-2]
        deciders = ValidatorSet(self._state.validators)
        self._cuts.append(pack(StoredCut(cut, certificate, self._root, deciders, self._state.authors())))

    # The blocks

    @property
    def is_complete(self) -> bool:
        """Whether all blocks under the cut are here."""
        return self.next_cut is None and self._built == self.k

    def take_stub(self, raw: bytes) -> None:
        """Take the next block, without its body; those of a cut come together, parents before children.

        Raises RuleError for one that does not lie under the cut that is due.
        """
        if self.is_complete:
            raise RuleError(f"a block that does not lie under cut {self.k}")
        block = decode_stored(raw)
        if not block.is_stripped:
            raise RuleError("a block with its body, where only its header was asked for")
        check_stub(block, self._network)
        self._group[block.id] = block
        self._size += len(raw)
        if self._size > MAX_GROUP:
            raise RuleError(f"more than {MAX_GROUP} bytes of blocks, and none of them completes a cut")
        stored = unpack(StoredCut, self._cuts[self._built], most=MAX_ENTRY)
        if all(head in self._group or self._dag.node(head) for head in stored.cut.heads):
            self._complete(stored)

    def _complete(self, stored: StoredCut) -> None:
        """Write a cut and its blocks, once all of its heads are here: the last of them is a head."""
        ids = window(stored.cut.heads, parents=self._parents, settled=lambda id: self._dag.node(id) is not None)
        if len(ids) < len(self._group):
            raise RuleError(f"blocks that do not lie under cut {stored.cut.k}")
        for block in sorted(self._group.values(), key=lambda block: (block.height, block.id)):
            parents = [node for parent in block.header.parents if (node := self._dag.node(parent))]
            if len(parents) < len(block.header.parents):
                raise RuleError("a block that stands before its parents")
            check_in_context(block.header, parents, self._dag)
            placed = self._dag.place(block, parents)
            self._blocks += 1
            self._tables.add(block, placed, count=self._blocks)
            self._dag.apply(placed)
        batch = [final_entry(id, stored.cut.k) for id in sorted(ids)]
        self._store.write([*batch, (Prefix.CUT.key(stored.cut.k), pack(stored))])
        self._group.clear()
        self._size, self._built = 0, self._built + 1

    def _parents(self, id: bytes) -> tuple[bytes, ...]:
        if id not in self._group:
            raise RuleError(f"block {id.hex()} is missing")
        return self._group[id].header.parents

    def finish(self) -> None:
        """Write the state, and sync: now a replica can go on here. Raises RuleError where it is not complete."""
        if not self.is_complete:
            raise RuleError(f"the chain ended at cut {self._built} of {self.k}")
        rows = [(row_key(row), row) for row in self._rows]
        self._store.write([*rows, *snapshot_entries(self.k, self._rows), stripped_entry(self.k)])
        self._store.flush()
