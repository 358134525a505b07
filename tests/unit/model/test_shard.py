from __future__ import annotations

import dataclasses
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blyan_node.errors import CheckpointError, ConfigError, RequestError, RuleError
from blyan_node.inference.generation import Sampling
from blyan_node.model.activation import Activation
from blyan_node.model.shard import Shard, Token, Work
from tests.unit.model.conftest import Imported
from tests.unit.model.walk import GREEDY, Pipeline

PROMPT = tuple(range(40, 61))


@pytest.fixture(scope="module")
def whole(tiny: Imported) -> Shard:
    return tiny.shard()


@pytest.fixture(scope="module")
def tail(tiny: Imported) -> Shard:
    """A shard that takes activations."""
    return tiny.shard(3)


@settings(max_examples=12, deadline=None)
@given(cuts=st.sets(st.integers(1, 5), max_size=5), dtype=st.sampled_from(["float32", "bfloat16"]))
def test_sharded_at_any_cut_equals_unsharded_bit_for_bit(tiny: Imported, cuts: set[int], dtype: str) -> None:
    starts = [0, *sorted(cuts)]
    shards = [
        tiny.shard(first, following - 1, dtype=dtype)
        for first, following in zip(starts, [*starts[1:], len(tiny.spec.units)], strict=True)
    ]
    one, many = Pipeline([tiny.shard(dtype=dtype)]), Pipeline(shards)
    assert torch.equal(one.logits(PROMPT), many.logits(PROMPT))
    for token in (7, 8, 9):
        assert torch.equal(one.logits([token]), many.logits([token]))


def test_a_prompt_in_chunks_gives_the_logits_of_the_whole(whole: Shard) -> None:
    at_once = Pipeline([whole]).logits(PROMPT)
    chunked = Pipeline([whole])
    parts = [chunked.logits(PROMPT[a:b]) for a, b in ((0, 1), (1, 9), (9, 10), (10, 21))]
    torch.testing.assert_close(torch.cat(parts), at_once, atol=1e-4, rtol=1e-4)


