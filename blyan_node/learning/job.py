"""A training job as files in a directory of its own, and what it says while it runs.

::

    job.json               what is to be done         checkpoint.safetensors  where it stands
    delta                  what was learnt            result.json             how good it is; written last, so: done
    lock                   held (flock) by the process that trains              log       what went wrong

The process that trains says one JSON object a line: a Progress at each step, then the Result or a Failed.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from blyan_node.errors import LocalError, StoreError
from blyan_node.model.delta import ATOL

MAX_LINE = 4096
T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """What is to be done. ``blobs`` maps every unit of the model to its verified safetensors file.

    ``steps`` bounds what ``epochs`` ask for; ``window`` is in tokens, ``rank`` 0 trains whole layers; a checkpoint is
    written every ``checkpoint_every`` steps.
    """

    spec: str
    blobs: dict[str, str]
    tokenizer: str
    dataset: str
    layers: list[int]
    epochs: int = 1
    steps: int = 100
    batch: int = 4
    window: int = 128
    rank: int = 0
    learning_rate: float = 4e-4
    seed: int = 0
    atol: float = ATOL
    checkpoint_every: int = 10


@dataclass(frozen=True)
class Progress:
    """After ``step`` of ``steps``: the loss of its batch in nats per token, the speed, and the time left."""

    step: int
    steps: int
    loss: float
    tokens_per_s: float
    seconds_left: float


@dataclass(frozen=True)
class Result:
    """How a job ended: held-out loss in nats per token, without and with the delta as a decoder gives it back.

    ``improvement`` is the relative drop. ``delta`` is the file that holds the encoded delta.
    """

    improvement: float
    loss_before: float
    loss_after: float
    steps: int
    delta: str


@dataclass(frozen=True)
class Failed:
    """Why a job did not end well."""

    reason: str


Event = Progress | Result | Failed
_EVENTS: dict[str, type[Event]] = {"progress": Progress, "result": Result, "failed": Failed}


@dataclass(frozen=True)
class Place:
    """Paths inside a job's directory."""

    root: Path

    @property
    def job(self) -> Path:
        """What is to be done."""
        return self.root / "job.json"

    @property
    def checkpoint(self) -> Path:
        """Where it stands."""
        return self.root / "checkpoint.safetensors"

    @property
    def delta(self) -> Path:
        """What was learnt."""
        return self.root / "delta"

    @property
    def result(self) -> Path:
        """How good it is, or why there is nothing."""
        return self.root / "result.json"

    @property
    def lock(self) -> Path:
        """Held while a process trains."""
        return self.root / "lock"

    @property
    def log(self) -> Path:
        """What the process that trains wrote on its standard error."""
        return self.root / "log"


def show_event(event: Event) -> str:
    """An event as a line of JSON, without its end."""
    (kind,) = (name for name, cls in _EVENTS.items() if isinstance(event, cls))
    return json.dumps({"event": kind} | dataclasses.asdict(event))


def read_event(line: str) -> Event:
    """Read what :func:`show_event` gave. Raises LocalError."""
    value = _object(line, "an event of a training job")
    if (cls := _EVENTS.get(value.pop("event", ""))) is None:
        raise LocalError("an event of a training job is of no known kind")
    return _build(cls, value)


def show_job(job: Job) -> str:
    """A job as JSON."""
    return json.dumps(dataclasses.asdict(job), indent=1)


def read_job(text: str) -> Job:
    """Read what :func:`show_job` gave. Raises LocalError."""
    return _build(Job, _object(text, "a training job"))


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all, even after a power cut. Raises StoreError."""
    scratch = path.with_name(path.name + ".tmp")
    try:
        with scratch.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error.strerror}") from error


def _object(text: str, what: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise LocalError(f"{what} is not JSON") from error
    if not isinstance(value, dict):
        raise LocalError(f"{what} is no object")
    return value


def _build(cls: type[T], value: dict[str, Any]) -> T:
    try:
        return cls(**value)
    except TypeError as error:
        raise LocalError(f"{cls.__name__.lower()}: {error}") from error
