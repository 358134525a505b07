"""The Merkle tree of RFC 6962, section 2.1: SHA-256 with prefix 0x00 for leaves and 0x01 for inner nodes.

The tree of n leaves splits at the largest power of two below n. Built from the bottom that is: pair neighbours, and
let an odd last node rise as it is. The tree of no leaves is sha256 of nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol

from blyan_node.errors import IntegrityError

HASH_SIZE = 32
EMPTY_ROOT = hashlib.sha256(b"").digest()


def leaf_hash(data: bytes | bytearray | memoryview) -> bytes:
    """Hash the data of one leaf."""
    hasher = hashlib.sha256(b"\x00")
    hasher.update(data)
    return hasher.digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Hash two subtrees into their parent."""
    return hashlib.sha256(b"\x01" + left + right).digest()


class Tree:
    """A Merkle tree over leaf hashes, with every level kept: about 64 bytes a leaf, proofs without hashing."""

    def __init__(self, leaves: Sequence[bytes]) -> None:
        """Hash all levels up to the root, from leaf hashes of 32 bytes."""
        self._levels: list[list[bytes]] = [list(leaves)]
        while len(level := self._levels[-1]) > 1:
            above = [node_hash(level[i], level[i + 1]) for i in range(0, len(level) - 1, 2)]
            if len(level) % 2:
                above.append(level[-1])
            self._levels.append(above)

    @property
    def leaves(self) -> list[bytes]:
        """The leaf hashes."""
        return self._levels[0]

    @property
    def root(self) -> bytes:
        """The root, 32 bytes."""
        return self._levels[-1][0] if self._levels[-1] else EMPTY_ROOT

    def proof(self, index: int) -> tuple[bytes, ...]:
        """Return the inclusion proof of a leaf: sibling hashes from the leaf up. Raises IndexError outside the tree."""
        if not 0 <= index < len(self.leaves):
            raise IndexError(f"leaf {index} of {len(self.leaves)}")
        path = []
        for level in self._levels[:-1]:
            sibling = index ^ 1
            if sibling < len(level):
                path.append(level[sibling])
            index >>= 1
        return tuple(path)


def check_proof(leaf: bytes, index: int, count: int, proof: Sequence[bytes], root: bytes) -> None:
    """Check that ``leaf`` (a leaf hash) is number ``index`` of ``count`` under ``root`` (RFC 9162, section 2.1.3.2).

    Raises IntegrityError where it is not.
    """
    if not 0 <= index < count:
        raise IntegrityError(f"leaf {index} of a tree of {count}")
    node, last, rest = leaf, count - 1, list(proof)
    while last:
        if index % 2 or index < last:  # an odd last node has no sibling on this level
            if not rest:
                raise IntegrityError("the Merkle proof is too short")
            sibling = rest.pop(0)
            node = node_hash(sibling, node) if index % 2 else node_hash(node, sibling)
        index, last = index >> 1, last >> 1
    if rest or node != root:
        raise IntegrityError("the Merkle proof does not lead to the root")


class Hashed(Protocol):
    """Anything with a hash of its own: a block."""

    def calculate_hash(self) -> str:
        """Return the hash as 64 hex digits."""
        ...


def generate_merkle_root(blocks: Sequence[Hashed]) -> str:
    """Return the Merkle root over the hashes of blocks, in their order, as 64 hex digits."""
    return Tree([leaf_hash(bytes.fromhex(block.calculate_hash())) for block in blocks]).root.hex()
