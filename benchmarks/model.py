"""How fast a shard decodes and prefills on the real small model, beside transformers in the same run.

    python -m benchmarks.model [--threads 1] [--steps 15]

Ours and theirs take turns step by step, so that whatever else the machine does meets both; medians are compared. Then
the same model in 1, 2 and 4 shards of one process, activations copied to bytes and back between them. The blobs are
kept in the temporary directory for the run only.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks._common import load_average, median, table
from blyan_node.inference.generation import Sampling
from blyan_node.model.activation import Activation
from blyan_node.model.importing import open_checkpoint
from blyan_node.model.shard import Shard, Token, Work, configure
from blyan_node.model.spec import ModelSpec
from tests.support.models import import_units, smollm2_gguf, smollm2_transformers

PROMPT = tuple(range(1000, 1032))
PREFILL = tuple(range(1000, 1256))
GREEDY = Sampling(temperature=0.0)

Step = Callable[[], object]


@dataclass
class Sessions:
    """A batch of sessions that walk through a chain of shards together."""

    shards: Sequence[Shard]
    batch: int

    def __post_init__(self) -> None:
        self.caches = [[shard.open(os.urandom(8), 512) for _ in range(self.batch)] for shard in self.shards]
        self.position = 0
        self.last = [PROMPT[0]] * self.batch

    def feed(self, tokens: Sequence[tuple[int, ...]]) -> None:
        """Run one step of the whole batch: every session's next tokens, all of the same number."""
        carried: list[Any] = [None] * self.batch
        for shard, caches in zip(self.shards, self.caches, strict=True):
            final = shard is self.shards[-1]
            carried = shard.step(
                [
                    Work(
                        cache,
                        self.position,
                        None if isinstance(activation, Activation) else ids,
                        activation,
                        GREEDY if final else None,
                    )
                    for cache, ids, activation in zip(caches, tokens, carried, strict=True)
                ]
            )
        self.position += len(tokens[0])
        self.last = [token.id for token in carried if isinstance(token, Token)]

    def decode(self) -> None:
        """One token for every session."""
        self.feed([(token,) for token in self.last])

    def close(self) -> None:
        """Give the caches back."""
        for cache in (cache for caches in self.caches for cache in caches):
            cache.close()


def reference_decode(model: Any, batch: int) -> Step:
    """Transformers' decode step for a batch, after the same prompt."""
    with torch.inference_mode():
        state = model(torch.tensor([PROMPT] * batch), use_cache=True, logits_to_keep=1)

    def step() -> None:
        nonlocal state
        with torch.inference_mode():
            token = state.logits[:, -1:].argmax(-1)
            state = model(token, past_key_values=state.past_key_values, use_cache=True, logits_to_keep=1)

    return step


def reference_prefill(model: Any) -> Step:
    """Transformers' pass over the long prompt."""

    def step() -> None:
        with torch.inference_mode():
            model(torch.tensor([PREFILL]), use_cache=True, logits_to_keep=1)

    return step


def prefill(shards: Sequence[Shard]) -> None:
    """Ours."""
    sessions = Sessions(shards, 1)
    sessions.feed([PREFILL])
    sessions.close()


def alternate(ours: Step, theirs: Step, steps: int) -> tuple[float, float]:
    """Median seconds of both, run in turns, the first turn not counted."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(steps + 1):
        for step, taken in zip((ours, theirs), times, strict=True):
            begun = time.perf_counter()
            step()
            if turn:
                taken.append(time.perf_counter() - begun)
    return median(times[0]), median(times[1])


def beside_transformers(spec: ModelSpec, blobs: dict[str, Path], steps: int) -> None:
    """Print tokens a second, ours and theirs, for both dtypes."""
    model, rows = smollm2_transformers(), []
    for dtype in ("float32", "bfloat16"):
        shards = [Shard.load(spec, 0, spec.layers + 1, blobs, dtype=dtype)]
        model = model.to(getattr(torch, dtype))
        for batch in (1, 32):
            sessions = Sessions(shards, batch)
            sessions.feed([PROMPT] * batch)
            ours, theirs = alternate(sessions.decode, reference_decode(model, batch), steps)
            sessions.close()
            rows.append(row(f"{dtype} decode, batch {batch}", batch, ours, theirs))
        ours, theirs = alternate(lambda: prefill(shards), reference_prefill(model), max(steps // 4, 3))  # noqa: B023
        rows.append(row(f"{dtype} prefill {len(PREFILL)}", len(PREFILL), ours, theirs))
    print(table(("tokens/s", "ours", "transformers", "ratio"), rows))


def row(name: str, tokens: int, ours: float, theirs: float) -> tuple[str, ...]:
    """One line of the table."""
    return name, f"{tokens / ours:.1f}", f"{tokens / theirs:.1f}", f"{theirs / ours:.2f}"


def by_shards(spec: ModelSpec, blobs: dict[str, Path], steps: int) -> None:
    """Print milliseconds for one, two and four shards in this process."""
    rows = []
    ends = {1: [32], 2: [16, 32], 4: [8, 16, 24, 32]}
    for count, stops in ends.items():
        starts = [0, *stops[:-1]]
        shards = [Shard.load(spec, first, stop - 1, blobs) for first, stop in zip(starts, stops, strict=True)]
        sessions = Sessions(shards, 1)
        sessions.feed([PROMPT])
        long, step = alternate(lambda: prefill(shards), sessions.decode, max(steps // 4, 3))  # noqa: B023
        rows.append((f"{count} shards", f"{step * 1e3:.1f}", f"{long * 1e3:.0f}"))
    print(table(("float32, milliseconds", "decode step", f"prefill {len(PREFILL)}"), rows))


def main() -> None:
    """Run it all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=15)
    options = parser.parse_args()
    configure(options.threads)
    before = load_average()
    checkpoint = open_checkpoint(smollm2_gguf())
    with tempfile.TemporaryDirectory() as directory:
        blobs = import_units(checkpoint, Path(directory))
        beside_transformers(checkpoint.spec, blobs, options.steps)
        print()
        by_shards(checkpoint.spec, blobs, options.steps)
    print(
        f"\nSmolLM2-135M-Instruct, torch {torch.__version__}, {options.threads} thread(s), {before} before,"
        f" {load_average()} after"
    )


if __name__ == "__main__":
    main()
