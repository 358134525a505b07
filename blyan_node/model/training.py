"""Training a few layers of a model, whole or by low-rank additions, one step at a time.

Equal recipes over equal windows and weights give equal deltas, whether or not the training was interrupted: nothing
depends on time, and what AdamW (Loshchilov and Hutter, 2019) remembers is a part of the checkpoint. Torch's results may
differ between machines and numbers of threads.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import safetensors
import safetensors.torch
import torch

from blyan_node.errors import ConfigError, StoreError
from blyan_node.model.delta import apply_delta, compress_units, decompress_units
from blyan_node.model.forward import Forward, Weights
from blyan_node.model.importing import check_tensor, read_safetensors, read_units

_WARM_UP = 0.05  # of the steps
_LAST_RATE = 0.1  # of the learning rate
_LONGEST_GRADIENT = 1.0
_LOW_RANK_SCALE = 2.0
_MOMENTS = ("exp_avg", "exp_avg_sq")

Window = Sequence[int]


@dataclass(frozen=True)
class Recipe:
    """Which layers learn, and how. ``rank`` 0 trains them whole, another adds matrices of that rank to theirs."""

    layers: tuple[int, ...]
    steps: int
    batch: int = 8
    rank: int = 0
    learning_rate: float = 2e-4
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.layers or list(self.layers) != sorted(set(self.layers)):
            raise ConfigError("the layers to train are one or more, in ascending order, each once")
        if self.steps < 1 or self.batch < 1 or self.rank < 0 or not 0 < self.learning_rate <= 1:
            raise ConfigError("training takes at least one step and one sequence, and a learning rate of up to 1")

    def rate(self, step: int) -> float:
        """The learning rate of a step: a linear warm-up, then a half cosine down to a tenth."""
        warm = max(round(self.steps * _WARM_UP), 1)
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        falling = 0.5 * (1 + math.cos(math.pi * (step - warm) / max(self.steps - warm, 1)))
        return self.learning_rate * (_LAST_RATE + (1 - _LAST_RATE) * falling)


class Training:
    """Some layers of a model, learning; ``step`` counts the steps that were taken.

    Raises ConfigError for layers that the model lacks.
    """

    def __init__(self, forward: Forward, recipe: Recipe) -> None:
        if not 0 <= recipe.layers[0] <= recipe.layers[-1] < forward.spec.layers:
            raise ConfigError(f"layers {recipe.layers}, where the model has 0..{forward.spec.layers - 1}")
        self.forward, self.recipe, self.step = forward, recipe, 0
        source = torch.Generator().manual_seed(recipe.seed)
        self._learners: dict[str, _Learner] = {
            unit: _LowRank(forward.unit(unit), recipe.rank, source) if recipe.rank else _Full(forward.unit(unit))
            for unit in map("layer.{}".format, recipe.layers)
        }
        self._parameters = {
            f"{unit}/{name}": parameter
            for unit, learner in self._learners.items()
            for name, parameter in learner.parameters.items()
        }
        self._optimizer = torch.optim.AdamW(self._parameters.values(), weight_decay=0.0)

    def train(self, windows: Sequence[Window]) -> float:
        """Take a step over a batch of windows; return its mean loss before the step, in nats per token.

        One window at a time: its logits are the largest thing in memory.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = self.recipe.rate(self.step)
        self._optimizer.zero_grad()
        total, first = 0.0, self.recipe.layers[0]
        for window in windows:
            x = self.forward.below(first, window)
            loss = self.forward.loss(first, x, window, self._weights()) / len(windows)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self._parameters.values(), _LONGEST_GRADIENT)
        self._optimizer.step()
        self.step += 1
        return total

    def delta(self, atol: float) -> bytes:
        """What was learnt so far, encoded: see :mod:`blyan_node.model.delta`."""
        with torch.no_grad():
            weights = self._weights()
            return compress_units(
                {
                    unit: {name: weights[unit][name] - base for name, base in self.forward.unit(unit).items()}
                    for unit in weights
                },
                atol,
            )

    def save(self, path: Path) -> None:
        """Write all that a later :meth:`restore` needs, whole or not at all. Raises StoreError."""
        tensors = {"step": torch.tensor(self.step)}
        for name, parameter in self._parameters.items():
            tensors[f"{name}:value"] = parameter.detach()
            tensors |= {f"{name}:{moment}": self._optimizer.state[parameter][moment] for moment in _MOMENTS}
        scratch = path.with_suffix(".tmp")
        try:
            safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, scratch)
            with scratch.open("rb") as file:
                os.fsync(file.fileno())
            scratch.replace(path)
        except (safetensors.SafetensorError, OSError) as error:
            raise StoreError(f"{path} cannot be written: {error}") from error

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint of the same recipe. Raises CheckpointError for one of another."""
        kinds = ("value", *_MOMENTS)
        names = [f"{name}:{kind}" for name in self._parameters for kind in kinds]
        tensors = read_safetensors(path, ("step", *names))
        self.step = int(tensors["step"])
        for name, parameter in self._parameters.items():
            value, *moments = (tensors[f"{name}:{kind}"] for kind in kinds)
            for kind, tensor in zip(kinds, (value, *moments), strict=True):
                check_tensor(f"{path}: {name}:{kind}", tensor, tuple(parameter.shape))
            with torch.no_grad():
                parameter.copy_(value)
            copies = {moment: tensor.clone() for moment, tensor in zip(_MOMENTS, moments, strict=True)}
            self._optimizer.state[parameter] = {"step": torch.tensor(float(self.step))} | copies

    def _weights(self) -> dict[str, Weights]:
        return {unit: learner.weights() for unit, learner in self._learners.items()}


class Evaluation:
    """The mean loss over fixed windows, for several sets of weights that differ from ``layer`` on.

    What reaches that layer is computed once and kept: windows * tokens * hidden float32.
    """

    def __init__(self, forward: Forward, layer: int, windows: Iterable[Window]) -> None:
        self._forward, self._layer = forward, layer
        self._windows = [(forward.below(layer, window), window) for window in windows]

    def losses(self, changed: Mapping[str, Weights]) -> list[float]:
        """Mean loss of each window, in nats per token, with ``changed`` units in place of the model's own."""
        with torch.no_grad():
            return [self._forward.loss(self._layer, x, window, changed).item() for x, window in self._windows]


