"""The weights of one unit in memory: read from its blob, checked against the spec, in the precision asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from blyan_node.model.importing import STORED, check_tensor, read_safetensors
from blyan_node.model.linear import Weight
from blyan_node.model.precision import Precision
from blyan_node.model.quantize import quantize_to_fp8, quantize_to_int8
from blyan_node.model.spec import ModelSpec

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


def load_unit(spec: ModelSpec, unit: str, path: Path, precision: Precision, device: str) -> UnitWeights:
    """Map a blob and bring its tensors to a device. They stay mapped where they are in the wanted form already.

    Every matrix is quantised where the precision says so: embedding and output projection as those of the layers.
    Raises CheckpointError for a blob that does not fit the spec.
    """
    compute = STORED[precision.compute]
    weights = UnitWeights({}, {})
    shapes = spec.unit_tensors(unit)
    for name, tensor in read_safetensors(path, tuple(shapes)).items():
        check_tensor(f"{path}: {unit}: {name}", tensor, shapes[name])
        if tensor.dim() == 1:
            weights.vectors[name] = tensor.to(device=device, dtype=compute)
        elif precision.dtype not in _QUANTIZE:
            weights.matrices[name] = tensor.to(device=device, dtype=compute)
        else:
            quantized = _QUANTIZE[precision.dtype](tensor)
            expand = precision.resident == precision.compute
            weights.matrices[name] = quantized.dequantize(compute).to(device) if expand else quantized.to(device)
    return weights
