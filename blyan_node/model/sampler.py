"""Drawing a token from logits, the same on every machine and in every replay.

The random number of a draw is a hash of (seed, position) and nothing else (a counter-based generator, as in Salmon et
al., "Parallel random numbers: as easy as 1, 2, 3", 2011), so a generation that is resumed elsewhere goes on as it would
have done.
"""

from __future__ import annotations

import hashlib
import math
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from blyan_node.errors import RequestError, RuleError


class SamplingParams(Protocol):
    """How to draw: see :func:`check_sampling` for the bounds."""

    @property
    def temperature(self) -> float:
        """Divides the logits; 0 is greedy."""

    @property
    def top_p(self) -> float:
        """The probability mass of the nucleus."""

    @property
    def seed(self) -> int:
        """Unsigned 64-bit."""


def check_sampling(params: SamplingParams) -> None:
    """Raise RequestError unless temperature is in 0..100, top_p in (0, 1] and seed in 64 bits."""
    if not 0 <= params.temperature <= 100:
        raise RequestError(f"temperature {params.temperature} is not in 0..100", param="temperature")
    if not 0 < params.top_p <= 1:
        raise RequestError(f"top_p {params.top_p} is not above 0 and at most 1", param="top_p")
    if not 0 <= params.seed < 1 << 64:
        raise RequestError(f"seed {params.seed} is not an unsigned 64-bit number", param="seed")


def uniform(seed: int, position: int) -> float:
    """The number in [0, 1) that belongs to a seed and a position: the top 53 bits of their SHA-256."""
    digest = hashlib.sha256(b"blyan/sample" + seed.to_bytes(8, "big") + position.to_bytes(8, "big")).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) * 2.0**-53


def sample(logits: torch.Tensor, temperature: float, top_p: float, seed: int, position: int) -> int:
    """Draw a token id from ``logits`` [vocab].

    Temperature 0 takes the greatest logit, the lowest id on a tie. Otherwise the draw is the inverse of the cumulative
    distribution over the nucleus: the fewest most probable tokens that together reach ``top_p`` (Holtzman et al.,
    2020). ``position`` is the one in the sequence that the token will take. Raises RuleError where a logit is NaN or
    all are minus infinity: the weights are broken.
    """
    values: npt.NDArray[np.float64] = logits.to(device="cpu", dtype=torch.float64).numpy()
    best = int(values.argmax())  # the first of equals; the first NaN where there is one
    if not math.isfinite(values[best]):
        raise RuleError("the logits are not finite: the model's weights are broken, verify or import them again")
    if temperature == 0:
        return best
    weights = np.exp((values - values[best]) / temperature)
    ids, masses = _nucleus(weights / weights.sum(), top_p)
    cumulative = np.cumsum(masses)
    drawn = int(np.searchsorted(cumulative, uniform(seed, position) * cumulative[-1], side="right"))
    return int(ids[min(drawn, len(ids) - 1)])


def _nucleus(
    probabilities: npt.NDArray[np.float64], top_p: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Ids and probabilities of the nucleus, most probable first, ties in the order of ids; all where top_p is 1."""
    if top_p >= 1:
        return np.arange(len(probabilities)), probabilities
    # What is dropped sums to less than 1 - top_p, so the nucleus lies in the rest: a few, where a full sort takes 4 ms.
    (ids,) = np.nonzero(probabilities >= (1 - top_p) / len(probabilities))
    ids = ids[np.argsort(-probabilities[ids], kind="stable")]
    masses = probabilities[ids]
    kept = int(np.searchsorted(np.cumsum(masses), top_p, side="left")) + 1
    return ids[:kept], masses[:kept]
