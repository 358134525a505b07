"""Where the pages of a session's keys and values lie. Two forms, which compute the same.

On a CPU the page table is the processor's own (Prabhu et al., 2024, vAttention): a session gets addresses for its
whole capacity, and the system puts memory behind them as they are written. Attention then reads one contiguous run, at
no cost over a cache without pages. Devices whose memory cannot be had so keep all pages in one tensor, with a table per
session, and gather a session's pages for each step.
"""

from __future__ import annotations

import math
import mmap
import sys
from typing import Protocol

import torch

PAGE = 32
"""Tokens in a page: with heads of 64 in bf16, or 32 in fp32, one head's part of it is one page of the system."""

KeysAndValues = tuple[torch.Tensor, torch.Tensor]


class KvMemory(Protocol):
    """Room for the keys and values of one session; layers count from its first."""

    def append(self, layer: int, position: int, keys: torch.Tensor, values: torch.Tensor) -> KeysAndValues:
        """Write [kv_heads, tokens, head_dim] from ``position`` on; return all up to there, with a batch of one."""

    def forget(self, position: int, length: int) -> None:
        """Let go of the memory behind tokens ``position`` to ``length``."""


class MappedMemory:
    """Contiguous addresses for ``capacity`` tokens of each layer and head, mapped as they are written."""

    def __init__(self, layers: int, kv_heads: int, capacity: int, head_dim: int, dtype: torch.dtype) -> None:
        shape = (layers, 2, 1, kv_heads, capacity, head_dim)
        self._row = head_dim * dtype.itemsize
        self._stripe = capacity * self._row
        try:
            self._map = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
        except OSError as error:
            raise MemoryError(f"no addresses for a cache of {capacity} tokens: {error}") from error
        if sys.platform == "linux":
            self._map.madvise(mmap.MADV_NOHUGEPAGE)  # a huge page would be 2 MiB for the first token of a head
        self._layers = [layer.unbind() for layer in torch.frombuffer(self._map, dtype=dtype).view(shape).unbind()]

    def append(self, layer: int, position: int, keys: torch.Tensor, values: torch.Tensor) -> KeysAndValues:
        """As :class:`KvMemory` says; the result are views."""
        held_keys, held_values = self._layers[layer]
        tokens = keys.shape[1]
        held_keys.narrow(2, position, tokens).copy_(keys)
        held_values.narrow(2, position, tokens).copy_(values)
        return held_keys.narrow(2, 0, position + tokens), held_values.narrow(2, 0, position + tokens)

    def forget(self, position: int, length: int) -> None:
        """Unmap the system's pages that hold forgotten tokens only."""
        if sys.platform != "linux":
            return  # elsewhere this advice need not free anything
        for stripe in range(0, len(self._map), self._stripe):
            start = _round_up(stripe + position * self._row)
            end = min(_round_up(stripe + length * self._row), _round_up(stripe + self._stripe + 1) - mmap.PAGESIZE)
            if start < end:
                self._map.madvise(mmap.MADV_DONTNEED, start, end - start)


def _round_up(address: int) -> int:
    return -(-address // mmap.PAGESIZE) * mmap.PAGESIZE


class SlabMemory:
    """The pages of ``table`` in a slab [layers, pages, 2, kv_heads, PAGE, head_dim] that all sessions share."""

    def __init__(self, slab: torch.Tensor, table: list[int]) -> None:
        self._slab = slab
        self._table = table  # the cache's own, which grows and shrinks
        self._pages = torch.empty(0, dtype=torch.int64, device=slab.device)

    def append(self, layer: int, position: int, keys: torch.Tensor, values: torch.Tensor) -> KeysAndValues:
        """As :class:`KvMemory` says; the result are copies."""
        if len(self._pages) != len(self._table):
            self._pages = torch.tensor(self._table, device=self._slab.device)
        end = position + keys.shape[1]
        where = torch.arange(position, end, device=self._slab.device)
        pages, slots = self._pages[where // PAGE], where % PAGE
        slab = self._slab[layer]
        slab[pages, 0, :, slots] = keys.transpose(0, 1)
        slab[pages, 1, :, slots] = values.transpose(0, 1)
        held = slab.index_select(0, self._pages[: -(-end // PAGE)]).permute(1, 2, 0, 3, 4).flatten(2, 3)
        return held[:1, :, :end], held[1:, :, :end]

    def forget(self, position: int, length: int) -> None:  # noqa: ARG002 as KvMemory says
        """Nothing to do but to read the table again: it may be of the same length and other pages by then."""
        self._pages = self._pages[:0]
