"""Activation beacons: what a span of units makes of an input that nobody chose, in a few numbers.

Input and directions are drawn from a seed by SHAKE-256 (FIPS 202), so every platform draws the same. A beacon's seed
is the root of its unit's blob, a challenge's is fresh. Hashes of weights find the smallest change; beacons find what
hashes cannot: a wrong kernel, a wrong rotation, weights that were rounded too far, a peer that computes something else.

The summary of an output [rows, width] is, for each row, its root mean square and its projections onto a few directions
of random signs, as in Johnson and Lindenstrauss, 1984 (random signs: Achlioptas, 2003): the mean square of differences
between projections estimates that between the rows.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct

import numpy as np
import torch

from blyan_node.errors import IntegrityError
from blyan_node.model.activation import DTYPES, Activation, from_tensor
from blyan_node.model.cache import Cache
from blyan_node.model.kv_memory import PAGE
from blyan_node.model.shard import Shard, Work
from blyan_node.model.spec import ModelSpec

ROWS = 8
DIRECTIONS = 3
MOST = ROWS * 8 * (1 + DIRECTIONS)
"""Bytes of the largest summary."""

TOLERANCE = {"float32": 2e-4, "bfloat16": 0.12, "int8": 0.2, "fp8": 0.6}
"""The largest :func:`difference` from what float32 computes that counts as rounding, by how weights are computed with.

