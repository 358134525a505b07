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
        shape = (layers, kv_heads, capacity, head_dim)
        self._keys = torch.empty(shape, dtype=dtype, device=device)
        self._values = torch.empty(shape, dtype=dtype, device=device)

    def append(
        self, layer: int, position: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write ``keys`` and ``values`` [tokens, kv_heads, head_dim] of one of the shard's layers from ``position`` on.

        Returns all of them up to there, [kv_heads, position + tokens, head_dim], as views. ``length`` stays: the shard
        raises it when every layer has run, so a step that failed has changed nothing.
        """
        layer, end = layer - self.skipped, position + keys.shape[0]
        self._keys[layer, :, position:end] = keys.transpose(0, 1)
        self._values[layer, :, position:end] = values.transpose(0, 1)
        return self._keys[layer, :, :end], self._values[layer, :, :end]

    def close(self) -> None:
        """Give the memory and the capacity back."""
        if not self.closed:
            self.closed = True
            self._keys = self._values = torch.empty(0)
            self._on_close()
