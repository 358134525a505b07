"""Key-value caches: one per session and shard, preallocated for the session's capacity.

Only :meth:`Cache.append` knows how keys and values lie in memory; a paged cache would replace this file alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


class Cache:
    """The keys and values of one session in the layers that it runs on one shard.

    Those are units ``first`` to ``last``, all of the shard's or fewer: where ranges of peers overlap, a route uses a
    part of one. ``skipped`` counts the shard's layers before them.

    ``length`` tokens are held, of ``capacity``. Memory is reserved at once, but the system hands out pages only as they
    are written. Made by ``Shard.open``; ``close`` gives the capacity back and may be called again.
    """

    def __init__(
        self,
        *,
        first: int,
        last: int,
        skipped: int,
        layers: int,
        kv_heads: int,
        head_dim: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        on_close: Callable[[], None],
    ) -> None:
        self.first, self.last = first, last
        self.skipped, self.layers = skipped, layers
        self.capacity = capacity
        self.length = 0
        self.closed = False
        self._on_close = on_close
        shape = (layers, 1, kv_heads, capacity, head_dim)
        self._keys = torch.empty(shape, dtype=dtype, device=device).unbind()
        self._values = torch.empty(shape, dtype=dtype, device=device).unbind()

    def append(
        self, layer: int, position: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write ``keys`` and ``values`` [kv_heads, tokens, head_dim] of one of the shard's layers from ``position`` on.

        Returns all of them up to there, [1, kv_heads, position + tokens, head_dim], as views. ``length`` stays: the
        shard raises it when every layer has run, so a step that failed has changed nothing.
        """
        tokens = keys.shape[1]
        held_keys, held_values = self._keys[layer - self.skipped], self._values[layer - self.skipped]
        held_keys.narrow(2, position, tokens).copy_(keys)
        held_values.narrow(2, position, tokens).copy_(values)
        return held_keys.narrow(2, 0, position + tokens), held_values.narrow(2, 0, position + tokens)

    def close(self) -> None:
        """Give the memory and the capacity back."""
        if not self.closed:
            self.closed = True
            self._keys = self._values = ()
            self._on_close()
