"""Training jobs, in real processes, on a tiny random model."""

from __future__ import annotations

import os
import pydoc_data.topics
import signal
from pathlib import Path
from typing import Any

import pytest
import trio

from blyan_node.errors import LocalError, Overloaded, RequestError
from blyan_node.learning import jobs as jobs_module
from blyan_node.learning.job import Failed, Progress, Result, read_event, show_event
from blyan_node.learning.jobs import Jobs, LocalModel, State
from blyan_node.model.delta import decompress_units
from blyan_node.model.importing import open_checkpoint
from tests.support.models import import_units, tiny_checkpoint
from tests.support.training import processes_of, until

OPTIONS: dict[str, Any] = {"steps": 12, "window": 64, "learning_rate": 3e-3, "checkpoint_every": 2}
PATIENCE = 120


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LocalModel:
    directory = tmp_path_factory.mktemp("model")
    checkpoint = open_checkpoint(tiny_checkpoint(directory, layers=3, hidden=64, vocab=300))
    (directory / "tokenizer").write_bytes(checkpoint.tokenizer)
    return LocalModel(checkpoint.spec, import_units(checkpoint, directory / "units"), directory / "tokenizer")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "topics.txt"
    path.write_text("\n".join(pydoc_data.topics.topics.values())[:20_000])
    return path


def content(path: str) -> bytes:
    return Path(path).read_bytes()


def names_in(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()]


@pytest.mark.timeout(400)
async def test_a_job_improves_its_layers_and_survives_its_node(
    model: LocalModel, text: Path, tmp_path: Path, nursery: trio.Nursery
) -> None:
    jobs = Jobs(tmp_path / "one", nursery)
    id = jobs.submit_training_job(model, text, [2, 1], **OPTIONS)
    result = await jobs.wait_for_job(id, PATIENCE)
    assert result.improvement == pytest.approx(1 - result.loss_after / result.loss_before)
    assert result.improvement > 0.01
    delta = content(result.delta)
    assert decompress_units(delta, model.spec, ("layer.1", "layer.2")).keys() == {"layer.1", "layer.2"}
    curve = jobs.job(id).curve
    assert [progress.step for progress in curve] == list(range(1, 13))
    assert curve[-1].loss < curve[0].loss
    assert curve[-1].seconds_left == 0 < curve[0].seconds_left

    # The same again, killed with its node after a checkpoint: the node that comes next ends with the same bytes.
    async with trio.open_nursery() as node:
        jobs = Jobs(tmp_path / "two", node)
        id = jobs.submit_training_job(model, text, [1, 2], **OPTIONS)
        await until(lambda: len(jobs.job(id).curve) >= 3, PATIENCE)
        (pid,) = processes_of(tmp_path / "two")
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(LocalError, match="-9"):
            await jobs.wait_for_job(id, PATIENCE)
        node.cancel_scope.cancel()
    jobs = Jobs(tmp_path / "two", nursery)
    resumed = await jobs.wait_for_job(id, PATIENCE)
    assert jobs.job(id).curve[0].step > 2
    assert content(resumed.delta) == delta
    assert (resumed.loss_before, resumed.loss_after) == (result.loss_before, result.loss_after)
    assert [job.state for job in jobs.list()] == [State.DONE]


@pytest.mark.timeout(400)
async def test_a_job_is_cancelled_for_good_and_the_next_has_its_turn(
    model: LocalModel, text: Path, tmp_path: Path, nursery: trio.Nursery
) -> None:
    junk = tmp_path / "junk.txt"
    junk.write_bytes(b"\x80\x81\0")
    jobs = Jobs(tmp_path / "jobs", nursery)
    first = jobs.submit_training_job(model, text, [0], epochs=1000, steps=10_000, window=64)
    second = jobs.submit_training_job(model, junk, [0])
    await until(lambda: jobs.job(first).curve, PATIENCE)
    assert [job.state for job in jobs.list()] == [State.RUNNING, State.WAITING]
    (pid,) = processes_of(tmp_path / "jobs")
    jobs.cancel(first)
    with pytest.raises(LocalError, match="cancelled"):
        await jobs.wait_for_job(first, PATIENCE)
    with pytest.raises(LocalError, match="not text in UTF-8"):
        await jobs.wait_for_job(second, PATIENCE)
    assert pid not in processes_of(tmp_path / "jobs")
    again = Jobs(tmp_path / "jobs", nursery)
    assert {job.id: job.state for job in again.list()} == {first: State.FAILED, second: State.FAILED}


async def test_a_node_that_stops_takes_its_process_along(model: LocalModel, text: Path, tmp_path: Path) -> None:
    async with trio.open_nursery() as node:
        jobs = Jobs(tmp_path, node)
        id = jobs.submit_training_job(model, text, [0], epochs=1000, steps=10_000, window=64)
        await until(lambda: jobs.job(id).curve, PATIENCE)
        node.cancel_scope.cancel()
    assert processes_of(tmp_path) == []
    assert jobs.job(id).end is None


async def test_what_cannot_be_trained_is_refused_at_once(
    model: LocalModel, text: Path, tmp_path: Path, autojump_clock: trio.abc.Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with trio.open_nursery() as node:
        jobs = Jobs(tmp_path, node)
        for layers in ([], [3], [-1, 0]):
            with pytest.raises(RequestError, match=r"layers 0\.\.2"):
                jobs.submit_training_job(model, text, layers)
        with pytest.raises(RequestError, match="epoch"):
            jobs.submit_training_job(model, text, [0], epochs=0)
        with pytest.raises(RequestError, match="no training job"):
            jobs.cancel("nosuch")
        monkeypatch.setattr(jobs_module, "MAX_OPEN", 0)
        with pytest.raises(Overloaded, match="cancel one"):
            jobs.submit_training_job(model, text, [0])
        node.cancel_scope.cancel()
    assert names_in(tmp_path) == []


@pytest.mark.parametrize(
    "event", [Progress(1, 2, 3.5, 100.0, 0.5), Result(0.1, 2.0, 1.8, 4, "/delta"), Failed("a\nreason")]
)
def test_an_event_is_one_line(event: Progress | Result | Failed) -> None:
    assert "\n" not in show_event(event)
    assert read_event(show_event(event)) == event


@pytest.mark.parametrize("line", ["", "{", "[]", "{}", '{"event": "nosuch"}', '{"event": "failed"}'])
def test_a_line_that_is_no_event_is_refused(line: str) -> None:
    with pytest.raises(LocalError):
        read_event(line)
