"""Beacons: the same from everybody who computes the same, whatever the layout; another from whoever does not."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import struct

import pytest
import torch

from blyan_node.chain.records import MAX_BEACON
from blyan_node.errors import IntegrityError
from blyan_node.model import linear
from blyan_node.model.beacon import MOST, TOLERANCE, beacon_of, check_beacon, difference, probe
from blyan_node.model.importing import read_safetensors
from blyan_node.model.shard import Shard
from blyan_node.model.spec import ModelSpec
from tests.unit.model.conftest import Imported

SEEDS = [f"seed {number}".encode() for number in range(40)]
ROOT = bytes(32)


def tensors_of(model: Imported) -> dict[str, dict[str, torch.Tensor]]:
    return {
        unit: read_safetensors(model.blobs[unit], tuple(model.spec.unit_tensors(unit))) for unit in model.spec.units
    }


def beacon(model: Imported, unit: str) -> bytes:
    tensors = tensors_of(model)
    return beacon_of(model.spec, unit, {name: tensors[name] for name in model.spec.blobs_for(unit)}, ROOT)


def furthest(reference: Shard, other: Shard, first: int, last: int) -> float:
    return max(difference(probe(reference, first, last, seed), probe(other, first, last, seed)) for seed in SEEDS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "fp8"])
def test_every_unit_of_a_sound_model_passes(tiny: Imported, dtype: str) -> None:
    shard = tiny.shard(dtype=dtype)
    for unit in tiny.spec.units:
        check_beacon(shard, unit, ROOT, beacon(tiny, unit))


def test_a_unit_that_computes_something_else_fails(tiny: Imported) -> None:
    others = {unit: own | {} for unit, own in tensors_of(tiny).items()}
    others["layer.2"]["mlp.down_proj.weight"] = others["layer.2"]["mlp.down_proj.weight"] * 1.01
    shard = Shard(tiny.spec, 0, 5, others, cache_tokens=64)
    check_beacon(shard, "layer.1", ROOT, beacon(tiny, "layer.1"))
    with pytest.raises(IntegrityError, match=r"layer\.2"):
        check_beacon(shard, "layer.2", ROOT, beacon(tiny, "layer.2"))


def test_a_wrong_rotation_fails(tiny: Imported) -> None:
    spec = dataclasses.replace(tiny.spec, rope_theta=tiny.spec.rope_theta * 2)
    shard = Shard(spec, 0, 5, tensors_of(tiny), cache_tokens=64)
    with pytest.raises(IntegrityError):
        check_beacon(shard, "layer.0", ROOT, beacon(tiny, "layer.0"))


def test_an_output_that_is_not_finite_fails(tiny: Imported) -> None:
    others = tensors_of(tiny)
    others["layer.1"]["mlp.up_proj.weight"] = torch.full_like(others["layer.1"]["mlp.up_proj.weight"], math.inf)
    with pytest.raises(IntegrityError, match="NaN"):
        check_beacon(Shard(tiny.spec, 0, 5, others, cache_tokens=64), "layer.1", ROOT, beacon(tiny, "layer.1"))


@pytest.mark.parametrize("malformed", [b"x", bytes(31), bytes(64), bytes(MOST + 32), b"\xff" * MOST, b"\x7f" * MOST])
def test_a_malformed_beacon_fails(tiny: Imported, malformed: bytes) -> None:
    with pytest.raises(IntegrityError):
        check_beacon(tiny.shard(1, 1), "layer.0", ROOT, malformed)


def test_the_chain_has_room_for_a_beacon(tiny: Imported) -> None:
    assert len(beacon(tiny, "head")) == MOST == MAX_BEACON


def test_the_layout_of_weights_changes_nothing_that_counts(tiny: Imported, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = tiny.shard()
    monkeypatch.setattr(linear, "_can_pack", lambda _weight: False)
    assert furthest(packed, tiny.shard(), 0, 5) < TOLERANCE["float32"] / 20


@pytest.mark.parametrize("span", [(0, 0), (1, 4), (5, 5), (0, 5)])
def test_rounding_weights_stays_within_its_tolerance(tiny: Imported, span: tuple[int, int]) -> None:
    reference = tiny.shard()
    others = {dtype: tiny.shard(dtype=dtype) for dtype in ("bfloat16", "int8", "fp8")}
    apart = {name: furthest(reference, other, *span) for name, other in others.items()}
    for name, most in apart.items():
        assert TOLERANCE["float32"] < most < TOLERANCE[name], "rounding shows, and is forgiven"


def test_the_difference_estimates_the_relative_error() -> None:
    """Random directions: of 400 pairs that are 1 % apart, none looks like less than 0.5 % or more than 2 %."""
    from blyan_node.model.beacon import _summary

    source = torch.Generator().manual_seed(1)
    found = []
    for number in range(400):
        rows = torch.randn((8, 256), generator=source)
        other = rows + 0.01 * torch.randn((8, 256), generator=source)
        found.append(difference(_summary(rows, str(number).encode()), _summary(other, str(number).encode())))
    assert 0.005 < min(found) <= max(found) < 0.02
    # what six of eight do not exceed, where each row's error is seen along three directions, is a little above
    assert sum(found) / 400 == pytest.approx(0.011, rel=0.05)


def test_zeroed_rows_are_far_from_any_and_alike() -> None:
    from blyan_node.model.beacon import _summary

    nothing, something = _summary(torch.zeros(8, 64), b""), _summary(torch.ones(8, 64), b"")
    assert difference(nothing, nothing) == 0
    assert difference(something, nothing) >= 1
    assert difference(nothing, something) == math.inf


def test_pinned_inputs(tiny: Imported) -> None:
    """What every platform has to draw; docs/protocol.md says how."""
    from blyan_node.model.beacon import _activation, _summary, _tokens

    def drawn(purpose: bytes, size: int) -> bytes:
        return hashlib.shake_256(b"blyan/beacon/1|" + purpose + b"|" + ROOT).digest(size)

    assert _tokens(ROOT, 2, 1000) == tuple(word % 1000 for word in struct.unpack("<2I", drawn(b"tokens", 8)))
    values = struct.unpack("<4f", _activation(ROOT, 2, 2, "float32").data)
    assert values == tuple((byte - 128) / 1024 for byte in drawn(b"input", 4))
    signs = [1 if drawn(b"directions", 3)[which] & 0x80 else -1 for which in range(3)]
    assert _summary(torch.tensor([[2.0]]), ROOT) == struct.pack("<4q", 2_000_000, *(sign * 10**6 for sign in signs))


def test_a_model_of_a_short_context_has_a_beacon_of_fewer_rows(tiny: Imported) -> None:
    short: ModelSpec = dataclasses.replace(tiny.spec, context_length=4)
    assert len(beacon_of(short, "layer.0", {"layer.0": tensors_of(tiny)["layer.0"]}, ROOT)) == MOST // 2
