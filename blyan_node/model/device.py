"""Where layers run, in what they compute, and how much memory there is for them."""

from __future__ import annotations

import os

import torch

from blyan_node.errors import ConfigError
from blyan_node.model.precision import SETTINGS, fast_dtype

SHARE = 0.7  # of the memory that is there, where the operator sets no limit


def pick_device(device: str, dtype: str) -> tuple[str, str]:
    """Resolve ``auto``: CUDA where there is one, else the CPU; the dtype that is fast there.

    Raises ConfigError where the device that was named is not here.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device {device} was asked for, but torch {torch.__version__} sees no CUDA here; use cpu")
    if dtype == "auto":
        dtype = fast_dtype(device)
    if dtype not in SETTINGS:
        raise ConfigError(f"dtype {dtype} is not supported; allowed: {', '.join(SETTINGS)}")
    return device, dtype


def memory_for_layers(device: str) -> int:
    """Bytes that layers and caches may take together on a device, where the operator says nothing."""
    if device.startswith("cuda"):
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * SHARE)
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") * SHARE)
