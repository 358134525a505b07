"""The real small model learns from a real book: the last two layers, whole and by low-rank additions."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import trio

from blyan_node.errors import LocalError
from blyan_node.learning.jobs import Jobs, LocalModel
from blyan_node.model.importing import open_checkpoint
from tests.support.models import import_units, smollm2_gguf
from tests.support.texts import moby_dick
from tests.support.training import processes_of, until

pytestmark = [pytest.mark.e2e, pytest.mark.long]

LAYERS = [28, 29]
PATIENCE = 1500


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> LocalModel:
    directory = tmp_path_factory.mktemp("smollm2")
    checkpoint = open_checkpoint(smollm2_gguf())
    (directory / "tokenizer").write_bytes(checkpoint.tokenizer)
    return LocalModel(checkpoint.spec, import_units(checkpoint, directory / "units"), directory / "tokenizer")


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("how", [{"steps": 10}, {"steps": 10, "rank": 8, "learning_rate": 2e-3}], ids=["whole", "lora"])
async def test_two_layers_get_better_at_a_book_though_the_process_is_killed(
    smollm2: LocalModel, tmp_path: Path, nursery: trio.Nursery, how: dict[str, Any]
) -> None:
    book = moby_dick()
    async with trio.open_nursery() as node:
        jobs = Jobs(tmp_path, node)
        id = jobs.submit_training_job(smollm2, book, LAYERS, checkpoint_every=2, **how)
        await until(lambda: len(jobs.job(id).curve) >= 3, PATIENCE)
        for pid in processes_of(tmp_path):
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(LocalError, match="-9"):
            await jobs.wait_for_job(id, PATIENCE)
        node.cancel_scope.cancel()
    jobs = Jobs(tmp_path, nursery)
    result = await jobs.wait_for_job(id, PATIENCE)
    assert jobs.job(id).curve[0].step >= 3
    assert result.improvement > 0.01
