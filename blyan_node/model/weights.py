"""The weights of one unit in memory, in the precision asked for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from blyan_node.model.activation import DTYPES
from blyan_node.model.linear import Weight
from blyan_node.model.precision import Precision
from blyan_node.model.quantize import quantize_to_fp8, quantize_to_int8

_QUANTIZE = {"int8": quantize_to_int8, "fp8": quantize_to_fp8}


@dataclass(frozen=True)
class UnitWeights:
    """Matrices [out, in], quantised or not, and vectors (norms and biases), by their names in the unit."""

    matrices: dict[str, Weight]
    vectors: dict[str, torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of all of them, before any is packed."""
        return sum(tensor.nbytes for tensor in (*self.matrices.values(), *self.vectors.values()))


def bring(tensors: dict[str, torch.Tensor], precision: Precision, device: str) -> UnitWeights:
    """Bring the tensors of a unit to a device and a precision. They stay mapped where they are in that form already.

    Every matrix is quantised where the precision says so: embedding and output projection as those of the layers.
    """
    compute = DTYPES[precision.compute]
    weights = UnitWeights({}, {})
    for name, tensor in tensors.items():
        if tensor.dim() == 1:
            weights.vectors[name] = tensor.to(device=device, dtype=compute)
        elif precision.dtype not in _QUANTIZE:
            weights.matrices[name] = tensor.to(device=device, dtype=compute)
        else:
            quantized = _QUANTIZE[precision.dtype](tensor)
            expand = precision.resident == precision.compute
            weights.matrices[name] = quantized.dequantize(compute).to(device) if expand else quantized.to(device)
    return weights
