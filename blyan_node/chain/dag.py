"""The DAG of accepted blocks: who is an ancestor of whom, the heads, and who equivocated. Pure: no I/O, no clock.

Reachability is answered without a search. Every block knows its author's block before it (``prev``), which lies in
its past, so the blocks of one author form a *branch*: a path; an equivocator's fork starts a new branch. Each
block carries a *past*: for every branch, how far along it the block's ancestors (and itself) reach. That is a chain
decomposition index (Jagadish, TODS 1990), or a vector clock (Mattern 1989) over branches, and it is exact: ``a`` is an
ancestor of ``b`` if and only if the past of ``b`` reaches at least to ``a`` on the branch of ``a``. One look-up,
however deep the DAG. Numbers of branches depend on the order of arrival and are local; answers do not.

The past of a block has one entry per branch in it: one per author, and few more, because a block may not build
directly on an author whose equivocation lies in its past (see :mod:`blyan_node.chain.rules`), so each honest author
lets in at most one branch of each equivocator.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush

from blyan_node.chain.block import MAX_PARENTS, Block, Header
from blyan_node.errors import StoreError

Past = Mapping[int, int]
"""Branch number → 1 + the ``seq`` of its last block within."""

ROOT_BRANCH = 0
ROOT_AUTHOR = bytes(20)


@dataclass(frozen=True)
class Node:
    """What the DAG needs to know of a block."""

    height: int
    branch: int
    seq: int
    parents: tuple[bytes, ...]
    past: Past
    anchor: int = 0
    """The number of the cut that the block is anchored at."""
    carries: bool = False
    """Whether the block carries records; one without acknowledges."""

    def reaches(self, other: Node) -> bool:
        """Tell whether ``other`` is this block or an ancestor of it."""
        return lies_in(other, self.past)


@dataclass(frozen=True)
class Branch:
    """A path of blocks of one author, linked by ``prev``: from ``first`` (a seq) to the block ``tip`` at ``last``."""

    author: bytes
    first: int
    last: int
    tip: bytes


ROOT = Node(height=0, branch=ROOT_BRANCH, seq=0, parents=(), past={ROOT_BRANCH: 1})
"""The genesis, as the ancestor of every block."""


@dataclass(frozen=True)
class Placed:
    """Where a block will stand once it is applied: its node, and its branch with the block as tip."""

    id: bytes
    node: Node
    branch: Branch


class Dag:
    """An index over the accepted blocks. Holds heads, branches and a bounded cache; other nodes come from ``load``."""

    def __init__(
        self,
        root: bytes,
        *,
        load: Callable[[bytes], Node | None],
        heads: Iterable[bytes] = (),
        branches: Mapping[int, Branch] | None = None,
        cached: int = 8192,
    ) -> None:
        """Start from stored heads and branches; ``load`` reads the node of a stored block."""
        self.root = root
        self._load = load
        self._cached = cached
        self._cache: OrderedDict[bytes, Node] = OrderedDict()
        self._heads = set(heads) or {root}
        self._branches = {ROOT_BRANCH: Branch(ROOT_AUTHOR, 0, 0, root), **(branches or {})}
        self._branches_of: dict[bytes, list[int]] = {}
        for number, branch in sorted(self._branches.items()):
            self._branches_of.setdefault(branch.author, []).append(number)

    def node(self, id: bytes) -> Node | None:
        """Return the node of an accepted block or of the genesis, None where there is none."""
        if id == self.root:
            return ROOT
        if (node := self._cache.get(id)) is not None:
            self._cache.move_to_end(id)
            return node
        if (node := self._load(id)) is not None:
            self._remember(id, node)
        return node

    def _remember(self, id: bytes, node: Node) -> None:
        self._cache[id] = node
        if len(self._cache) > self._cached:
            self._cache.popitem(last=False)

    def known(self, id: bytes) -> Node:
        """Return the node of a block that must be here. Raises StoreError where it is not."""
        if (node := self.node(id)) is None:
            raise StoreError(f"block {id.hex()} is named by the chain's index but is not in the database")
        return node

    def past_of(self, ids: Iterable[bytes]) -> Past:
        """Return the union of the pasts of blocks that are here."""
        return merge(self.known(id).past for id in ids)

    def heads(self) -> tuple[bytes, ...]:
        """Return the blocks without children, sorted; the genesis alone where there is none. Always an antichain."""
        return tuple(sorted(self._heads))

    def branches_of(self, author: bytes) -> list[Branch]:
        """Return the branches of an author; more than one is proof of equivocation."""
        return [self._branches[number] for number in self._branches_of.get(author, ())]

    def author_of(self, node: Node) -> bytes:
        """Return the author of a block."""
        return self._branches[node.branch].author

    def is_equivocator(self, author: bytes) -> bool:
        """Tell whether two blocks here prove that the author forked its own chain."""
        return len(self._branches_of.get(author, ())) > 1

    def missing(self, header: Header) -> tuple[bytes, ...]:
        """Return the parents that are not here."""
        return tuple(parent for parent in header.parents if self.node(parent) is None)

    def reach(self, author: bytes, past: Past) -> tuple[int, bool]:
        """Tell how many of its blocks an author has in a past, and whether two of them are rivals there.

        In a past that holds no fork the author's branches follow one another, so their blocks number 1 + the last seq.
        """
        blocks, end = 0, 0
        for number in self._branches_of.get(author, ()):
            if reached := past.get(number, 0):
                blocks += reached - self._branches[number].first
                end = max(end, reached)
        return blocks, blocks > end

    def place(self, block: Block, parents: Iterable[Node]) -> Placed:
        """Work out where a block that follows the rules will stand. Changes nothing.

        The author's first branch to reach a ``prev`` goes on with it; whoever comes later starts a new branch.
        """
        header = block.header
        prev = self._prev_branch(header)
        if prev is not None:
            number, branch = prev, replace(self._branches[prev], last=header.seq, tip=block.id)
        else:
            number = len(self._branches)
            branch = Branch(header.author, first=header.seq, last=header.seq, tip=block.id)
        node = make_node(header, number, parents)
        return Placed(block.id, node, branch)

    def _prev_branch(self, header: Header) -> int | None:
        for number in self._branches_of.get(header.author, ()):
            if self._branches[number].tip == header.prev:
                return number
        return None

    def apply(self, placed: Placed) -> None:
        """Make a placed block part of the DAG."""
        number = placed.node.branch
        if number not in self._branches:
            self._branches_of.setdefault(placed.branch.author, []).append(number)
        self._branches[number] = placed.branch
        self._remember(placed.id, placed.node)
        self._heads.difference_update(placed.node.parents)
        self._heads.add(placed.id)

    def tips(self) -> list[tuple[bytes, Node]]:
        """Return what an honest author builds on: an antichain, sorted by (height, id).

        These are the heads, except that a block of a known equivocator is replaced by its parents (Blocklace, arXiv
        2402.08068): what others had already built on it stays covered, what only the equivocator wrote does not.
        """
        found: dict[bytes, Node] = {}
        waiting = [(-self.known(id).height, id) for id in self._heads]
        heapify(waiting)
        seen = set(self._heads)
        while waiting:  # the highest first: whatever is found later cannot have it in its past
            id = heappop(waiting)[1]
            node = self.known(id)
            if any(tip.reaches(node) for tip in found.values()):
                continue
            if not self.is_equivocator(self.author_of(node)):
                found[id] = node
                continue
            for parent in set(node.parents) - seen:
                seen.add(parent)
                heappush(waiting, (-self.known(parent).height, parent))
        return sorted(found.items(), key=lambda tip: (tip[1].height, tip[0]))

    def choose_parents(self, author: bytes) -> tuple[tuple[bytes, Node], ...]:
        """Choose at most 16 parents for the next block of an author.

        The tip that has the author's own last block in its past must be among them; then the lowest come first, by
        (height, id), so that no tip waits for ever. The author's later blocks pick up the rest.
        """
        tips = self.tips()
        if len(tips) <= MAX_PARENTS:
            return tuple(tips)
        own = [self.known(branch.tip) for branch in self.branches_of(author)]
        covering = [tip for tip in tips if any(tip[1].reaches(node) for node in own)][:1]
        others = [tip for tip in tips if tip not in covering]
        return tuple(covering + others[: MAX_PARENTS - len(covering)])


def make_node(header: Header, branch: int, parents: Iterable[Node]) -> Node:
    """Return the node of a block on a branch; the nodes of its parents give its past."""
    past = {**merge(node.past for node in parents), branch: header.seq + 1}
    return Node(header.height, branch, header.seq, header.parents, past, header.anchor.k, header.carries)


def lies_in(node: Node, past: Past) -> bool:
    """Tell whether a block lies in a past."""
    return past.get(node.branch, 0) > node.seq


def merge(pasts: Iterable[Past]) -> dict[int, int]:
    """Return the union of pasts: the farthest reach on every branch."""
    merged: dict[int, int] = {}
    for past in pasts:
        if not merged:
            merged = dict(past)
            continue
        for branch, reach in past.items():
            if reach > merged.get(branch, 0):
                merged[branch] = reach
    return merged