def updated(
    forward: Forward, blobs: Mapping[str, Path], units: Sequence[str], delta: bytes
) -> dict[str, dict[str, torch.Tensor]]:
    """Apply an encoded delta to the units of a model, each tensor in the dtype in which it is stored.

    Raises RuleError where the delta is not one of these units.
    """
    deltas = decompress_units(delta, forward.spec, units)
    stored = read_units(forward.spec, units, blobs)
    return {unit: apply_delta(stored[unit], deltas[unit]) for unit in units}


def widened(units: Mapping[str, Weights]) -> dict[str, dict[str, torch.Tensor]]:
    """Units as :class:`Forward` computes with them: float32."""
    return {unit: {name: tensor.float() for name, tensor in tensors.items()} for unit, tensors in units.items()}


class _Learner(Protocol):
    parameters: dict[str, torch.Tensor]

    def weights(self) -> Weights:
        """The unit's weights as they are now."""
        ...


class _Full:
    """Every tensor of a unit learns."""

    def __init__(self, base: Weights) -> None:
        self.parameters = {name: weight.detach().clone().requires_grad_() for name, weight in base.items()}

    def weights(self) -> Weights:
        return self.parameters


class _LowRank:
    """The matrices of a unit learn by a product of two thin ones (LoRA: Hu et al., 2021), which starts as zero."""

    def __init__(self, base: Weights, rank: int, source: torch.Generator) -> None:
        self._base = base
        self.parameters: dict[str, torch.Tensor] = {}
        for name, weight in base.items():
            if weight.dim() == 2:
                rows, columns = weight.shape
                self.parameters[f"{name}.in"] = torch.randn(rank, columns, generator=source) / math.sqrt(columns)
                self.parameters[f"{name}.out"] = torch.zeros(rows, rank)
        for parameter in self.parameters.values():
            parameter.requires_grad_()

    def weights(self) -> Weights:
        def learnt(name: str, weight: torch.Tensor) -> torch.Tensor:
            if weight.dim() != 2:
                return weight
            return weight + _LOW_RANK_SCALE * self.parameters[f"{name}.out"] @ self.parameters[f"{name}.in"]

        return {name: learnt(name, weight) for name, weight in self._base.items()}
