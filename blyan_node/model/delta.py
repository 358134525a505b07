"""Deltas: what training added to weights, in few bytes and with an error that is bounded for any finite input.

A uniform quantiser of step 2·atol, zigzag, byte planes and zstd, in that order: close to the entropy limit of a normal
distribution, and fast. Whatever this would miss by more than atol (values out of its range, or where float32 itself is
that coarse) is kept exactly. Ratio and speed are measured by ``benchmarks/delta.py``.

::

    coded  = [shape, step (the bits of a float32), number of exact values, zstd(low bytes | high bytes | exact values)]
    code   = zigzag of the multiple of step, 16 bits; 65535 stands for the next of the exact values (float32)
    delta  = [[[unit, tensor, coded], ...]]          sorted by both names

All are canonical msgpack, numbers in planes little-endian.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
import zstandard

from blyan_node.codec import Bound, Size, pack, unpack
from blyan_node.errors import CodecError, RuleError
from blyan_node.model.spec import ModelSpec, Shape

ATOL = 1e-4
MAX_ELEMENTS = 1 << 28
MAX_DIMENSIONS = 8
_SHRINK = 0.999  # of the step: room for what float32 rounds, so that few values near a border are kept exactly
_MOST = 32767  # steps to either side of zero
_MOST_STEP = float(np.finfo(np.float32).max) / 32768
_EXACT = 65535  # the code that zigzag gives to none of them
_BLOCK = 1 << 17  # values at a time, so that all passes over them stay in the cache
_LEVEL = 3

Tensors = Mapping[str, torch.Tensor]
_Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class _Coded:
    shape: Annotated[tuple[Annotated[int, Bound(MAX_ELEMENTS)], ...], Size(MAX_DIMENSIONS)]
    step: Annotated[int, Bound(2**32 - 1)]
    exact: Annotated[int, Bound(MAX_ELEMENTS)]
    planes: bytes


@dataclass(frozen=True)
class _Entry:
    unit: Annotated[str, Size(64, 1)]
    tensor: Annotated[str, Size(128, 1)]
    coded: _Coded


@dataclass(frozen=True)
class _Delta:
    entries: Annotated[tuple[_Entry, ...], Size(1 << 14, 1)]


def compress_delta(delta: torch.Tensor, atol: float = ATOL) -> bytes:
    """Encode a float tensor of 16 or 32 bits; what :func:`decompress_delta` gives differs by ``atol`` at most.

    Raises RuleError for a NaN, an infinity, another dtype, more than MAX_ELEMENTS values, or an ``atol`` that is none.
    """
    return pack(_encode(delta, atol))


def decompress_delta(data: bytes, shape: Shape | None = None) -> torch.Tensor:
    """Decode a tensor, float32, of the shape that is expected, or of any with at most MAX_ELEMENTS values.

    Sizes are checked before anything is allocated. Raises RuleError (CodecError where it is not even canonical).
    """
    most = MAX_ELEMENTS if shape is None else math.prod(shape)
    return _decode(unpack(_Coded, data, most=_bound(most)), shape)


def compress_units(units: Mapping[str, Tensors], atol: float = ATOL) -> bytes:
    """Encode the deltas of a set of units: what a DELTA record's blob holds. Raises as :func:`compress_delta`."""
    named = [(unit, name) for unit in sorted(units) for name in sorted(units[unit])]
    return pack(_Delta(tuple(_Entry(unit, name, _encode(units[unit][name], atol)) for unit, name in named)))


def decompress_units(data: bytes, spec: ModelSpec, units: Sequence[str]) -> dict[str, dict[str, torch.Tensor]]:
    """Decode the deltas of exactly these units of a model. Raises RuleError for anything else, as decompress_delta."""
    shapes = {(unit, name): shape for unit in units for name, shape in spec.unit_tensors(unit).items()}
    entries = unpack(_Delta, data, most=sum(_bound(math.prod(shape)) for shape in shapes.values())).entries
    if [(entry.unit, entry.tensor) for entry in entries] != sorted(shapes):
        raise RuleError(f"a delta whose tensors are not those of {', '.join(sorted(units))}, in order")
    decoded: dict[str, dict[str, torch.Tensor]] = {unit: {} for unit in units}
    for entry in entries:
        decoded[entry.unit][entry.tensor] = _decode(entry.coded, shapes[entry.unit, entry.tensor])
    return decoded


def apply_delta(base: Tensors, delta: Tensors) -> dict[str, torch.Tensor]:
    """Add a unit's delta to its weights, in float32, rounded to even to the dtype in which each is stored.

    Both are IEEE 754 operations on single elements, so every machine gets the same bits. Raises RuleError where a sum
    is not finite.
    """
    applied = {name: (weight.float() + delta[name]).to(weight.dtype) for name, weight in base.items()}
    if name := next((name for name, weight in applied.items() if not weight.isfinite().all()), None):
        raise RuleError(f"the delta takes {name} beyond the range of its dtype")
    return applied


