from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from blyan_node.model.importing import open_checkpoint
from blyan_node.model.shard import Shard, configure
from blyan_node.model.spec import ModelSpec
from tests.support.models import import_units, smollm2_gguf, tiny_checkpoint


@dataclass(frozen=True)
class Imported:
    """An imported model: what a node has of it on disk."""

    spec: ModelSpec
    tokenizer: bytes
    blobs: dict[str, Path]

    def shard(self, first: int = 0, last: int | None = None, **options: object) -> Shard:
        """Load a range of units; all of them unless told otherwise."""
        last = len(self.spec.units) - 1 if last is None else last
        return Shard.load(self.spec, first, last, self.blobs, **options)  # type: ignore[arg-type]


def imported(checkpoint: Path, directory: Path) -> Imported:
    opened = open_checkpoint(checkpoint)
    return Imported(opened.spec, opened.tokenizer, import_units(opened, directory))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    configure(1)
    yield
    configure(before)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Imported:
    directory = tmp_path_factory.mktemp("tiny")
    return imported(tiny_checkpoint(directory), directory / "units")


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Imported:
    return imported(smollm2_gguf(), tmp_path_factory.mktemp("smollm2"))
