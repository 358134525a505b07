"""Matrix products with weights that never change.

On a CPU the weights are packed once into the blocked layout that oneDNN multiplies fastest with: measured, decoding a
135M model went 1.7 times as fast in fp32 as with plain products. Packing makes a private copy; the mapped file is then
no longer touched and its pages are the system's to take back.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as fn


class Linear:
    """``x @ weight.T + bias`` for x [tokens, in] and weight [out, in].

    Several weights over the same input are stacked into one product; :meth:`split` gives their outputs apart.
    """

    def __init__(self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor] = ()) -> None:
        self._sizes = [weight.shape[0] for weight in weights]
        self._bias = torch.cat(list(biases)) if biases else None
        self._weight = torch.cat(list(weights)) if len(weights) > 1 else weights[0]
        self._packed = _can_pack(self._weight)
        if self._packed:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(self._weight)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply: [tokens, in] to [tokens, sum of out]."""
        if self._packed:
            product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
            return product
        return fn.linear(x, self._weight, self._bias)

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Multiply: one [tokens, out] for each of the stacked weights."""
        return torch.split(self(x), self._sizes, dim=-1)


def _can_pack(weight: torch.Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    supported: bool = weight.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return supported
