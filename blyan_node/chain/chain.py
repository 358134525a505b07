"""A chain of one's own: the full machinery of keys, rules, DAG and store on one machine, without a network."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from blyan_node.chain.block import CHAINS, Block
from blyan_node.chain.closing import Closing
from blyan_node.chain.genesis import Genesis
from blyan_node.chain.keys import Key, digest, load_or_create_key
from blyan_node.chain.records import sign_record
from blyan_node.chain.replica import Replica

WIDTH = 16
"""Validators of a private chain, hence the most blocks that can stand side by side."""


class Chain(Closing):
    """A private devnet in a directory: one owner, who holds the keys of all its validators.

    Blocks of one author follow one another, so blocks that stand side by side need different authors: each is written
    by the first validator whose own last block lies in its past, or who has none. ``name`` is A, B or T; any other
    names a chain of its own, tagged A. A context manager; :meth:`close` unlocks the directory.
    """

    def __init__(self, directory: Path | str, name: str = "A") -> None:
        """Open or create. Raises LocalError (see :meth:`Replica.open` and :func:`load_or_create_key`)."""
        root = Path(directory) / name
        secret = load_or_create_key(root / "key").secret
        self.tag = name if name in CHAINS else "A"
        self._keys = [Key(digest(b"blyan/private/1", secret + bytes([number]))) for number in range(WIDTH)]
        genesis = Genesis.make(f"private {name}", {key.address: 1 for key in self._keys}, created_ms=0)
        self.replica = Replica.open(root / "chain", genesis)

    def add_block(
        self, data: bytes, block_type: str = "data", depends_on: Sequence[Block | bytes] | None = None
    ) -> Block:
        """Write a block that carries ``data`` (at most 128 KiB), flush it and return it.

        It builds on all heads, or on exactly the blocks (or ids) in ``depends_on``. Raises CycleDetected where one of
        these is an ancestor of another, RuleError where one is not here or too many blocks stand side by side.
        """
        parents = None
        if depends_on is not None:
            parents = tuple(block.id if isinstance(block, Block) else block for block in depends_on)
        key = self.replica.choose_author(self._keys, parents)
        record = sign_record(key, self.replica.genesis.network, "data", data, nonce=self.replica.count())
        now_ms = time.time_ns() // 1_000_000
        block = self.replica.author(key, (record,), chain=self.tag, type=block_type, now_ms=now_ms, parents=parents)
        self.replica.flush()
        return block

    def blocks(self, *, after: tuple[int, bytes] | None = None, limit: int = 1000) -> list[Block]:
        """Return blocks in (height, id) order, behind the one at ``after``."""
        return self.replica.blocks(self.tag, after=after, limit=limit)

    def close(self) -> None:
        """Close the database."""
        self.replica.close()
