"""The parts of a simulation that need no network: signatures that are hashes, and a DAG of bit masks."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from blyan_node.errors import SignatureError

NETWORK = hashlib.sha256(b"simulated").digest()


@dataclass(frozen=True)
class FastSigner:
    """Signs with a hash: 65 bytes that only :func:`fast_recover` takes for a signature."""

    address: bytes

    def sign(self, message_digest: bytes) -> bytes:
        return hashlib.sha256(b"secret" + self.address + message_digest).digest() + self.address + bytes(13)


def fast_recover(message_digest: bytes, signature: bytes) -> bytes:
    address = signature[32:52]
    if FastSigner(address).sign(message_digest) != signature:
        raise SignatureError("forged")
    return address


def address(number: int) -> bytes:
    return bytes([number + 1]) * 20


@dataclass(frozen=True, eq=False)
class SimBlock:
    """``past`` has bit i for the block of index i; indexes grow along the DAG. Without payload it acknowledges."""

    index: int
    id: bytes
    author: bytes
    seq: int
    anchor: int
    payload: bool
    parents: tuple[bytes, ...]
    past: int


class Universe:
    """All blocks that anybody wrote in one run."""

    def __init__(self) -> None:
        root = SimBlock(0, NETWORK, bytes(20), 0, 0, False, (), 1)
        self.blocks = [root]
        self.by_id = {NETWORK: root}
        self.payload = 0
        self.by_author: dict[bytes, int] = defaultdict(int)
        self.anchored: dict[tuple[bytes, int], int] = defaultdict(int)

    @property
    def payload_to_acknowledge(self) -> int:
        """The blocks that call for acknowledgements."""
        return self.payload

    def write(self, author: bytes, seq: int, anchor: int, payload: bool, parents: Iterable[bytes]) -> SimBlock:
        index, parents = len(self.blocks), tuple(sorted(parents))
        past = self.past(parents) | 1 << index
        id = hashlib.sha256(index.to_bytes(4) + author).digest()
        block = SimBlock(index, id, author, seq, anchor, payload, parents, past)
        self.blocks.append(block)
        self.by_id[id] = block
        self.payload |= payload << index
        self.by_author[author] |= 1 << index
        self.anchored[author, anchor] |= 1 << index
        return block

    def past(self, ids: Iterable[bytes]) -> int:
        mask = 0
        for id in ids:
            mask |= self.by_id[id].past
        return mask

    def antichain(self, ids: Iterable[bytes]) -> list[SimBlock]:
        """Leave out what others have in their past; the highest first."""
        found: list[SimBlock] = []
        for block in sorted({self.by_id[id] for id in ids}, key=lambda block: -block.index):
            if not any(other.past >> block.index & 1 for other in found):
                found.append(block)
        return found

    def in_mask(self, mask: int, most: int) -> list[SimBlock]:
        found = []
        while mask and len(found) < most:
            index = (mask & -mask).bit_length() - 1
            found.append(self.blocks[index])
            mask &= mask - 1
        return found
