"""Paged key-value caches: one pool of pages for each shard, one cache for each session.

A page is room for PAGE consecutive tokens in all layers of the shard (Kwon et al., 2023, PagedAttention). A session
claims what it was promised when it opened, and takes one page more whenever it outgrows that.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from blyan_node.errors import Overloaded, RuleError
from blyan_node.model.kv_memory import PAGE, KvMemory, MappedMemory, SlabMemory


def pages_for(tokens: int) -> int:
    """Pages that hold ``tokens`` tokens."""
    return -(-tokens // PAGE)


class Pool:
    """The pages of one shard: how many are claimed, and which are in use.

    Who is promised pages may take them at any time, so a page is free only while nobody has claimed it. ``slab`` asks
    for one tensor that holds all pages; without it each session's pages are mapped by the system (the CPU only).
    """

    def __init__(
        self,
        tokens: int,
        *,
        layers: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        slab: bool,
    ) -> None:
        self.pages = self.free = max(tokens, 0) // PAGE
        self._kv_heads, self._head_dim, self._dtype = kv_heads, head_dim, dtype
        self._fresh = 0  # pages from this one on were never used
        self._returned: list[int] = []
        self._slab: torch.Tensor | None = None
        if slab:
            shape = (layers, self.pages, 2, kv_heads, PAGE, head_dim)
            self._slab = torch.empty(shape, dtype=dtype, device=device)

    def claim(self, pages: int) -> None:
        """Set pages aside; raise Overloaded where there are not so many."""
        if pages > self.free:
            raise Overloaded(
                f"the cache has room for {self.free * PAGE} tokens, not for {pages * PAGE}; try again later"
            )
        self.free -= pages

    def unclaim(self, pages: int) -> None:
        """Give up a claim."""
        self.free += pages

    def take(self) -> int:
        """A page of those that were claimed."""
        if self._returned:
            return self._returned.pop()
        self._fresh += 1
        return self._fresh - 1

    def give_back(self, pages: list[int]) -> None:
        """Return pages that were taken; the claim stays."""
        self._returned += pages

    def memory(self, skipped: int, layers: int, capacity: int, table: list[int]) -> KvMemory:
        """Room for one session in ``layers`` of the shard's layers after ``skipped``; ``table`` lists its pages."""
        if self._slab is not None:
            return SlabMemory(self._slab[skipped : skipped + layers], table)
        return MappedMemory(layers, self._kv_heads, capacity, self._head_dim, self._dtype)


class Cache:
    """The keys and values of one session in the layers that it runs on one shard.

    Those are units ``first`` to ``last``, all of the shard's or fewer: where ranges of peers overlap, a route uses a
    part of one. ``skipped`` counts the shard's layers before them.

    ``length`` tokens are held, of at most ``capacity``, and ``pages`` are claimed: never fewer than the ``promised``
    tokens take. Raises Overloaded where these are not there. ``close`` gives all back and may be called again.
    """

    def __init__(
        self,
        pool: Pool,
        *,
        first: int,
        last: int,
        skipped: int,
        layers: int,
        capacity: int,
        promised: int,
        on_close: Callable[[], None],
    ) -> None:
        self.first, self.last = first, last
        self.skipped, self.layers = skipped, layers
        self.capacity = capacity
        self.length = 0
        self.closed = False
        self._pool, self._on_close = pool, on_close
        self._promised = self.pages = pages_for(promised)
        self._table: list[int] = []
        self._memory = pool.memory(skipped, layers, pages_for(capacity) * PAGE, self._table) if layers else None
        pool.claim(self.pages)  # not before the memory is there

    def reserve(self, tokens: int) -> None:
        """Have the pages that ``tokens`` tokens take; raise Overloaded, and change nothing, where too few are free."""
        pages = pages_for(tokens)
        if pages > self.pages:
            self._pool.claim(pages - self.pages)
            self.pages = pages
        while len(self._table) < pages:
            self._table.append(self._pool.take())

    def append(
        self, layer: int, position: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write ``keys`` and ``values`` [kv_heads, tokens, head_dim] of one of the shard's layers from ``position`` on.

        Pages for them are reserved. Returns all of them up to there, [1, kv_heads, position + tokens, head_dim].
        ``length`` stays: the shard raises it when every layer has run, so a step that failed has changed nothing.
        """
        if self._memory is None:
            raise RuleError("this cache has no layers, or is closed")
        return self._memory.append(layer - self.skipped, position, keys, values)

    def truncate(self, position: int) -> None:
        """Forget the tokens from ``position`` on, and give back the pages that held nothing else."""
        keep = pages_for(position)
        self._pool.give_back(self._table[keep:])
        del self._table[keep:]
        claimed = max(keep, self._promised)
        self._pool.unclaim(self.pages - claimed)
        self.pages = claimed
        if self._memory is not None:
            self._memory.forget(position, self.length)
        self.length = position

    def close(self) -> None:
        """Give the memory and the pages back."""
        if not self.closed:
            self.closed = True
            self._memory = None
            self._pool.give_back(self._table)
            self._pool.unclaim(self.pages)
            self._table, self.pages = [], 0
            self._on_close()
