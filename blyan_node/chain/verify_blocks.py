"""The first half of :mod:`blyan_node.chain.verify`: every block by itself, then the DAG that the blocks make."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, fields, replace
from heapq import merge

from blyan_node.chain.block import CHAINS, Header, decode_block, decode_stored, peek_header
from blyan_node.chain.dag import ROOT_BRANCH, Branch, Dag, Node, Placed, make_node
from blyan_node.chain.genesis import Genesis
from blyan_node.chain.rules import check_in_context, check_in_isolation, check_stub
from blyan_node.chain.store import Prefix, Store
from blyan_node.chain.tables import Tables, author_key, branch_entry, height_key, node_entry, state_entry
from blyan_node.errors import CodecError, RuleError, SignatureError, StoreError

HEIGHTS = "the index by height"
AUTHORS = "the index by author"
EVERY = 64
"""Steps between two reports of progress."""
LENGTHS: dict[Prefix, int] = {
    Prefix.STATE: 0,
    Prefix.BLOCK: 32,
    Prefix.NODE: 32,
    Prefix.HEAD: 32,
    Prefix.BRANCH: 8,
    Prefix.HEIGHT: 1 + 8 + 32,
    Prefix.AUTHOR: 20 + 8 + 32,
    Prefix.CUT: 8,
    Prefix.FINAL: 32,
    Prefix.RESULT: 32,
    Prefix.MOVEMENT: 20 + 8 + 8,
    Prefix.ROW: 32,
    Prefix.SNAPSHOT: 8 + 8,
    Prefix.STRIPPED: 0,
    Prefix.VOTE: 8 + 8 + 8,
    Prefix.ABSTAIN: 0,
}
"""How long the keys of each table are, without their first byte."""


@dataclass(frozen=True)
class Fault:
    """Something that is not as it should be: where, and what of it."""

    where: str
    what: str


@dataclass(frozen=True)
class Progress:
    """How far a stage has come, in entries, blocks or cuts."""

    stage: str
    done: int
    total: int


Finding = Fault | Progress


class Entries:
    """The database by tables. Keys that belong to none are reported once, by :meth:`survey`, and passed over."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.counts: Counter[Prefix] = Counter()

    def keys(self, prefix: Prefix, *parts: bytes | int) -> Iterator[bytes]:
        """Iterate over the keys of a table, or of a part of it, in order."""
        return (key for key in self.store.keys(prefix.key(*parts)) if _table(key) is prefix)

    def survey(self) -> Iterator[Finding]:
        """Count the entries of every table."""
        for key in self.store.keys(b""):
            if (table := _table(key)) is None:
                yield Fault("the database", f"entry {key[:64].hex()} belongs to nothing that a chain has")
            else:
                self.counts[table] += 1

    def strays(self, prefix: Prefix, found: int, is_stray: Callable[[bytes], bool]) -> Iterator[bytes]:
        """Iterate over the keys that should not be there, looking for them only where there are more than ``found``."""
        if self.counts[prefix] > found:
            yield from filter(is_stray, self.keys(prefix))


def _table(key: bytes) -> Prefix | None:
    try:
        prefix = Prefix(key[:1])
    except ValueError:
        return None
    if len(key) != 1 + LENGTHS[prefix]:
        return None
    if prefix is Prefix.HEIGHT and key[1:2].decode(errors="replace") not in CHAINS:
        return None
    return prefix


