"""Routes may cut overlapping shards anywhere: a session that runs a part of a shard computes what it should."""

from __future__ import annotations

import pytest

from blyan_node.errors import RuleError
from blyan_node.inference.generation import Sampling
from blyan_node.model.activation import Activation
from blyan_node.model.shard import Shard, Token, Work
from tests.unit.model.conftest import Imported

PROMPT = (5, 6, 7, 8, 9)


def walk(parts: list[tuple[Shard, int, int]], steps: int) -> list[int]:
    """Greedy tokens of one session that runs units first..last of each shard in turn."""
    caches = [shard.open(b"s", 64, first, last) for shard, first, last in parts]
    tokens, position, drawn = PROMPT, 0, []
    for _ in range(steps):
        carried: Activation | None = None
        for (shard, _, _), cache in zip(parts, caches, strict=True):
            work = Work(
                cache,
                position,
                tokens=tokens if carried is None else None,
                activation=carried,
                sampling=Sampling(temperature=0) if cache is caches[-1] else None,
            )
            (result,) = shard.step([work])
            carried = result if isinstance(result, Activation) else None
        assert isinstance(result, Token)
        position += len(tokens)
        tokens = (result.id,)
        drawn.append(result.id)
    for cache in caches:
        cache.close()
    return drawn


def test_overlapping_shards_cut_anywhere_equal_the_whole(tiny: Imported) -> None:
    whole, left, right = tiny.shard(), tiny.shard(0, 4), tiny.shard(2, 5)
    expected = walk([(whole, 0, 5)], 6)
    for cut in (1, 2, 3, 4):
        assert walk([(left, 0, cut), (right, cut + 1, 5)], 6) == expected
    # One peer may hold all and yet run only what comes first, or last.
    assert walk([(whole, 0, 2), (right, 3, 5)], 6) == expected
    assert walk([(left, 0, 2), (whole, 3, 5)], 6) == expected


def test_a_session_cannot_ask_for_units_that_are_not_here(tiny: Imported) -> None:
    shard = tiny.shard(1, 3)
    for first, last in ((0, 2), (2, 4), (3, 2)):
        with pytest.raises(RuleError, match=r"where this shard holds 1\.\.3"):
            shard.open(b"s", 8, first, last)


def test_a_batch_keeps_to_one_range(tiny: Imported) -> None:
    shard = tiny.shard(0, 5)
    whole, part = shard.open(b"a", 8), shard.open(b"b", 8, 0, 2)
    with pytest.raises(RuleError, match="same units"):
        shard.step([Work(whole, 0, tokens=(1,)), Work(part, 0, tokens=(1,))])
    whole.close()
    part.close()
