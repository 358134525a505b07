"""In what a shard keeps its weights and in what it computes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

SETTINGS = ("float32", "bfloat16", "int8", "fp8")


@dataclass(frozen=True)
class Precision:
    """What a dtype setting comes to on one device.

    ``dtype`` is the setting. ``compute`` ("float32" or "bfloat16") is what norms, biases, caches and activations are
    in, ``resident`` what the matrices are kept as: the same, "int8" or "fp8".
    """

    dtype: str
    compute: str
    resident: str


def fast_dtype(device: str) -> str:
    """The fastest dtype that is computed in as it is: bfloat16 where the device has instructions for it."""
    return "bfloat16" if not device.startswith("cpu") or _has_bf16() else "float32"


def _has_bf16() -> bool:
    """Tell whether the processor multiplies in bfloat16, and does not only widen it."""
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # an older torch cannot tell
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def precision_of(dtype: str, device: str) -> Precision:
    """What one of SETTINGS comes to on a device.

    On a CPU fp8 weights are expanded when they are loaded, since widening e4m3 takes longer there than the product.
    """
    if dtype not in ("int8", "fp8"):
        return Precision(dtype, dtype, dtype)
    compute = fast_dtype(device)
    return Precision(dtype, compute, compute if dtype == "fp8" and device.startswith("cpu") else dtype)
