"""What each precision costs on real text with the real small model, and how fast it decodes.

    python -m benchmarks.quality [--tokens 2000] [--steps 10] [--text FILE]

Loss (nats a token), Kullback-Leibler divergence from float32, and how often the likeliest next token is float32's own,
over windows of 256 tokens of Python's documentation as pydoc carries it, or of a text of one's own. Decoding takes
turns step by step, so that whatever else the machine does meets every precision.
"""

from __future__ import annotations

import argparse
import os
import pydoc_data.topics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks._common import load_average, median, table
from benchmarks.model import PREFILL, PROMPT, Sessions, prefill
from blyan_node.model.importing import open_checkpoint
from blyan_node.model.precision import SETTINGS, precision_of
from blyan_node.model.shard import Shard, Work, configure
from blyan_node.model.tokenizer import Tokenizer
from tests.support.models import import_units, smollm2_gguf

WINDOW = 256


def predictions(shard: Shard, window: Sequence[int]) -> torch.Tensor:
    """Log probabilities [tokens, vocabulary] of what follows each token of a window."""
    cache = shard.open(os.urandom(8), WINDOW)
    (logits,) = shard.logits([Work(cache, 0, tuple(window))])
    cache.close()
    return logits.float().log_softmax(-1)


def quality(shards: dict[str, Shard], windows: Sequence[Sequence[int]]) -> None:
    """Print what each shard makes of the text, beside float32."""
    losses = dict.fromkeys(shards, 0.0)
    divergences, agreements = dict.fromkeys(shards, 0.0), dict.fromkeys(shards, 0.0)
    for window in windows:
        exact = predictions(shards["float32"], window)
        following = torch.tensor(window[1:])
        for name, shard in shards.items():
            got = exact if name == "float32" else predictions(shard, window)
            losses[name] += float(-got[:-1].gather(1, following[:, None]).mean()) / len(windows)
            divergences[name] += float((exact.exp() * (exact - got)).sum(-1).mean()) / len(windows)
            agreements[name] += float((got.argmax(-1) == exact.argmax(-1)).float().mean()) / len(windows)
    rows = [(name, f"{losses[name]:.4f}", f"{divergences[name]:.1e}", f"{agreements[name]:.3f}") for name in shards]
    print(table(("precision", "loss", "KL", "top-1"), rows))


def speed(shards: dict[str, Shard], steps: int) -> None:
    """Print tokens a second of each shard: decoding 1, 8 and 32 sessions, and a prompt."""
    columns: dict[str, list[str]] = {name: [] for name in shards}
    for batch in (1, 8, 32):
        sessions = {name: Sessions([shard], batch) for name, shard in shards.items()}
        taken: dict[str, list[float]] = {name: [] for name in shards}
        for one in sessions.values():
            one.feed([PROMPT] * batch)
        for _ in range(steps):
            for name, one in sessions.items():
                begun = time.perf_counter()
                one.decode()
                taken[name].append(time.perf_counter() - begun)
        for name, one in sessions.items():
            one.close()
            columns[name].append(f"{batch / median(taken[name]):.1f}")
    taken = {name: [] for name in shards}
    for _ in range(3):
        for name, shard in shards.items():
            begun = time.perf_counter()
            prefill([shard])
            taken[name].append(time.perf_counter() - begun)
    rows = [(name, *columns[name], f"{len(PREFILL) / median(taken[name]):.0f}") for name in shards]
    print(table(("tokens/s", "decode, batch 1", "8", "32", f"prefill {len(PREFILL)}"), rows))


def main() -> None:
    """Run it all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--text", type=Path)
    options = parser.parse_args()
    configure(options.threads)
    before = load_average()
    checkpoint = open_checkpoint(smollm2_gguf())
    topics = pydoc_data.topics.topics
    text = options.text.read_text() if options.text else "\n\n".join(topics[name] for name in sorted(topics))
    ids = Tokenizer(checkpoint.tokenizer).encode(text[: 16 * options.tokens])[: options.tokens]
    windows = [ids[start : start + WINDOW] for start in range(0, len(ids) - 1, WINDOW)]
    with tempfile.TemporaryDirectory() as directory:
        blobs = import_units(checkpoint, Path(directory))
        last = len(checkpoint.spec.units) - 1
        shards = {dtype: Shard.load(checkpoint.spec, 0, last, blobs, dtype=dtype) for dtype in SETTINGS}
        quality(shards, windows)
        print()
        speed(shards, options.steps)
    how = precision_of("int8", "cpu")
    print(
        f"\nSmolLM2-135M-Instruct, {len(ids)} tokens, torch {torch.__version__}, {options.threads} thread(s); int8 and"
        f" fp8 compute in {how.compute}; {before} before, {load_average()} after"
    )


if __name__ == "__main__":
    main()
