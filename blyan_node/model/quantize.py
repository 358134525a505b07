"""Weights in eight bits: int8 or fp8 values, and one scale for each output channel, which is a row of the weight.

Only weights are quantised. What they multiply stays as it is computed, so no row of a batch depends on the others.
Equal weights give equal bytes. The bounds below hold for weights up to 2^127; beyond, rounding up may give infinity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

_INT8_MOST = 127
_FP8_MOST, _FP8_EXPONENT = 0.875, 9  # e4m3 ends at 448, which is 0.875 * 2^9
_INT8_LEAST_SCALE = 2.0**-126  # the least normal float32: dividing by less would lose digits
_FP8_LEAST_EXPONENT = -117  # and 2^-9, the least e4m3 number, times 2^-117 is that number
_BLOCK = 1 << 22  # weights that are widened to float32 at a time

_Rows = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Quantized:
    """A weight [out, in] as ``values`` of one byte (int8 or float8_e4m3fn) and float32 ``scales`` [out]."""

    values: torch.Tensor
    scales: torch.Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return self.values.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the values and the scales."""
        return self.values.nbytes + self.scales.nbytes

    def numel(self) -> int:
        """Number of weights."""
        return self.values.numel()

    @classmethod
    def stack(cls, parts: Sequence[Quantized]) -> Quantized:
        """One weight of the rows of several."""
        return cls(torch.cat([part.values for part in parts]), torch.cat([part.scales for part in parts]))

    def to(self, device: str) -> Quantized:
        """The same on another device."""
        return Quantized(self.values.to(device), self.scales.to(device))

    def rows(self, indexes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Some rows [indexes, in], dequantised."""
        bytes_ = self.values.view(torch.uint8)[indexes]  # fp8 cannot be indexed everywhere
        return (bytes_.view(self.dtype).float() * self.scales[indexes, None]).to(dtype)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """``values * scales`` [out, in], rounded to ``dtype`` (float32 or bfloat16), which changes no fp8 value."""
        weight = torch.empty(self.values.shape, dtype=dtype, device=self.values.device)
        for rows in blocks(self.values):
            torch.mul(self.values[rows].float(), self.scales[rows, None], out=weight[rows])
        return weight


def quantize_to_int8(weight: torch.Tensor) -> Quantized:
    """Round a float weight [out, in] to 255 even steps, from -amax to amax of each row.

    The scale, one step, is amax / 127, and never less than 2^-126. A dequantised weight is off by half a step at most,
    besides what float32 rounds: 2^-22 of amax.
    """

    def quantize(rows: torch.Tensor, amax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scales = (amax / _INT8_MOST).clamp(min=_INT8_LEAST_SCALE)
        return (rows / scales[:, None]).round_(), scales

    return _by_rows(weight, torch.int8, quantize)


def quantize_to_fp8(weight: torch.Tensor) -> Quantized:
    """Round a float weight [out, in] to e4m3 (Micikevicius et al., 2022), scaled row by row into its range.

    Scales are powers of two, the least that bring a row within ±448, and never less than 2^-117. So a dequantised
    weight is exact in bfloat16 as in float32, whichever is computed in. A finer scale would gain nothing: a float's
    relative error is the same all over its range. A dequantised weight is off by 2^-4 of the weight at most where it
    is 2^-6 scales or more (the largest of a row is above 224 scales), and by 2^-10 scales at most below that.
    """

    def quantize(rows: torch.Tensor, amax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mantissa, exponent = torch.frexp(amax)  # amax is mantissa * 2^exponent, and 0.5 <= mantissa < 1
        exponent = (exponent - _FP8_EXPONENT + (mantissa > _FP8_MOST)).clamp(min=_FP8_LEAST_EXPONENT)
        scales = torch.ldexp(torch.ones_like(amax), exponent)
        return rows / scales[:, None], scales

    return _by_rows(weight, torch.float8_e4m3fn, quantize)


def _by_rows(weight: torch.Tensor, dtype: torch.dtype, quantize: _Rows) -> Quantized:
    """Quantise a few rows at a time, so that a large weight is never in memory as float32."""
    values = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    scales = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    for rows in blocks(weight):
        wide = weight[rows].float()
        scaled, scales[rows] = quantize(wide, wide.abs().amax(dim=1))
        values[rows] = scaled.to(dtype)
    return Quantized(values, scales)


def blocks(weight: torch.Tensor) -> list[slice]:
    """The rows of a weight, a few at a time."""
    step = max(_BLOCK // weight.shape[1], 1)
    return [slice(start, start + step) for start in range(0, weight.shape[0], step)]
