"""Hashes of weights as they lie in memory, taken once after loading, so that later tampering is found."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Protocol

import torch

from blyan_node.errors import IntegrityError

_PLAIN = (int, float, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


class Sealed(Protocol):
    """Something loaded whose weights were hashed."""

    def verify(self) -> None:
        """Raise IntegrityError where a weight has changed."""
        ...


def verify_layer_integrity(layer: Sealed) -> None:
    """Hash a loaded shard again; raise IntegrityError, naming the unit, where a weight is not what was loaded."""
    layer.verify()


def resident_digest(part: object) -> bytes:
    """SHA-256 over every tensor that a part computes with, its type and shape, in the order of attribute names."""
    digest = hashlib.sha256()
    for tensor in _tensors(part):
        # oneDNN's blocked layout has no bytes of its own to read; unpacking gives back each weight as it was packed.
        plain = (tensor.to_dense() if tensor.is_mkldnn else tensor).detach().to("cpu").contiguous()
        digest.update(f"{plain.dtype} {tuple(plain.shape)}".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def check_resident(unit: str, part: object, expected: bytes) -> None:
    """Raise IntegrityError unless a part still has the digest that it had."""
    if resident_digest(part) != expected:
        raise IntegrityError(f"the weights of {unit} changed in memory after they were loaded: it must not be served")


def _tensors(part: object) -> Iterator[torch.Tensor]:
    if isinstance(part, torch.Tensor):
        yield part
    elif isinstance(part, list | tuple):
        for item in part:
            yield from _tensors(item)
    elif hasattr(part, "__dict__"):
        for name in sorted(vars(part)):
            yield from _tensors(vars(part)[name])
    elif not isinstance(part, _PLAIN):
        raise TypeError(f"{type(part).__name__} holds weights that cannot be read")  # better than to skip them
