"""How small and how fast deltas get, beside the entropy limit and fp16 + zstd in the same run.

    python -m benchmarks.delta

Ratios are to float32. The limit is the entropy of the same quantiser's codes, which no coder of single values beats;
fp16 keeps no bound (its error grows with the value). Two inputs: normal numbers, and Laplace's, which have the sharp
peak and long tails of what training changes. MB/s count float32 bytes, medians of several turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import zstandard

from benchmarks._common import load_average, median, table
from blyan_node.model.delta import ATOL, compress_delta, decompress_delta

COUNT, TURNS = 4_000_000, 7


def entropy_limit(values: torch.Tensor) -> float:
    """float32 bits over the bits of entropy of a quantiser with step 2·atol."""
    _, counts = np.unique(np.rint(values.numpy() / (2 * ATOL)), return_counts=True)
    shares = counts / counts.sum()
    return float(32 / -(shares * np.log2(shares)).sum())


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """What a function returns, and the median of its seconds."""
    taken = []
    for _ in range(TURNS):
        begun = time.perf_counter()
        result = function()
        taken.append(time.perf_counter() - begun)
    return result, median(taken)


def halves(values: torch.Tensor) -> bytes:
    """The rival."""
    return zstandard.ZstdCompressor(level=3).compress(values.half().numpy().tobytes())


def whole(data: bytes) -> torch.Tensor:
    """And back."""
    plain = bytearray(zstandard.ZstdDecompressor().decompress(data))
    return torch.frombuffer(plain, dtype=torch.float16).float()


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    before, source = load_average(), np.random.default_rng(7)
    inputs = {"N(0, 0.01)": source.normal(0, 0.01, COUNT), "Laplace(0, 0.001)": source.laplace(0, 0.001, COUNT)}
    rows = []
    for name, numbers in inputs.items():
        values = torch.from_numpy(numbers.astype(np.float32))
        megabytes = values.nbytes / 1e6
        rows.append((f"{name}: entropy limit", f"{entropy_limit(values):.2f}", "", "", ""))
        for coder, encode, decode in (("this codec", compress_delta, decompress_delta), ("fp16 + zstd", halves, whole)):
            data, encoding = timed(lambda: encode(values))  # noqa: B023
            back, decoding = timed(lambda: decode(data))  # noqa: B023
            error = float((back.double() - values.double()).abs().max())
            speeds = f"{megabytes / encoding:.0f}", f"{megabytes / decoding:.0f}"
            rows.append((f"{name}: {coder}", f"{values.nbytes / len(data):.2f}", *speeds, f"{error:.1e}"))
    print(table(("delta", "ratio", "encode MB/s", "decode MB/s", "largest error"), rows))
    print(f"\n{COUNT:,} values, one thread, {before} before, {load_average()} after")


if __name__ == "__main__":
    main()