Measured on 3,000 random inputs to spans of up to 8 units of SmolLM2-135M: at most 1.2e-5, 0.107, 0.169 and 1.0 (three
above 0.65); 99 % below 5.5e-6, 0.045, 0.105 and 0.37.
"""

_ROW = struct.Struct(f"<{1 + DIRECTIONS}q")
_MICRO = 1e6
_LARGEST = 2**62
_STEPS = 1024  # of an input from -1/8 to 1/8: multiples of 2^-10 up to 128 steps, exact in bfloat16 too


def rows_of(spec: ModelSpec) -> int:
    """Positions of a probe."""
    return min(ROWS, spec.context_length)


def probe(shard: Shard, first: int, last: int, seed: bytes) -> bytes:
    """Run units ``first`` to ``last`` of a shard on the input that ``seed`` gives; return the output's summary.

    Raises Overloaded where the caches have no room for it, and what :func:`probe_with` does.
    """
    cache = shard.open(os.urandom(16), rows_of(shard.spec), first, last)
    try:
        return probe_with(shard, cache, seed)
    finally:
        cache.close()


def probe_with(shard: Shard, cache: Cache, seed: bytes) -> bytes:
    """The same in a cache of :func:`rows_of` positions that is open.

    The input is small, so that what the first layer adds outweighs it. Raises IntegrityError for an output that is not
    finite.
    """
    spec, rows = shard.spec, cache.capacity
    if cache.first == 0:
        work = Work(cache, 0, tokens=_tokens(seed, rows, spec.vocab_size))
    else:
        work = Work(cache, 0, activation=_activation(seed, rows, spec.hidden_size, shard.dtype))
    if cache.last == len(spec.units) - 1:
        (output,) = shard.logits([work])
    else:
        (result,) = shard.step([work])
        output = _tensor(result)
    return _summary(output, seed)


def beacon_of(spec: ModelSpec, unit: str, tensors: dict[str, dict[str, torch.Tensor]], root: bytes) -> bytes:
    """The beacon of a unit: what float32 makes of it. ``tensors`` are those of ``spec.blobs_for(unit)``, by unit."""
    index = spec.units.index(unit)
    wide = {name: {key: value.float() for key, value in own.items()} for name, own in tensors.items()}
    shard = Shard(spec, index, index, wide, cache_tokens=PAGE)  # ROWS fit into one
    return probe(shard, index, index, root)


def check_beacon(shard: Shard, unit: str, root: bytes, expected: bytes) -> None:
    """Raise IntegrityError unless a loaded unit computes what its beacon says. An empty beacon says nothing."""
    index = shard.spec.units.index(unit)
    dtype = shard.precision.dtype
    if expected and not (apart := difference(expected, probe(shard, index, index, root))) <= TOLERANCE[dtype]:
        raise IntegrityError(
            f"unit {unit} computes something else than its publisher did: its beacon is off by {apart:.2g}, "
            f"where {dtype} may be off by {TOLERANCE[dtype]:g}; its layers are not served here"
        )


def tolerance(mine: str, theirs: str) -> float:
    """What :func:`difference` may be between two that compute in these; 0 for one that is unknown."""
    if theirs not in TOLERANCE:
        return 0.0
    return TOLERANCE[mine] if mine == theirs == "float32" else TOLERANCE[mine] + TOLERANCE[theirs]


def difference(expected: bytes, found: bytes) -> float:
    """How far ``found`` is from ``expected``: what three quarters of the rows do not exceed, relative to their size.

    Not the mean: a row now and then lies where a model magnifies rounding a hundredfold. Infinite where one of the two
    is no summary, or they are of different numbers of rows.
    """
    if len(expected) != len(found) or not expected or len(expected) % _ROW.size:
        return math.inf
    pairs = zip(_ROW.iter_unpack(expected), _ROW.iter_unpack(found), strict=True)
    apart = sorted(_apart(one, other) for one, other in pairs)
    return apart[-(-3 * len(apart) // 4) - 1]


def _apart(expected: tuple[int, ...], found: tuple[int, ...]) -> float:
    """How far one row is from another, from sizes and projections in millionths."""
    (size, *there), (other, *here) = expected, found
    off = sum((size * a - other * b) ** 2 for a, b in zip(there, here, strict=True)) / DIRECTIONS
    off = max(math.sqrt(off) / _MICRO, abs(size - other))
    return off / size if size > 0 else math.inf if off or size else 0.0


def _summary(output: torch.Tensor, seed: bytes) -> bytes:
    """For each row its root mean square in millionths, and its projections in millionths of that."""
    rows = output.to("cpu", torch.float64)
    if not torch.isfinite(rows).all():
        raise IntegrityError("an output with an infinity or NaN in it")
    width = rows.shape[1]
    bits = np.frombuffer(_stream(b"directions", seed, DIRECTIONS * -(-width // 8)), np.uint8).reshape(DIRECTIONS, -1)
    signs = torch.from_numpy(np.unpackbits(bits, axis=1)[:, :width].astype(np.float64)) * 2 - 1
    size = rows.square().mean(dim=1).sqrt()
    projections = rows @ signs.T / (size * math.sqrt(width)).clamp(min=1e-300)[:, None]
    table = torch.cat((size[:, None], projections), dim=1) * _MICRO
    values = table.round().clamp(-_LARGEST, _LARGEST).to(torch.int64)
    return values.numpy().astype("<i8").tobytes()


def _tokens(seed: bytes, rows: int, vocab: int) -> tuple[int, ...]:
    draws = struct.unpack(f"<{rows}I", _stream(b"tokens", seed, 4 * rows))
    return tuple(draw % vocab for draw in draws)


def _activation(seed: bytes, rows: int, hidden: int, dtype: str) -> Activation:
    """Uniform steps of 2^-10 from -1/8 to 1/8."""
    steps = np.frombuffer(_stream(b"input", seed, rows * hidden), np.uint8).astype(np.float32) - 128
    values = torch.from_numpy(steps / _STEPS).reshape(rows, hidden)
    return from_tensor(values.to(DTYPES[dtype]))


def _tensor(result: object) -> torch.Tensor:
    if not isinstance(result, Activation):
        raise IntegrityError("a span that ends before the head gave no activation")
    return torch.frombuffer(bytearray(result.data), dtype=DTYPES[result.dtype]).view(result.shape)


def _stream(purpose: bytes, seed: bytes, size: int) -> bytes:
    return hashlib.shake_256(b"blyan/beacon/1|" + purpose + b"|" + seed).digest(size)
