"""Walking prompts through shards by hand, as stages do over the network."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from blyan_node.inference.generation import Sampling
from blyan_node.model.activation import Activation
from blyan_node.model.cache import Cache
from blyan_node.model.shard import Shard, Token, Work

GREEDY = Sampling(temperature=0.0)


class Pipeline:
    """One session through a chain of shards."""

    def __init__(self, shards: Sequence[Shard], capacity: int = 256) -> None:
        self.shards = shards
        key = os.urandom(16)
        self.caches: list[Cache] = [shard.open(key, capacity) for shard in shards]
        self.position = 0

    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """Feed tokens; return the logits of all of them."""
        activation = self._carry(tokens)
        work = self._work(-1, tokens, activation)
        self.position += len(tokens)
        return self.shards[-1].logits([work])[0]

    def next(self, tokens: Sequence[int], sampling: Sampling = GREEDY) -> int:
        """Feed tokens; return the token drawn after them."""
        activation = self._carry(tokens)
        work = self._work(-1, tokens, activation, sampling)
        self.position += len(tokens)
        (result,) = self.shards[-1].step([work])
        assert isinstance(result, Token)
        return result.id

    def generate(self, prompt: Sequence[int], count: int, sampling: Sampling = GREEDY) -> list[int]:
        drawn = [self.next(prompt, sampling)]
        while len(drawn) < count:
            drawn.append(self.next(drawn[-1:], sampling))
        return drawn

    def truncate(self, position: int) -> None:
        for shard, cache in zip(self.shards, self.caches, strict=True):
            shard.truncate(cache, position)
        self.position = position

    def _carry(self, tokens: Sequence[int]) -> Activation | None:
        activation = None
        for index, shard in enumerate(self.shards[:-1]):
            (result,) = shard.step([self._work(index, tokens, activation)])
            assert isinstance(result, Activation)
            result.check(shard.spec, shard.dtype, len(tokens))
            activation = result
        return activation

    def _work(
        self, index: int, tokens: Sequence[int], activation: Activation | None, sampling: Sampling | None = None
    ) -> Work:
        given = tuple(tokens) if activation is None else None
        return Work(self.caches[index], self.position, given, activation, sampling)
