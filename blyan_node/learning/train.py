"""The process that trains: ``python -m blyan_node.learning.train DIRECTORY``; see :mod:`blyan_node.learning.job`.

A process of its own, so that training neither slows the node down nor takes it along. It may be killed at any time:
started again it goes on from its last checkpoint, and ends with the same bytes.
"""

from __future__ import annotations

import fcntl
import sys
import time
from collections import deque
from pathlib import Path

from blyan_node.errors import BlyanError, LocalError
from blyan_node.learning.dataset import Windows, cut_windows, read_documents
from blyan_node.learning.job import Event, Failed, Job, Place, Progress, Result, read_job, show_event, write_whole
from blyan_node.model.forward import Forward
from blyan_node.model.shard import configure
from blyan_node.model.spec import ModelSpec
from blyan_node.model.tokenizer import Tokenizer
from blyan_node.model.training import Evaluation, Recipe, Training, updated, widened

_RECENT = 16  # steps that the speed is an average of


def main(arguments: list[str]) -> int:
    """Train the job of a directory; return 0 if it ended well."""
    place = Place(Path(arguments[0]))
    with place.lock.open("w") as lock:
        # A node that was killed may have left a process that has not noticed yet.
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            end: Result | Failed = run(place)
        except BrokenPipeError:  # the node is gone: it will start the job again
            return 1
        except BlyanError as error:
            end = Failed(str(error))
        write_whole(place.result, show_event(end).encode())
    say(end)
    return 0 if isinstance(end, Result) else 1


def run(place: Place) -> Result:
    """Do the whole job, from its checkpoint where there is one."""
    configure(1)
    job = _read(place)
    spec = ModelSpec.from_json(job.spec.encode())
    blobs = {unit: Path(path) for unit, path in job.blobs.items()}
    windows = cut_windows(read_documents(Path(job.dataset)), Tokenizer(Path(job.tokenizer).read_bytes()), job.window)
    recipe = Recipe(
        layers=tuple(job.layers),
        steps=min(job.steps, windows.steps(job.epochs, job.batch)),
        batch=job.batch,
        rank=job.rank,
        learning_rate=job.learning_rate,
        seed=job.seed,
    )
    training = Training(Forward(spec, blobs), recipe)
    if place.checkpoint.exists():
        training.restore(place.checkpoint)
    _train(place, job, training, windows)
    delta = training.delta(job.atol)
    units = [f"layer.{layer}" for layer in job.layers]
    learnt = widened(updated(training.forward, blobs, units, delta))
    evaluation = Evaluation(training.forward, recipe.layers[0], windows.held_out)
    before, after = (_mean(evaluation.losses(changed)) for changed in ({}, learnt))
    write_whole(place.delta, delta)
    return Result((before - after) / before, before, after, training.step, str(place.delta))


def say(event: Event) -> None:
    """One line to whoever reads."""
    print(show_event(event), flush=True)  # noqa: T201  the protocol of this process


def _train(place: Place, job: Job, training: Training, windows: Windows) -> None:
    recipe, times = training.recipe, deque([time.monotonic()], maxlen=_RECENT + 1)
    while training.step < recipe.steps:
        loss = training.train(windows.batch(training.step, recipe.batch, recipe.seed))
        times.append(time.monotonic())
        each = (times[-1] - times[0]) / (len(times) - 1)
        left = (recipe.steps - training.step) * each
        say(Progress(training.step, recipe.steps, loss, recipe.batch * job.window / each, left))
        if training.step % job.checkpoint_every == 0 or training.step == recipe.steps:
            training.save(place.checkpoint)


def _read(place: Place) -> Job:
    try:
        return read_job(place.job.read_text())
    except OSError as error:
        raise LocalError(f"{place.job} cannot be read: {error.strerror}") from error


def _mean(losses: list[float]) -> float:
    return sum(losses) / len(losses)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