class BlockChecks:
    """Verifies the blocks and the DAG of one database.

    Afterwards ``dag`` holds what the blocks say, and ``damaged`` the blocks whose records cannot be relied on.
    """

    def __init__(self, entries: Entries, tables: Tables, genesis: Genesis) -> None:
        self.dag = Dag(genesis.network, load=self._load)
        self.damaged: set[bytes] = set()
        self.stripped = int.from_bytes(entries.store.get(Prefix.STRIPPED.key()) or b"")
        """The cut through which bodies may be missing."""
        self._network = genesis.network
        self._entries, self._tables, self._store = entries, tables, entries.store
        self._counts = entries.counts
        self._unindexed: list[tuple[bytes, bytes, str]] = []
        self._nodes = self._authored = 0
        self._mended: dict[bytes, Node] = {}  # what should be stored where something else is; one fault each
        self._branches: dict[int, Branch] = {ROOT_BRANCH: self.dag.branches_of(bytes(20))[0]}
        self._witnesses: dict[int, Branch] = {}  # the stored branches, those that are readable
        self._begun: dict[int, bytes | None] = {}  # what the first block of each branch follows

    # Blocks by themselves

    def each_alone(self) -> Iterator[Finding]:
        """Check what each block shows by itself, and that the indexes have it."""
        total = self._counts[Prefix.BLOCK]
        if self._store.get(Prefix.STATE.key()) != state_entry(self._network, total)[1]:
            yield Fault("the database", f"its first entry does not say that it holds {total} blocks of this network")
        for done, key in enumerate(self._entries.keys(Prefix.BLOCK)):
            if done % EVERY == 0:
                yield Progress("blocks", done, total)
            yield from self._alone(key[1:])
        yield Progress("blocks", total, total)
        for key in self._entries.strays(Prefix.AUTHOR, self._authored, self._is_misplaced):
            yield Fault(AUTHORS, f"it has block {key[-32:].hex()} where it does not belong")

    def _alone(self, id: bytes) -> Iterator[Fault]:
        where, raw = _block(id), self._tables.raw(id) or b""
        try:
            found, header, body = peek_header(raw)
        except CodecError as error:
            self.damaged.add(id)
            yield Fault(where, f"it is unreadable: {error}")
            return
        if found != id:
            self.damaged.add(id)
            yield Fault(where, "under its id stands another block")
            return
        try:
            if not body and self._is_pruned(id):
                check_stub(decode_stored(raw), self._network)
            else:
                check_in_isolation(decode_block(raw), self._network)
        except SignatureError as error:
            yield Fault(where, f"it breaks a rule: {error}")
        except RuleError as error:
            self.damaged.add(id)
            stripped = header.body_len and not body
            yield Fault(where, "its body is missing" if stripped else f"it breaks a rule: {error}")
        if self._store.get(height_key(header, id)) is None:
            self._unindexed.append((header.height.to_bytes(8), id, header.chain))
            yield Fault(where, f"it is missing in {HEIGHTS}")
        if self._store.get(author_key(header, id)) is None:
            yield Fault(where, f"it is missing in {AUTHORS}")
        else:
            self._authored += 1

    def _is_pruned(self, id: bytes) -> bool:
        cut = int.from_bytes(self._store.get(Prefix.FINAL.key(id)) or b"")
        return 0 < cut <= self.stripped

    def _is_misplaced(self, key: bytes) -> bool:
        """Tell whether an entry of the index by author is not that of a block here. Unreadable blocks have theirs."""
        if (raw := self._tables.raw(id := key[-32:])) is None:
            return True
        header = _header(raw, id)
        return header is not None and key != author_key(header, id)

    # The DAG

    def in_order(self) -> Iterator[Finding]:
        """Check each block against its causal past, and its stored node against those of its parents."""
        total = self._counts[Prefix.BLOCK]
        self._witnesses = dict(self._read_branches())
        for done, (height, id, chain) in enumerate(self._places()):
            if done % EVERY == 0:
                yield Progress("DAG", min(done, total), total)
            yield from self._take(id, chain, int.from_bytes(height))
        yield Progress("DAG", total, total)
        yield from self._compare_branches()
        yield from self._compare_heads()
        for key in self._entries.strays(Prefix.NODE, self._nodes, lambda key: self._tables.raw(key[1:]) is None):
            yield Fault(_block(key[1:]), "it is missing; only its node is here")

    def _places(self) -> Iterator[tuple[bytes, bytes, str]]:
        """Iterate over (height, id, chain) of all blocks by height and id, so parents come before children."""

        def indexed(chain: str) -> Iterator[tuple[bytes, bytes, str]]:
            return ((key[2:10], key[10:], chain) for key in self._entries.keys(Prefix.HEIGHT, chain.encode()))

        return merge(*map(indexed, CHAINS), sorted(self._unindexed))

    def _take(self, id: bytes, chain: str, height: int) -> Iterator[Fault]:
        if (raw := self._tables.raw(id)) is None:
            yield Fault(HEIGHTS, f"it has block {id.hex()}, which is not here")
            return
        header = _header(raw, id)
        if header is not None and (header.chain, header.height) != (chain, height):
            yield Fault(HEIGHTS, f"it has block {id.hex()} where it does not belong")
            return
        stored = yield from self._stored_node(id)
        if header is None:
            self._rely_on(id, stored)
        else:
            yield from self._judge(id, header, stored)

    def _stored_node(self, id: bytes) -> Generator[Fault, None, Node | None]:
        raw = self._store.get(Prefix.NODE.key(id))
        self._nodes += raw is not None
        try:
            if (node := self._tables.node(id)) is None:
                yield Fault(_block(id), "its node is missing")
            return node
        except StoreError:
            yield Fault(_block(id), "its node is unreadable")
            return None

    def _judge(self, id: bytes, header: Header, stored: Node | None) -> Iterator[Fault]:
        where = _block(id)
        parents = [node for parent in header.parents if (node := self.dag.node(parent))]
        if len(parents) < len(header.parents):
            for parent in self.dag.missing(header):
                yield Fault(where, f"its parent {parent.hex()} is not here")
            self._rely_on(id, stored, header.author)
            return
        try:
            check_in_context(header, parents, self.dag)
        except RuleError as error:
            yield Fault(where, f"it breaks a rule: {error}")
        node = make_node(header, self._branch_of(header, stored), parents)
        if stored is None:
            self._mended[id] = node
        elif node_entry(id, node)[1] != self._store.get(Prefix.NODE.key(id)):
            self._mended[id] = node
            names = [field.name for field in fields(Node) if getattr(node, field.name) != getattr(stored, field.name)]
            yield Fault(where, f"its node does not follow from its header and its parents: {', '.join(names)}")
        self._apply(id, node, header.author, header.prev)

    def _branch_of(self, header: Header, stored: Node | None) -> int:
        """Return the branch that a block lies on: the stored one, if any order of arrival can have put it there."""
        if stored is not None and self._can_lie_on(stored.branch, header):
            return stored.branch
        numbers = self._branches.keys() | self._witnesses.keys()
        if stored is not None and stored.branch not in numbers and stored.past.get(stored.branch) == header.seq + 1:
            return stored.branch  # it is the entry of the branch that is missing or unreadable
        able = [number for number in numbers if self._can_lie_on(number, header)]
        return min(able, key=lambda number: (number not in self._branches, number), default=1 + max(numbers))

    def _can_lie_on(self, number: int, header: Header) -> bool:
        """Tell whether a block goes on with a branch, or begins it and the branch's entry says so too."""
        if (branch := self._branches.get(number)) is not None:
            return (branch.author, branch.tip) == (header.author, header.prev)
        branch = self._witnesses.get(number)
        return branch is not None and (branch.author, branch.first) == (header.author, header.seq)

    def _read_branches(self) -> Iterator[tuple[int, Branch]]:
        for key in self._entries.keys(Prefix.BRANCH):
            try:
                if branch := self._tables.branch(number := int.from_bytes(key[1:])):
                    yield number, branch
            except StoreError:
                pass  # told when it is compared

    def _rely_on(self, id: bytes, stored: Node | None, author: bytes | None = None) -> None:
        """Let a block stand where it is stored, though it could not be judged: its children can."""
        if stored is None:
            return
        if (branch := self._branches.get(stored.branch) or self._witnesses.get(stored.branch)) is not None:
            author = branch.author
        if author is not None:
            self._apply(id, stored, author, None)

    def _apply(self, id: bytes, node: Node, author: bytes, prev: bytes | None) -> None:
        branch = self._branches.get(node.branch)
        if branch is None:
            self._begun[node.branch] = prev
            branch = Branch(author, node.seq, node.seq, id)
        self._branches[node.branch] = replace(branch, last=node.seq, tip=id)
        self.dag.apply(Placed(id, node, self._branches[node.branch]))

    def _load(self, id: bytes) -> Node | None:
        """Return the node of a block that was taken in, however long ago."""
        if (node := self._mended.get(id)) is not None:
            return node
        try:
            node = self._tables.node(id)
        except StoreError:
            return None
        return node if node is not None and node.branch in self._branches else None

    def _compare_branches(self) -> Iterator[Fault]:
        stored = {int.from_bytes(key[1:]) for key in self._entries.keys(Prefix.BRANCH)}
        for number in sorted(stored | self._branches.keys() - {ROOT_BRANCH}):
            where, branch = f"branch {number}", self._branches.get(number)
            if branch is None:
                yield Fault(where, "no block lies on it")
            elif number not in stored:
                yield Fault(where, "its entry is missing")
            elif self._store.get(Prefix.BRANCH.key(number)) != branch_entry(number, branch)[1]:
                yield Fault(where, "its entry does not follow from the blocks on it")
        for number, prev in sorted(self._begun.items()):
            if number >= len(self._branches):
                yield Fault(f"branch {number}", f"there are only {len(self._branches) - 1} branches")
            node = None if prev is None else self.dag.node(prev)
            if node is not None and (node.branch > number or self._branches[node.branch].last == node.seq):
                yield Fault(f"branch {number}", "it begins where an older one of its author could have gone on")

    def _compare_heads(self) -> Iterator[Fault]:
        heads = set(self.dag.heads()) - {self._network}
        stored = {key[1:] for key in self._entries.keys(Prefix.HEAD)}
        for id in sorted(heads - stored):
            yield Fault(_block(id), "it has no children, but is not among the stored heads")
        for id in sorted(stored - heads):
            yield Fault(
                _block(id), "it is stored as a head, but " + ("has children" if self.dag.node(id) else "unknown")
            )


def _block(id: bytes) -> str:
    return f"block {id.hex()}"


def _header(raw: bytes, id: bytes) -> Header | None:
    """Return the header of an encoded block, None where it is not readable or that of another block."""
    try:
        found, header, _ = peek_header(raw)
    except CodecError:
        return None
    return header if found == id else None
