"""Which device and dtype are taken, and what is said where they cannot be."""

from __future__ import annotations

import pytest
import torch

from blyan_node.errors import ConfigError
from blyan_node.model import precision
from blyan_node.model.device import memory_for_layers, pick_device
from blyan_node.model.precision import Precision, precision_of

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")


@needs_no_gpu
@pytest.mark.parametrize(("has_bf16", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_auto_falls_back_to_the_cpu_and_what_it_is_fast_in(
    monkeypatch: pytest.MonkeyPatch, has_bf16: bool, dtype: str
) -> None:
    monkeypatch.setattr(precision, "_has_bf16", lambda: has_bf16)
    assert pick_device("auto", "auto") == ("cpu", dtype)
    assert precision_of("int8", "cpu") == Precision("int8", dtype, "int8")
    assert precision_of("fp8", "cpu") == Precision("fp8", dtype, dtype)
    assert precision_of("fp8", "cuda:1") == Precision("fp8", "bfloat16", "fp8")
    assert pick_device("cpu", "bfloat16") == ("cpu", "bfloat16")


@needs_no_gpu
def test_a_gpu_that_is_not_here_is_named() -> None:
    with pytest.raises(ConfigError, match="use cpu"):
        pick_device("cuda:1", "auto")


def test_a_dtype_that_cannot_be_computed_in_is_named() -> None:
    with pytest.raises(ConfigError, match="allowed: float32, bfloat16, int8, fp8"):
        pick_device("cpu", "float64")


def test_a_share_of_the_memory_is_for_layers() -> None:
    assert 100 * 2**20 < memory_for_layers("cpu") < 2**42
