"""One matrix product with weights that never change."""

from __future__ import annotations

import torch
import torch.nn.functional as fn


class Linear:
    """``x @ weight.T + bias`` for x [tokens, in] and weight [out, in]."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._weight = weight
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply."""
        return fn.linear(x, self._weight, self._bias)
