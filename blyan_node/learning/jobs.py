"""The training jobs of a node: one runs at a time, a few wait, and what was not ended goes on after a restart."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from subprocess import PIPE
from typing import Any

import trio

from blyan_node.errors import LocalError, Overloaded, RequestError
from blyan_node.learning.job import (
    MAX_LINE,
    Failed,
    Job,
    Place,
    Progress,
    Result,
    read_event,
    read_job,
    show_event,
    show_job,
    write_whole,
)
from blyan_node.model.spec import ModelSpec

MAX_OPEN = 16
"""Jobs that run or wait at once."""
MAX_CURVE = 10_000
CANCELLED = "cancelled"


class State(Enum):
    """What has become of a job."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True)
class LocalModel:
    """A model of which every unit is here: its spec, and where its verified blobs and its tokenizer blob lie."""

    spec: ModelSpec
    blobs: Mapping[str, Path]
    tokenizer: Path


@dataclass
class Running:
    """A job as it stands. ``curve`` holds its progress since this node started, the newest last."""

    id: str
    job: Job
    state: State = State.WAITING
    curve: list[Progress] = field(default_factory=list)
    end: Result | Failed | None = None
    ended: trio.Event = field(default_factory=trio.Event)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)


class Jobs:
    """Training jobs under ``directory``, as tasks of ``nursery``."""

    def __init__(self, directory: Path, nursery: trio.Nursery) -> None:
        """Read the jobs that are there, and go on with those that have no end."""
        self._directory = directory
        self._jobs: dict[str, Running] = {}
        self._more = trio.Event()
        directory.mkdir(parents=True, exist_ok=True)
        for path in sorted(directory.glob("*/job.json"), key=lambda path: path.stat().st_mtime_ns):
            self._open(Running(path.parent.name, read_job(path.read_text())))
        nursery.start_soon(self._run)

    def submit_training_job(
        self, model: LocalModel, dataset: Path, layers: Sequence[int], epochs: int = 1, **options: Any
    ) -> str:
        """Start to train the named layers on a text or JSONL file; return the job's id.

        ``options`` are those fields of :class:`Job` that have a default. Raises RequestError for layers that the model
        has not, Overloaded where too many jobs wait.
        """
        wanted = sorted(set(layers))
        if not wanted or not 0 <= wanted[0] <= wanted[-1] < model.spec.layers:
            raise RequestError(f"the model has layers 0..{model.spec.layers - 1}; name some of them", param="layers")
        if epochs < 1:
            raise RequestError("training takes at least one epoch", param="epochs")
        if sum(job.end is None for job in self._jobs.values()) >= MAX_OPEN:
            raise Overloaded(f"{MAX_OPEN} training jobs are open already; cancel one or wait")
        blobs = {unit: str(path) for unit, path in model.blobs.items()}
        spec, tokenizer = model.spec.to_json().decode(), str(model.tokenizer)
        job = Job(spec, blobs, tokenizer, str(dataset), wanted, epochs=epochs, **options)
        running = Running(secrets.token_hex(8), job)
        place = self._place(running.id)
        place.root.mkdir()
        write_whole(place.job, show_job(job).encode())
        self._open(running)
        return running.id

    async def wait_for_job(self, id: str, timeout: float = float("inf")) -> Result:
        """Wait for a job's end. Raises TooSlowError after ``timeout`` seconds, LocalError where the job failed."""
        job = self.job(id)
        with trio.fail_after(timeout):
            await job.ended.wait()
        if isinstance(job.end, Result):
            return job.end
        raise LocalError(f"training job {id} ended without a result: {job.end.reason if job.end else 'unknown'}")

    def job(self, id: str) -> Running:
        """Return a job. Raises RequestError where there is none of that id."""
        if (job := self._jobs.get(id)) is None:
            raise RequestError(f"there is no training job {id!r:.40}", param="job")
        return job

    def list(self) -> tuple[Running, ...]:
        """Return all jobs, oldest first."""
        return tuple(self._jobs.values())

    def cancel(self, id: str) -> None:
        """End a job that runs or waits, for good. Raises RequestError where there is none of that id."""
        job = self.job(id)
        if job.end is None:
            write_whole(self._place(id).result, show_event(Failed(CANCELLED)).encode())
            self._end(job, Failed(CANCELLED))
            job.scope.cancel()

    def _place(self, id: str) -> Place:
        return Place(self._directory / id)

    def _open(self, job: Running) -> None:
        self._jobs[job.id] = job
        if (end := self._written_end(job)) is not None:
            self._end(job, end)
        self._more.set()

    def _written_end(self, job: Running) -> Result | Failed | None:
        path = self._place(job.id).result
        event = read_event(path.read_text()) if path.exists() else None
        return event if isinstance(event, Result | Failed) else None

    def _end(self, job: Running, end: Result | Failed) -> None:
        job.end, job.state = end, State.DONE if isinstance(end, Result) else State.FAILED
        job.ended.set()

    async def _run(self) -> None:
        while True:
            if (job := next((job for job in self._jobs.values() if job.end is None), None)) is None:
                self._more = trio.Event()
                await self._more.wait()
                continue
            with job.scope:
                job.state = State.RUNNING
                code = await self._train(job)
                self._end(job, self._written_end(job) or self._crashed(job, code))

    async def _train(self, job: Running) -> int:
        """Run the process to its end, taking its progress; whoever leaves early takes the process along."""
        place = self._place(job.id)
        command = [sys.executable, "-m", "blyan_node.learning.train", str(place.root)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        with place.log.open("wb") as log:
            process = await trio.lowlevel.open_process(command, stdout=PIPE, stderr=log, env=environment)
        try:
            if process.stdout is not None:
                await self._follow(job, process.stdout)
            return await process.wait()
        finally:
            with trio.CancelScope(shield=True):
                if process.poll() is None:
                    process.kill()
                await process.wait()
                if process.stdout is not None:
                    await process.stdout.aclose()

    async def _follow(self, job: Running, stream: trio.abc.ReceiveStream) -> None:
        rest = b""
        async for chunk in stream:
            *lines, rest = (rest + chunk).split(b"\n")
            if len(rest) > MAX_LINE:
                raise LocalError(f"training job {job.id} says a line of more than {MAX_LINE} bytes")
            for line in lines:
                event = read_event(line.decode())
                if isinstance(event, Progress):
                    job.curve = [*job.curve[-MAX_CURVE:], event]

    def _crashed(self, job: Running, code: int) -> Failed:
        said = self._place(job.id).log.read_text(errors="replace").strip().splitlines()
        return Failed(f"its process ended with {code}: {said[-1] if said else 'it said nothing'}")
