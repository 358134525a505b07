from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

from blyan_node.errors import CheckpointError
from blyan_node.model import checkpoint_spec
from blyan_node.model.importing import read_units
from blyan_node.model.layers import rotary_frequencies
from blyan_node.model.precision import Precision
from blyan_node.model.spec import ModelSpec, RopeScaling
from blyan_node.model.weights import bring
from tests.support.models import tiny_config
from tests.unit.model.conftest import Imported

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}


def spec(**changes: Any) -> ModelSpec:
    return checkpoint_spec.from_hf_config(tiny_config(**changes))


@pytest.mark.parametrize("scaling", [None, {"type": "linear", "factor": 2.0}, LLAMA3])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_json_brings_the_spec_back(family: str, scaling: dict[str, Any] | None) -> None:
    original = spec(family=family, rope_scaling=scaling)
    assert ModelSpec.from_json(original.to_json()) == original


def test_old_and_new_rotary_parameters_mean_the_same() -> None:
    new = tiny_config(rope_parameters=LLAMA3 | {"rope_theta": 5e5})
    del new["rope_theta"]
    assert checkpoint_spec.from_hf_config(new) == spec(rope_theta=5e5, rope_scaling=LLAMA3)


def changed(**changes: Any) -> bytes:
    return json.dumps(json.loads(spec().to_json()) | changes, sort_keys=True, separators=(",", ":")).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[]",
        b"[" * 8000,
        b"x" * 9000,
        spec().to_json() + b" ",
        b" " + spec().to_json(),
        changed(extra=1),
        changed(layers=0),
        changed(layers=1 << 40),
        changed(layers=4.0),
        changed(layers=True),
        changed(layers="4"),
        changed(family="mamba"),
        changed(family=["llama"]),
        changed(head_dim=33),
        changed(kv_heads=3),
        changed(norm_eps=0.0),
        changed(norm_eps=1),
        changed(rope_theta=float("nan")),
        changed(rope_theta=-1.0),
        changed(tied_head=None),
        changed(rope_scaling=[]),
        changed(rope_scaling={"kind": "yarn"}),
        changed(rope_scaling=dataclasses.asdict(RopeScaling("yarn", 2.0))),
        changed(rope_scaling=dataclasses.asdict(RopeScaling("linear", 0.0))),
        changed(rope_scaling=dataclasses.asdict(RopeScaling("llama3", 8.0, 4.0, 1.0, 512))),
    ],
)
def test_a_peers_spec_that_makes_no_sense_is_refused(data: bytes) -> None:
    with pytest.raises(CheckpointError):
        ModelSpec.from_json(data)


def test_units_cover_the_model_and_a_tied_head_needs_the_embedding() -> None:
    tied, untied = spec(), spec(tie_word_embeddings=False)
    assert tied.units == ("embed", "layer.0", "layer.1", "layer.2", "layer.3", "head")
    assert tied.blobs_for("head") == ("head", "embed")
    assert untied.blobs_for("head") == ("head",)
    assert untied.blobs_for("layer.3") == ("layer.3",)
    with pytest.raises(CheckpointError, match="no unit"):
        tied.unit_tensors("layer.4")


def test_memory_is_counted() -> None:
    model = spec()
    assert model.unit_bytes("embed", "float32") == 1000 * 256 * 4
    assert model.unit_bytes("head", "bfloat16") == 256 * 2
    layer = 2 * 256 + 2 * 256 * 256 + 2 * 64 * 256 + 3 * 512 * 256
    assert model.unit_bytes("layer.0", "bfloat16") == 2 * layer
    assert model.kv_bytes("float32") == 2 * 64 * 4


def test_llama3_scaling_keeps_fast_waves_and_stretches_slow_ones() -> None:
    plain, scaled = rotary_frequencies(spec()), rotary_frequencies(spec(rope_scaling=LLAMA3))
    assert torch.equal(plain[0], scaled[0])
    assert torch.equal(plain[-1] / 8, scaled[-1])
    assert ((plain / 8 <= scaled) & (scaled <= plain)).all()


QWEN3_8B = {
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 12_288,
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
}


def test_qwen3_8b_in_fp8_takes_less_than_8_gib_with_every_matrix_quantised() -> None:
    model = checkpoint_spec.from_hf_config(QWEN3_8B)

    def loaded(dtype: str, *, ends: str | None = None) -> int:
        return sum(
            model.unit_bytes(unit, (ends or dtype) if unit in ("embed", "head") else dtype) for unit in model.units
        )

    assert loaded("bfloat16") == 2 * 8_190_735_360  # the parameters that its makers state: 8.2 B
    layer = 192_937_984 + 4 * (4096 + 2 * 1024 + 2 * 4096 + 2 * 12_288) + 2 * (2 * 4096 + 2 * 128)
    assert model.unit_bytes("layer.7", "fp8") == model.unit_bytes("layer.7", "int8") == layer
    assert model.unit_bytes("embed", "fp8") == 151_936 * (4096 + 4)
    assert model.unit_bytes("head", "fp8") == 151_936 * (4096 + 4) + 2 * 4096
    assert loaded("fp8") / 2**30 == pytest.approx(7.635, abs=0.001)
    assert loaded("fp8", ends="bfloat16") / 2**30 > 8.7  # with embedding and head left as they are it would not fit
    cache = 4096 * model.layers * model.kv_bytes("bfloat16")
    assert (loaded("fp8") + cache) / 2**30 < 8.3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "fp8"])
def test_the_budget_is_what_a_loaded_unit_takes(tiny: Imported, dtype: str) -> None:
    how = Precision(dtype, "float32" if dtype == "float32" else "bfloat16", dtype)
    for unit in ("embed", "layer.0", "head"):
        weights = bring(read_units(tiny.spec, [unit], tiny.blobs)[unit], how, "cpu")
        assert weights.nbytes == tiny.spec.unit_bytes(unit, how.resident, how.compute)