def test_a_batch_of_sessions_gives_what_each_gives_alone(whole: Shard) -> None:
    prompts = [PROMPT, PROMPT[:1], PROMPT[3:9], PROMPT[5:6]]
    alone = [Pipeline([whole]).logits(prompt) for prompt in prompts]
    caches = [whole.open(bytes([index]), 64) for index in range(4)]
    together = whole.logits([Work(cache, 0, prompt) for cache, prompt in zip(caches, prompts, strict=True)])
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    # Then decode and prefill in one ragged batch, at different positions.
    mixed = whole.logits([Work(caches[1], 1, PROMPT[1:5]), Work(caches[0], 21, (7,))])
    torch.testing.assert_close(mixed[0], Pipeline([whole]).logits(PROMPT[:5])[1:], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(mixed[1], Pipeline([whole]).logits((*PROMPT, 7))[-1:], atol=1e-4, rtol=1e-4)
    for cache in caches:
        cache.close()


def test_truncating_and_going_on_equals_a_straight_run(whole: Shard) -> None:
    straight, resumed = Pipeline([whole]), Pipeline([whole])
    straight.logits(PROMPT)
    resumed.logits(PROMPT)
    resumed.logits([1])
    resumed.logits([2])
    resumed.truncate(len(PROMPT))
    assert torch.equal(straight.logits([9]), resumed.logits([9]))


def test_a_seed_draws_the_same_tokens_again_and_another_seed_others(whole: Shard) -> None:
    drawn = [
        Pipeline([whole]).generate(PROMPT, 12, Sampling(temperature=1.0, top_p=0.9, seed=seed)) for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_draw_depends_on_the_position_not_on_how_it_was_reached(whole: Shard) -> None:
    how = Sampling(temperature=1.0, seed=5)
    drawn = Pipeline([whole]).generate(PROMPT, 8, how)
    replay = Pipeline([whole])
    assert replay.next([*PROMPT, *drawn[:4]], how) == drawn[4]


def test_without_sampling_a_head_keeps_quiet(whole: Shard) -> None:
    cache = whole.open(b"quiet", 64)
    assert whole.step([Work(cache, 0, PROMPT)]) == [None]
    assert cache.length == len(PROMPT)
    cache.close()


def test_a_head_alone_needs_the_last_row_only(tiny: Imported, whole: Shard) -> None:
    body, head = tiny.shard(0, 4), tiny.shard(5)
    caches = body.open(b"s", 64), head.open(b"s", 64)
    (row,) = body.step([Work(caches[0], 0, PROMPT, last_only=True)])
    assert isinstance(row, Activation)
    assert row.shape == (1, 256)
    (token,) = head.step([Work(caches[1], len(PROMPT) - 1, activation=row, sampling=GREEDY)])
    assert token == Token(Pipeline([whole]).next(PROMPT))


def test_a_session_is_open_once_and_within_the_context(tiny: Imported) -> None:
    shard = tiny.shard(1, 1)
    shard.open(b"a", 8).close()
    shard.open(b"a", 8)
    with pytest.raises(RuleError, match="open already"):
        shard.open(b"a", 8)
    with pytest.raises(RuleError, match="context is 2048"):
        shard.open(b"b", 2049)


def row(tokens: int, dtype: str = "float32", width: int = 256) -> Activation:
    return Activation(dtype, (tokens, width), bytes(tokens * width * (4 if dtype == "float32" else 2)))


@pytest.mark.parametrize(
    ("work", "complaint"),
    [
        ({"position": 4, "tokens": (1,)}, "holds 3 tokens"),
        ({"position": 2, "tokens": (1,)}, "holds 3 tokens"),
        ({"position": 3, "tokens": tuple(range(6))}, "capacity of 8"),
        ({"position": 3, "tokens": ()}, "no tokens"),
        ({"position": 3, "tokens": (1000,)}, "vocabulary"),
        ({"position": 3, "tokens": (-1,)}, "vocabulary"),
        ({"position": 3}, "tokens belong"),
        ({"position": 3, "activation": row(1)}, "tokens belong"),
        ({"position": 3, "tokens": (1,), "activation": row(1)}, "tokens belong"),
    ],
)
def test_wrong_work_is_named_and_changes_nothing(whole: Shard, work: dict[str, object], complaint: str) -> None:
    cache, other = whole.open(b"wrong", 8), whole.open(b"right", 8)
    whole.logits([Work(cache, 0, (1, 2, 3))])
    before = Pipeline([whole]).logits((1, 2, 3, 4))[-1]
    try:
        with pytest.raises(RuleError, match=complaint):
            whole.step([Work(other, 0, (5,)), Work(cache, **work)])  # type: ignore[arg-type]
        assert (cache.length, other.length) == (3, 0)
        torch.testing.assert_close(whole.logits([Work(cache, 3, (4,))])[0][0], before, atol=1e-4, rtol=1e-4)
    finally:
        cache.close()
        other.close()


def test_wrong_sampling_is_the_callers_fault(whole: Shard) -> None:
    cache = whole.open(b"sampling", 8)
    for sampling in (Sampling(temperature=-1.0), Sampling(top_p=0.0), Sampling(temperature=float("nan"))):
        with pytest.raises(RequestError):
            whole.step([Work(cache, 0, (1,), sampling=sampling)])
    cache.close()


def test_a_closed_session_and_two_works_of_one_session_are_refused(whole: Shard) -> None:
    cache = whole.open(b"twice", 8)
    with pytest.raises(RuleError, match="at most one per session"):
        whole.step([Work(cache, 0, (1,)), Work(cache, 1, (1,))])
    cache.close()
    with pytest.raises(RuleError, match="closed"):
        whole.step([Work(cache, 0, (1,))])


def test_truncation_cannot_reach_forward(whole: Shard) -> None:
    cache = whole.open(b"forward", 8)
    for position in (1, -1):
        with pytest.raises(RuleError, match="truncate"):
            whole.truncate(cache, position)
    cache.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_are_checked(tiny: Imported, dtype: str) -> None:
    good = row(2, dtype)
    good.check(tiny.spec, dtype, 2)
    infinity = struct.pack("<f", float("inf")) if dtype == "float32" else b"\x80\xff"
    nan = struct.pack("<f", float("nan")) if dtype == "float32" else b"\xc1\x7f"
    for bad in (
        row(3, dtype),
        row(2, dtype, 255),
        row(2, "bfloat16" if dtype == "float32" else "float32"),
        dataclasses.replace(good, data=good.data[:-1]),
        dataclasses.replace(good, data=good.data + b"\0"),
        dataclasses.replace(good, data=infinity + good.data[len(infinity) :]),
        dataclasses.replace(good, data=good.data[: -len(nan)] + nan),
        dataclasses.replace(good, dtype="float64"),
    ):
        with pytest.raises(RuleError):
            bad.check(tiny.spec, dtype, 2)


def test_activations_of_another_width_are_refused_by_the_step(tail: Shard) -> None:
    cache = tail.open(b"width", 8)
    with pytest.raises(RuleError, match="width 255"):
        tail.step([Work(cache, 0, activation=row(1, width=255))])
    cache.close()


def test_an_impossible_range_or_dtype_is_refused(tiny: Imported) -> None:
    with pytest.raises(ConfigError, match="float64"):
        tiny.shard(dtype="float64")
    with pytest.raises(ConfigError, match="no range"):
        tiny.shard(3, 9)


def spoil(tiny: Imported, tmp_path: Path, unit: str, **changes: torch.Tensor | None) -> dict[str, Path]:
    tensors = safetensors.torch.load_file(tiny.blobs[unit])
    for name, tensor in changes.items():
        full = next(known for known in tensors if name in known)
        if tensor is None:
            del tensors[full]
        else:
            tensors[full] = tensor
    path = tmp_path / "spoilt.safetensors"
    safetensors.torch.save_file(tensors, path)
    return tiny.blobs | {unit: path}


@pytest.mark.parametrize(
    ("tensor", "complaint"),
    [
        (None, "lacks"),
        (torch.zeros(255), "shape"),
        (torch.zeros(256, dtype=torch.int32), "dtype"),
        (torch.full((256,), float("nan")), "NaN"),
    ],
)
def test_a_blob_that_does_not_fit_the_spec_is_refused(
    tiny: Imported, tmp_path: Path, tensor: torch.Tensor | None, complaint: str
) -> None:
    blobs = spoil(tiny, tmp_path, "layer.1", input_layernorm=tensor)
    with pytest.raises(CheckpointError, match=complaint):
        Shard.load(tiny.spec, 1, 3, blobs)


@pytest.mark.parametrize(
    "content", [b"", b"x" * 100, (1 << 60).to_bytes(8, "little") + b"{}", b"\2" + bytes(7) + b"{}"]
)
def test_a_blob_that_is_no_safetensors_is_refused(tiny: Imported, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "blob"
    path.write_bytes(content)
    with pytest.raises(CheckpointError):
        Shard.load(tiny.spec, 1, 1, tiny.blobs | {"layer.0": path})
