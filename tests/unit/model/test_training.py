from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from blyan_node.errors import CheckpointError, ConfigError, RuleError
from blyan_node.model.delta import ATOL
from blyan_node.model.forward import Forward
from blyan_node.model.importing import open_checkpoint, read_units, write_unit
from blyan_node.model.tokenizer import Tokenizer
from blyan_node.model.training import Evaluation, Recipe, Training, updated, widened
from tests.support.models import import_units, tiny_checkpoint
from tests.unit.model.conftest import Imported
from tests.unit.model.walk import Pipeline

RECIPE = Recipe(layers=(1, 2), steps=12, batch=2, learning_rate=3e-3)
UNITS = ("layer.1", "layer.2")
LOW_RANK = replace(RECIPE, rank=4, learning_rate=1e-2)
RECIPES = pytest.mark.parametrize("recipe", [RECIPE, LOW_RANK], ids=["full", "low rank"])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Imported:
    directory = tmp_path_factory.mktemp("small")
    checkpoint = open_checkpoint(tiny_checkpoint(directory, layers=4, hidden=64, vocab=300))
    return Imported(checkpoint.spec, checkpoint.tokenizer, import_units(checkpoint, directory / "units"))


def windows(count: int, seed: int = 0, length: int = 33) -> list[list[int]]:
    """Counting round a clock, from anywhere, which is easy to learn."""
    starts = torch.randint(0, 12, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return [[40 + (start + place) % 12 for place in range(length)] for start in starts]


def trained(model: Imported, recipe: Recipe, steps: int | None = None) -> Training:
    training = Training(Forward(model.spec, model.blobs), recipe)
    while training.step < (recipe.steps if steps is None else steps):
        training.train(windows(recipe.batch, training.step))
    return training


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": False, "attention_bias": True, "num_key_value_heads": 8}),
        ("qwen3", {}),
    ],
)
def test_the_forward_pass_is_that_of_the_shard(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint(tmp_path, family, seed=3, **changes))
    model = Imported(checkpoint.spec, checkpoint.tokenizer, import_units(checkpoint, tmp_path / "units"))
    ids = torch.randint(0, 1000, (100,), generator=torch.Generator().manual_seed(1)).tolist()
    forward = Forward(model.spec, model.blobs)
    expected = Pipeline([model.shard()]).logits(ids)
    for layer in (0, 2, 4):
        with torch.no_grad():
            torch.testing.assert_close(
                forward.logits(layer, forward.below(layer, ids), {}), expected, atol=1e-4, rtol=0
            )


@pytest.mark.xdist_group("smollm2")
def test_the_forward_pass_of_the_real_model_is_that_of_the_shard(smollm2: Imported) -> None:
    ids = list(Tokenizer(smollm2.tokenizer).encode("Call me Ishmael. Some years ago, never mind how long precisely,"))
    forward = Forward(smollm2.spec, smollm2.blobs)
    with torch.no_grad():
        logits = forward.logits(0, forward.below(0, ids), {})
    torch.testing.assert_close(logits, Pipeline([smollm2.shard()]).logits(ids), atol=1e-3, rtol=0)


def test_the_gradient_is_that_of_finite_differences(small: Imported) -> None:
    forward, (window,) = Forward(small.spec, small.blobs), windows(1)
    x = forward.below(1, window)
    weights = {name: weight.clone().requires_grad_() for name, weight in forward.unit("layer.1").items()}
    forward.loss(1, x, window, {"layer.1": weights}).backward()
    for name, weight in weights.items():
        with torch.no_grad():
            direction = weight.grad / weight.grad.norm()
            ends = [
                forward.loss(1, x, window, {"layer.1": weights | {name: weight + side * direction}}).item()
                for side in (0.01, -0.01)
            ]
        assert (ends[0] - ends[1]) / 0.02 == pytest.approx(weight.grad.norm().item(), rel=0.05), name


@RECIPES
def test_named_layers_learn_and_no_others(small: Imported, recipe: Recipe) -> None:
    training = trained(small, recipe)
    evaluation = Evaluation(training.forward, 1, windows(4, seed=99))
    after = widened(updated(training.forward, small.blobs, UNITS, training.delta(ATOL)))
    before = sum(evaluation.losses({}))
    assert sum(evaluation.losses(after)) < 0.95 * before
    assert sum(evaluation.losses({})) == before
    with pytest.raises(RuleError):
        updated(training.forward, small.blobs, ("layer.0",), training.delta(ATOL))


@RECIPES
def test_an_interrupted_training_ends_in_the_same_bytes(small: Imported, recipe: Recipe, tmp_path: Path) -> None:
    whole = trained(small, recipe)
    trained(small, recipe, 3).save(tmp_path / "checkpoint")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    resumed = Training(Forward(small.spec, small.blobs), recipe)
    resumed.restore(tmp_path / "checkpoint")
    assert resumed.step == 3
    while resumed.step < recipe.steps:
        resumed.train(windows(recipe.batch, resumed.step))
    assert resumed.delta(ATOL) == whole.delta(ATOL)


def test_a_checkpoint_of_another_recipe_is_refused(small: Imported, tmp_path: Path) -> None:
    trained(small, RECIPE, 1).save(tmp_path / "checkpoint")
    for other in (LOW_RANK, replace(RECIPE, layers=(0, 1))):
        with pytest.raises(CheckpointError):
            Training(Forward(small.spec, small.blobs), other).restore(tmp_path / "checkpoint")


def test_weights_keep_the_dtype_in_which_they_are_stored(small: Imported, tmp_path: Path) -> None:
    stored = {unit: read_units(small.spec, [unit], small.blobs, dtype=torch.bfloat16)[unit] for unit in UNITS}
    blobs = dict(small.blobs)
    for unit, tensors in stored.items():
        blobs[unit] = tmp_path / unit
        write_unit(tensors, blobs[unit])
    model = replace(small, blobs=blobs)
    training = trained(model, RECIPE, 2)
    result = updated(training.forward, blobs, UNITS, training.delta(ATOL))
    assert {tensor.dtype for tensors in result.values() for tensor in tensors.values()} == {torch.bfloat16}


@pytest.mark.parametrize("layers", [(), (2, 1), (1, 1), (-1,), (3, 4)])
def test_layers_that_cannot_be_trained_are_refused(small: Imported, layers: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError):
        Training(Forward(small.spec, small.blobs), replace(RECIPE, layers=layers))


@pytest.mark.parametrize("changes", [{"steps": 0}, {"batch": 0}, {"rank": -1}, {"learning_rate": 0.0}])
def test_recipes_that_train_nothing_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        replace(RECIPE, **changes)


@pytest.mark.parametrize("window", [[], [300], [-1], [0] * 2049])
def test_tokens_that_the_model_has_not_are_refused(small: Imported, window: list[int]) -> None:
    with pytest.raises(RuleError):
        Forward(small.spec, small.blobs).below(0, window)


def test_the_learning_rate_rises_and_then_falls() -> None:
    recipe = Recipe(layers=(0,), steps=100, learning_rate=1.0)
    rates = [recipe.rate(step) for step in range(100)]
    assert rates[4] == 1.0 == max(rates)
    assert rates[:5] == sorted(rates[:5])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert 0.1 <= rates[-1] < 0.11
