"""Blocks of every kind for tests: fixed keys, a genesis over them, and a forge that breaks what it is told to."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from blyan_node.chain.block import Anchor, Block, Header, encode_body, make_block, seal
from blyan_node.chain.genesis import Genesis
from blyan_node.chain.keys import Key
from blyan_node.chain.records import Record

KEYS = [Key(bytes([number]) * 32) for number in range(1, 9)]
STRANGER = Key(bytes([99]) * 32)
GENESIS = Genesis.make("test", {key.address: 10 for key in KEYS}, created_ms=1_700_000_000_000)
NETWORK = GENESIS.network


@dataclass
class Forge:
    """Writes blocks without a replica. Knows the height of what it wrote and each author's last block."""

    heights: dict[bytes, int] = field(default_factory=lambda: {NETWORK: 0})
    last: dict[bytes, Block] = field(default_factory=dict)
    network: bytes = NETWORK

    def block(
        self,
        key: Key = KEYS[0],
        parents: tuple[bytes, ...] = (),
        records: tuple[Record, ...] = (),
        *,
        prev: Block | str | None = "last",
        **changes: Any,
    ) -> Block:
        """Write the next block of an author on ``parents`` (default: its last block, or the genesis).

        ``prev`` picks another of its blocks, or None for a second first block; ``changes`` replace header fields.
        """
        before = self.last.get(key.address) if prev == "last" else prev
        parents = parents or ((before.id,) if before else (self.network,))
        made = make_block(
            key,
            self.network,
            records,
            chain="T",
            type="data",
            seq=before.header.seq + 1 if before else 0,
            prev=before.id if before else None,
            parents=parents,
            height=1 + max(self.heights[parent] for parent in parents),
            anchor=Anchor(0, self.network),
            timestamp_ms=len(self.heights),
        )
        if changes:
            made = self.reforge(key, made, **changes)
        self.heights[made.id] = made.height
        self.last[key.address] = made
        return made

    @staticmethod
    def reforge(key: Key, block: Block, **changes: Any) -> Block:
        """Sign a block anew with header fields replaced."""
        header: Header = replace(block.header, **changes)
        return seal(key, header, encode_body(block.records))
