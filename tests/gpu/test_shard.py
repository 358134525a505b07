"""The shard on CUDA computes what it computes on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from blyan_node.inference.generation import Sampling
from blyan_node.model.device import memory_for_layers, pick_device
from blyan_node.model.importing import open_checkpoint
from blyan_node.model.shard import Shard, Token, Work
from tests.support.models import import_units, tiny_checkpoint

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_logits_on_the_gpu_equal_those_on_the_cpu(tmp_path: Path, gpu_device: str, family: str) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint(tmp_path, family=family))
    blobs = import_units(checkpoint, tmp_path / "units")
    last = len(checkpoint.spec.units) - 1
    prompt = tuple(range(5, 37))
    logits = []
    for device in ("cpu", gpu_device):
        shard = Shard.load(checkpoint.spec, 0, last, blobs, device=device)
        (rows,) = shard.logits([Work(shard.open(b"s", 64), 0, tokens=prompt)])
        logits.append(rows.float().cpu())
    assert torch.allclose(*logits, atol=1e-3, rtol=0)


def test_two_shards_on_the_gpu_pass_activations_through_bytes(tmp_path: Path, gpu_device: str) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint(tmp_path))
    blobs = import_units(checkpoint, tmp_path / "units")
    front = Shard.load(checkpoint.spec, 0, 2, blobs, dtype="bfloat16", device=gpu_device)
    back = Shard.load(checkpoint.spec, 3, 5, blobs, dtype="bfloat16", device=gpu_device)
    (activation,) = front.step([Work(front.open(b"s", 16), 0, tokens=(1, 2, 3))])
    assert activation.dtype == "bfloat16"
    (token,) = back.step([Work(back.open(b"s", 16), 0, activation=activation, sampling=Sampling(temperature=0))])
    assert isinstance(token, Token)


def test_auto_picks_the_gpu_and_its_memory(gpu_device: str) -> None:
    assert pick_device("auto", "auto") == ("cuda", "bfloat16")
    assert 0 < memory_for_layers(gpu_device) < torch.cuda.get_device_properties(gpu_device).total_memory
