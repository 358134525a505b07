"""What a replica keeps in its database, typed: blocks, the nodes of the DAG, heads, branches and indexes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from heapq import merge
from typing import Annotated, TypeVar

from blyan_node.chain.block import MAX_BLOCK, MAX_PARENTS, Block, Header, decode_stored, strip
from blyan_node.chain.dag import Branch, Node, Placed
from blyan_node.chain.genesis import Genesis
from blyan_node.chain.records import Address, Hash
from blyan_node.chain.store import Batch, Prefix, Store
from blyan_node.codec import Size, pack, unpack
from blyan_node.errors import CodecError, StoreError

FORMAT = 3

T = TypeVar("T")


@dataclass(frozen=True)
class _State:
    format: int
    network: Hash
    blocks: int


@dataclass(frozen=True)
class _StoredNode:
    height: int
    branch: int
    seq: int
    parents: Annotated[tuple[Hash, ...], Size(MAX_PARENTS)]
    past: tuple[int, ...]  # branch, reach, branch, reach, … sorted by branch
    anchor: int
    carries: bool


@dataclass(frozen=True)
class _StoredBranch:
    author: Address
    first: int
    last: int
    tip: Hash


class Tables:
    """Reads and writes the database of one network. Whatever does not read back as it was written is damage."""

    def __init__(self, store: Store, genesis: Genesis) -> None:
        """Use an open store. Raises StoreError where it is of another network or format."""
        self._store = store
        self._network = genesis.network
        key = Prefix.STATE.key()
        self.created = store.get(key) is None
        """Whether the database was empty: nothing that this node ever signed is known here."""
        if self.created:
            store.write([state_entry(genesis.network, 0)])
        state = self._read(_State, key)
        if state is not None and state.format != FORMAT:
            raise StoreError(f"the chain in {store.directory} has format {state.format}; this program has {FORMAT}")
        if state is not None and state.network != genesis.network:
            raise StoreError(
                f"the chain in {store.directory} is of network {state.network.hex()}, the genesis file of "
                f"{genesis.network.hex()}: use the genesis file of that network, or another data directory"
            )

    def count(self) -> int:
        """Return the number of blocks."""
        state = self._read(_State, Prefix.STATE.key())
        return 0 if state is None else state.blocks

    def raw(self, id: bytes) -> bytes | None:
        """Return an encoded block, which may have been stripped of its body."""
        return self._store.get(Prefix.BLOCK.key(id))

    def block(self, id: bytes) -> Block | None:
        """Return a block."""
        if (raw := self.raw(id)) is None:
            return None
        try:
            return decode_stored(raw)
        except CodecError as error:
            raise StoreError(self._store.damaged(f"block {id.hex()} is unreadable")) from error

    def node(self, id: bytes) -> Node | None:
        """Return the node of a block in the DAG."""
        if (stored := self._read(_StoredNode, Prefix.NODE.key(id))) is None:
            return None
        if len(stored.past) % 2:
            raise StoreError(self._store.damaged(f"the node of block {id.hex()} is unreadable"))
        past = dict(zip(stored.past[::2], stored.past[1::2], strict=True))
        return Node(stored.height, stored.branch, stored.seq, stored.parents, past, stored.anchor, stored.carries)

    def heads(self) -> list[bytes]:
        """Return the ids of the blocks without children."""
        return [key[1:] for key in self._store.keys(Prefix.HEAD.key())]

    def branches(self) -> dict[int, Branch]:
        """Return all branches by number."""
        numbers = (int.from_bytes(key[1:]) for key in self._store.keys(Prefix.BRANCH.key()))
        return {number: branch for number in numbers if (branch := self.branch(number))}

    def branch(self, number: int) -> Branch | None:
        """Return one branch."""
        if (stored := self._read(_StoredBranch, Prefix.BRANCH.key(number))) is None:
            return None
        return Branch(stored.author, stored.first, stored.last, stored.tip)

    def rivals(self, author: bytes, seq: int) -> list[bytes]:
        """Return the ids of an author's blocks with one seq."""
        return [key[29:] for key in self._store.keys(Prefix.AUTHOR.key(author, seq))]

    def ordered(
        self, chains: Sequence[str], after: tuple[int, bytes] | None, *, reverse: bool = False
    ) -> Iterator[Block]:
        """Iterate over the blocks of some chains in (height, id) order or backwards, behind the place ``after``."""
        return (self.indexed(id) for id in self.ids(chains, after, reverse=reverse))

    def ids(self, chains: Sequence[str], after: tuple[int, bytes] | None, *, reverse: bool = False) -> Iterator[bytes]:
        """Iterate over the ids of the same blocks in the same order, reading none of them."""
        ranges = []
        for chain in chains:
            prefix = Prefix.HEIGHT.key(chain.encode())
            place = None if after is None else Prefix.HEIGHT.key(chain.encode(), *after)
            start, end = (None, place) if reverse else (place, None)
            ranges.append(self._store.keys(prefix, after=start, before=end, reverse=reverse))
        for key in merge(*ranges, key=lambda key: key[2:], reverse=reverse):
            yield key[10:]

    def add(self, block: Block, placed: Placed, *, count: int) -> None:
        """Write a block and all that follows from it, in one batch; ``count`` is the number of blocks with it."""
        self._store.write(self.entries(block, placed, count=count))

    def entries(self, block: Block, placed: Placed, *, count: int) -> Batch:
        """Return what :meth:`add` writes."""
        return [
            state_entry(self._network, count),
            (Prefix.BLOCK.key(block.id), block.raw),
            node_entry(block.id, placed.node),
            branch_entry(placed.node.branch, placed.branch),
            (height_key(block.header, block.id), b""),
            (author_key(block.header, block.id), b""),
            *((Prefix.HEAD.key(parent), None) for parent in block.header.parents),
            (Prefix.HEAD.key(block.id), b""),
        ]

    def strip(self, ids: Iterable[bytes]) -> Batch:
        """Return what takes the bodies of these blocks away."""
        return [(Prefix.BLOCK.key(id), strip(raw)) for id in sorted(ids) if (raw := self.raw(id)) is not None]

    def flush(self) -> None:
        """See :meth:`Store.flush`."""
        self._store.flush()

    def close(self) -> None:
        """Close the database."""
        self._store.close()

    def indexed(self, id: bytes) -> Block:
        """Return a block that an index names. Raises StoreError where it is not here."""
        if (block := self.block(id)) is None:
            raise StoreError(self._store.damaged(f"block {id.hex()} is in an index but not here"))
        return block

    def _read(self, cls: type[T], key: bytes) -> T | None:
        if (raw := self._store.get(key)) is None:
            return None
        try:
            return unpack(cls, raw, most=MAX_BLOCK)
        except CodecError as error:
            raise StoreError(self._store.damaged(f"an entry {key[:1]!r} is unreadable")) from error


# The entries of a block, as they are written and as verification expects them


def state_entry(network: bytes, blocks: int) -> tuple[bytes, bytes]:
    """Return the entry that says what the database holds."""
    return Prefix.STATE.key(), pack(_State(FORMAT, network, blocks))


def node_entry(id: bytes, node: Node) -> tuple[bytes, bytes]:
    """Return the entry of a block's node."""
    past = tuple(number for pair in sorted(node.past.items()) for number in pair)
    stored = _StoredNode(node.height, node.branch, node.seq, node.parents, past, node.anchor, node.carries)
    return Prefix.NODE.key(id), pack(stored)


def branch_entry(number: int, branch: Branch) -> tuple[bytes, bytes]:
    """Return the entry of a branch."""
    return Prefix.BRANCH.key(number), pack(_StoredBranch(branch.author, branch.first, branch.last, branch.tip))


def height_key(header: Header, id: bytes) -> bytes:
    """Return the key of a block in the index by height."""
    return Prefix.HEIGHT.key(header.chain.encode(), header.height, id)


def author_key(header: Header, id: bytes) -> bytes:
    """Return the key of a block in the index by author."""
    return Prefix.AUTHOR.key(header.author, header.seq, id)
