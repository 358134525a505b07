"""Activations as they travel between stages: raw little-endian numbers, and the check of what a peer sent."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from blyan_node.errors import RuleError
from blyan_node.model.spec import ITEM_BYTES, ModelSpec

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Activation:
    """The hidden states of consecutive tokens of one session.

    ``dtype`` is "float32" or "bfloat16", ``shape`` (tokens, hidden), ``data`` the rows in order, little-endian.
    """

    dtype: str
    shape: tuple[int, int]
    data: bytes

    def check(self, spec: ModelSpec, dtype: str, tokens: int) -> None:
        """Raise RuleError unless this is ``tokens`` rows of finite ``dtype`` numbers for this model."""
        if self.dtype != dtype:
            raise RuleError(f"activation of dtype {self.dtype!r:.20}, where the session has {dtype}")
        if self.shape != (tokens, spec.hidden_size):
            raise RuleError(f"activation of shape {self.shape}, where ({tokens}, {spec.hidden_size}) belongs")
        if len(self.data) != tokens * spec.hidden_size * ITEM_BYTES[dtype]:
            raise RuleError(f"activation of {len(self.data)} bytes, which is not what its shape {self.shape} takes")
        if dtype == "float32":
            finite = np.isfinite(np.frombuffer(self.data, "<f4")).all()
        else:  # bfloat16, unknown to numpy: infinities and NaN have all exponent bits set
            finite = ((np.frombuffer(self.data, "<u2") & 0x7F80) != 0x7F80).all()
        if not finite:
            raise RuleError("activation with an infinity or NaN in it")

    def rows(self, start: int, end: int) -> Activation:
        """Rows ``start`` to ``end`` - 1, where 0 <= start < end <= the tokens that there are."""
        count, hidden = self.shape
        if (start, end) == (0, count):
            return self
        width = len(self.data) // count
        return Activation(self.dtype, (end - start, hidden), self.data[start * width : end * width])


def from_tensor(rows: torch.Tensor) -> Activation:
    """Copy rows [tokens, hidden] of float32 or bfloat16 into bytes."""
    tokens, hidden = rows.shape
    dtype = "float32" if rows.dtype == torch.float32 else "bfloat16"
    raw = rows.to("cpu").contiguous().view(torch.uint8).numpy()
    return Activation(dtype, (tokens, hidden), raw.tobytes())


def copy_into(rows: torch.Tensor, activation: Activation) -> None:
    """Fill ``rows`` [tokens, hidden], of any float dtype and on any device, from a checked activation."""
    received = torch.frombuffer(bytearray(activation.data), dtype=DTYPES[activation.dtype])
    rows.copy_(received.view(activation.shape))
