"""Weights in eight bits on CUDA: what they take, and that they compute what the CPU does."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch

from blyan_node.inference.generation import Sampling
from blyan_node.model import checkpoint_spec
from blyan_node.model.importing import open_checkpoint
from blyan_node.model.shard import Shard, Token, Work
from blyan_node.model.spec import ModelSpec
from tests.support.models import import_units, tiny_checkpoint
from tests.unit.model.test_spec import QWEN3_8B

pytestmark = pytest.mark.gpu

GREEDY = Sampling(temperature=0)


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_eight_bit_logits_on_the_gpu_equal_those_on_the_cpu(
    tmp_path: Path, gpu_device: str, family: str, dtype: str
) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint(tmp_path, family=family))
    blobs = import_units(checkpoint, tmp_path / "units")
    logits = []
    for device in ("cpu", gpu_device):
        shard = Shard.load(checkpoint.spec, 0, 5, blobs, dtype=dtype, device=device, cache_tokens=4096)
        cache = shard.open(b"s", 128)
        rows = [shard.logits([Work(cache, 0, tuple(range(5, 69)))])[0]]
        rows += [shard.logits([Work(cache, cache.length, (token,))])[0] for token in (7, 8, 9)]
        logits.append(torch.cat(rows).float().cpu())
    # Both compute in bfloat16, in which two orders of adding differ by this much.
    assert (logits[0] - logits[1]).norm() / logits[0].norm() < 0.03


def test_many_sessions_on_the_gpu_get_what_each_gets_alone(tmp_path: Path, gpu_device: str) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint(tmp_path))
    blobs = import_units(checkpoint, tmp_path / "units")
    shard = Shard.load(checkpoint.spec, 0, 5, blobs, device=gpu_device, cache_tokens=2048)
    prompts = [tuple(range(at, at + size)) for at, size in ((3, 1), (40, 33), (7, 64), (200, 100))]
    alone = []
    for prompt in prompts:
        cache = shard.open(b"alone", 128)
        alone.append(shard.logits([Work(cache, 0, prompt)])[0])
        cache.close()
    caches = [shard.open(bytes([index]), 128) for index in range(4)]
    together = shard.logits([Work(cache, 0, prompt) for cache, prompt in zip(caches, prompts, strict=True)])
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=0)


def test_qwen3_8b_in_fp8_is_loaded_below_8_gib_and_runs_below_12(tmp_path: Path, gpu_device: str) -> None:
    spec = checkpoint_spec.from_hf_config(QWEN3_8B)
    blobs = _random_units(spec, tmp_path)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(gpu_device)
    torch.cuda.reset_peak_memory_stats(gpu_device)
    last = len(spec.units) - 1
    shard = Shard.load(spec, 0, last, blobs, dtype="fp8", device=gpu_device, cache_tokens=4096)
    cache_bytes = 4096 * spec.layers * spec.kv_bytes("bfloat16")
    loaded = torch.cuda.memory_allocated(gpu_device) - before - cache_bytes
    assert loaded < 8 << 30
    assert loaded == pytest.approx(sum(spec.unit_bytes(unit, "fp8") for unit in spec.units), rel=0.01)
    cache = shard.open(b"s", 4096)
    shard.step([Work(cache, 0, tuple(range(128)))])
    (token,) = shard.step([Work(cache, 128, (5,), sampling=GREEDY)])
    assert isinstance(token, Token)
    assert torch.cuda.max_memory_allocated(gpu_device) - before < 12 << 30


def _random_units(spec: ModelSpec, directory: Path) -> dict[str, Path]:
    """Blobs of random bfloat16 weights; all layers share one file."""
    paths = {}
    for unit in ("embed", "layer.0", "head"):
        tensors = {
            name: (torch.randn(shape) * (shape[-1] ** -0.5 if len(shape) == 2 else 1)).bfloat16()
            for name, shape in spec.unit_tensors(unit).items()
        }
        paths[unit] = directory / unit
        safetensors.torch.save_file(tensors, paths[unit])
    return {unit: paths["layer.0" if unit.startswith("layer.") else unit] for unit in spec.units}
