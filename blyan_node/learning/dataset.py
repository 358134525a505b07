"""Datasets: a text file, or JSONL with a ``text`` in each line, cut into windows of token ids.

A dataset is an operator's own file or a blob of a peer's; either way it is bounded before it is read and refused, with
its line, where it is not text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Protocol

from blyan_node.errors import RequestError

MAX_BYTES = 256 << 20
MAX_LINE = 4 << 20
MAX_HELD_OUT = 16
_LEAST_WINDOWS = 4
_HELD_OUT_SHARE = 8  # one window of so many, at most MAX_HELD_OUT

Window = Sequence[int]


class Encoder(Protocol):
    """What is needed of a tokenizer."""

    eos_ids: frozenset[int]

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a text."""
        ...


@dataclass(frozen=True)
class Windows:
    """Windows of ``length + 1`` ids, each overlapping the next by one: those to learn from, and those to measure on."""

    train: tuple[Window, ...]
    held_out: tuple[Window, ...]

    def batch(self, step: int, size: int, seed: int) -> list[Window]:
        """What a step learns from: every window once in each round, in an order drawn for that round.

        A function of its arguments alone, so a resumed job goes on as it would have.
        """
        batch = []
        for place in range(step * size, (step + 1) * size):
            turn, index = divmod(place, len(self.train))
            batch.append(self.train[_order(len(self.train), seed, turn)[index]])
        return batch

    def steps(self, epochs: int, size: int) -> int:
        """How many steps take each window ``epochs`` times."""
        return -(-epochs * len(self.train) // size)


def read_documents(path: Path) -> list[str]:
    """The texts of a dataset: one of a text file, one for each line of a ``.jsonl``.

    Raises RequestError for a file that cannot be read, is too large, has no text, or is not text.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise RequestError(f"{path} is larger than {MAX_BYTES >> 20} MiB; split it", param="dataset")
        data = path.read_bytes()
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}", param="dataset") from error
    texts = list(_read_lines(path, data)) if path.suffix == ".jsonl" else [_text(data, str(path))]
    if not any(text.strip() for text in texts):
        raise RequestError(f"{path} has no text in it", param="dataset")
    return texts


def cut_windows(documents: Sequence[str], tokenizer: Encoder, length: int) -> Windows:
    """Join documents, an end of text between two, and cut them into windows; some, evenly spaced, are held out.

    Raises RequestError where there is too little text.
    """
    ids: list[int] = []
    for document in documents:
        ids += tokenizer.encode(document)
        ids += sorted(tokenizer.eos_ids)[:1]
    windows = [ids[start : start + length + 1] for start in range(0, len(ids) - length, length)]
    if len(windows) < _LEAST_WINDOWS:
        least = _LEAST_WINDOWS * length + 1
        raise RequestError(f"the dataset has {len(ids)} tokens, and at least {least} are needed", param="dataset")
    count = min(max(len(windows) // _HELD_OUT_SHARE, 1), MAX_HELD_OUT)
    held = {index * len(windows) // count for index in range(count)}
    return Windows(
        tuple(window for index, window in enumerate(windows) if index not in held),
        tuple(windows[index] for index in sorted(held)),
    )


def _order(count: int, seed: int, turn: int) -> list[int]:
    order = list(range(count))
    Random(f"{seed}/{turn}").shuffle(order)
    return order


def _read_lines(path: Path, data: bytes) -> Iterator[str]:
    for number, line in enumerate(data.splitlines(), 1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        if len(line) > MAX_LINE:
            raise RequestError(f"{where} is longer than {MAX_LINE >> 20} MiB", param="dataset")
        try:
            value = json.loads(_text(line, where))
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{where} is not JSON", param="dataset") from error
        text = value.get("text") if isinstance(value, dict) else None
        if not isinstance(text, str):
            raise RequestError(f'{where} is no object with a "text"', param="dataset")
        yield _text(text.encode(errors="surrogatepass"), where)


def _text(data: bytes, where: str) -> str:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise RequestError(f"{where} is not text in UTF-8 (byte {error.start})", param="dataset") from error
    if "\0" in text:
        raise RequestError(f"{where} is not text: it has zero bytes in it", param="dataset")
    return text
