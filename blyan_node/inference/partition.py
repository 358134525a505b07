"""The static split of a model's layers over nodes that start together, by memory and speed. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import TypedDict

from blyan_node.errors import ConfigError

LAYERS = 32


class Partition(TypedDict):
    """What one node gets: consecutive layers, perhaps none."""

    layers: list[int]


class LayerPartitioner:
    """Splits ``layers`` layers that weigh the same."""

    def __init__(self, layers: int = LAYERS) -> None:
        self.layers = layers

    def partition_model(
        self, num_gpus: int, memory: Sequence[int] | None = None, speed: Sequence[float] | None = None
    ) -> list[Partition]:
        """Give each of ``num_gpus`` nodes consecutive layers, in the order of the nodes, each layer to one of them.

        ``memory`` says how many layers each has room for, ``speed`` how many it does in a second; without them all are
        alike. The slowest stage is then as fast as can be: a layer more goes to whoever has it done first. Raises
        ConfigError where the layers do not fit, or the lists are not of that many nodes.
        """
        rooms = list(memory) if memory is not None else [self.layers] * num_gpus
        speeds = list(speed) if speed is not None else [1.0] * num_gpus
        if not len(rooms) == len(speeds) == num_gpus or min(speeds, default=1.0) <= 0 or min(rooms, default=0) < 0:
            raise ConfigError(f"memory and speed have to be given for each of {num_gpus} nodes, speed above 0")
        if sum(rooms) < self.layers:
            raise ConfigError(f"{self.layers} layers do not fit on {num_gpus} nodes with room for {sum(rooms)}")
        counts = [0] * num_gpus
        next_done = [(1 / speeds[node], node) for node in range(num_gpus) if rooms[node]]
        heapq.heapify(next_done)
        for _ in range(self.layers):
            _, node = heapq.heappop(next_done)
            counts[node] += 1
            if counts[node] < rooms[node]:
                heapq.heappush(next_done, ((counts[node] + 1) / speeds[node], node))
        starts = [sum(counts[:node]) for node in range(num_gpus)]
        return [{"layers": list(range(start, start + count))} for start, count in zip(starts, counts, strict=True)]