def _encode(delta: torch.Tensor, atol: float) -> _Coded:
    if delta.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise RuleError(f"a delta of dtype {delta.dtype}; floats of 16 or 32 bits can be encoded")
    if delta.numel() > MAX_ELEMENTS or delta.dim() > MAX_DIMENSIONS:
        raise RuleError(f"a delta of shape {tuple(delta.shape)}; at most {MAX_ELEMENTS} values can be encoded")
    if not 1e-30 <= atol <= 1e30:
        raise RuleError(f"an error of {atol} cannot be asked for; from 1e-30 to 1e30 it can")
    values: _Floats = delta.detach().to("cpu", torch.float32).contiguous().numpy().reshape(-1)
    step = np.float32(2 * atol * _SHRINK)
    allowed = np.float32(atol)
    if allowed > atol:
        allowed = np.nextafter(allowed, np.float32(0))
    planes = np.empty((2, values.size), np.uint8)
    exact: list[_Floats] = []
    for start in range(0, values.size, _BLOCK):
        block = values[start : start + _BLOCK]
        if not np.isfinite(block).all():
            raise RuleError("a delta with an infinity or NaN in it")
        codes, missed = _quantise(block, step, allowed)
        exact.append(missed)
        planes[0, start : start + _BLOCK] = codes & 0xFF
        planes[1, start : start + _BLOCK] = codes >> 8
    raw = np.concatenate([np.empty(0, np.float32), *exact])
    packed = zstandard.ZstdCompressor(level=_LEVEL).compress(planes.tobytes() + raw.astype("<f4").tobytes())
    return _Coded(tuple(delta.shape), int(step.view(np.uint32)), raw.size, packed)


def _quantise(values: _Floats, step: np.float32, allowed: np.float32) -> tuple[npt.NDArray[np.uint16], _Floats]:
    """Codes of values, and those of them that their multiple of the step would miss."""
    with np.errstate(over="ignore"):  # a quotient that is infinite is out of range like any other
        multiples = np.clip(np.rint(values / step), -_MOST, _MOST)
        error = np.abs(multiples * step - values)
    missed = error > allowed
    signed = multiples.astype(np.int16)
    codes: npt.NDArray[np.uint16] = ((signed << 1) ^ (signed >> 15)).view(np.uint16)
    codes[missed] = _EXACT
    return codes, values[missed]


def _decode(coded: _Coded, shape: Shape | None) -> torch.Tensor:
    size = math.prod(coded.shape)
    if coded.shape != shape and shape is not None:
        raise RuleError(f"a delta of shape {coded.shape}, where {shape} belongs")
    if size > MAX_ELEMENTS or coded.exact > size:
        raise RuleError(f"a delta of {size} values, {coded.exact} of them exact; at most {MAX_ELEMENTS} are allowed")
    step = np.uint32(coded.step).view(np.float32)
    if not 0 < float(step) <= _MOST_STEP:
        raise RuleError("a delta whose step is no positive number, or too large")
    data = _decompress(coded.planes, 2 * size + 4 * coded.exact)
    planes = np.frombuffer(data, np.uint8, 2 * size).reshape(2, size)
    raw = np.frombuffer(data, "<f4", offset=2 * size)
    if not np.isfinite(raw).all():
        raise RuleError("a delta with an infinity or NaN in it")
    values, taken = np.empty(size, np.float32), 0
    for start in range(0, size, _BLOCK):
        block = slice(start, start + _BLOCK)
        codes = planes[0, block] | planes[1, block].astype(np.uint16) << 8
        signed = (codes >> 1).astype(np.int16) ^ -(codes & 1).astype(np.int16)
        np.multiply(signed, step, out=values[block], casting="unsafe")
        missed = np.flatnonzero(codes == _EXACT)
        if taken + missed.size > raw.size:
            raise RuleError("a delta that stands for more exact values than it has")
        values[block][missed] = raw[taken : taken + missed.size]
        taken += missed.size
    if taken != raw.size:
        raise RuleError("a delta with exact values that belong nowhere")
    return torch.from_numpy(values).reshape(coded.shape)


def _decompress(data: bytes, size: int) -> bytes:
    """Undo zstd, where the frame says truly that it holds ``size`` bytes, and nothing follows it."""
    try:
        # The library allocates what the frame claims, so the claim is checked first.
        if zstandard.frame_content_size(data) != size:
            raise RuleError("a delta whose planes are not of the size that its shape takes")
        plain: Any = zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CodecError("a delta whose planes cannot be decompressed") from error
    if len(plain) != size:
        raise CodecError("a delta whose planes are not of the size that they claim")
    return bytes(plain)


def _bound(elements: int) -> int:
    """Bytes of the largest encoding of so many values: all exact, and what zstd and msgpack add at worst."""
    return 6 * elements + elements // 32 + 1024
