from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blyan_node.errors import RuleError
from blyan_node.model.sampler import sample, uniform

DRAWS = 4000
GOLDEN = (0.288870165724046, 0.5870104946234129)


def frequencies(logits: torch.Tensor, temperature: float, top_p: float) -> dict[int, float]:
    drawn = Counter(sample(logits, temperature, top_p, seed, seed % 7) for seed in range(DRAWS))
    return {token: count / DRAWS for token, count in drawn.items()}


def nucleus(logits: torch.Tensor, temperature: float, top_p: float) -> dict[int, float]:
    """The definition, without its shortcuts."""
    probabilities = torch.softmax(logits.double() / temperature, -1).tolist()
    kept: dict[int, float] = {}
    for token in sorted(range(len(probabilities)), key=lambda token: (-probabilities[token], token)):
        kept[token] = probabilities[token]
        if sum(kept.values()) >= top_p - 1e-12:
            break
    total = sum(kept.values())
    return {token: mass / total for token, mass in kept.items()}


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 0.8), (1.0, 0.3), (0.7, 0.95)])
def test_draws_follow_the_distribution(temperature: float, top_p: float) -> None:
    logits = torch.tensor([2.0, -1.0, 0.5, 1.5, -float("inf"), 0.0, 1.5])
    expected = nucleus(logits, temperature, top_p)
    drawn = frequencies(logits, temperature, top_p)
    assert drawn.keys() <= expected.keys()
    for token, mass in expected.items():
        deviation = math.sqrt(mass * (1 - mass) / DRAWS)
        assert abs(drawn.get(token, 0.0) - mass) <= 5 * deviation + 1e-9


def test_a_large_vocabulary_keeps_exactly_the_nucleus() -> None:
    logits = torch.randn(5000, generator=torch.Generator().manual_seed(1)) * 3
    assert frequencies(logits, 1.0, 0.5).keys() <= nucleus(logits, 1.0, 0.5).keys()


def test_greedy_takes_the_lowest_id_on_a_tie() -> None:
    assert sample(torch.tensor([0.0, 3.0, 3.0, -1.0]), 0.0, 1.0, 0, 0) == 1
    assert sample(torch.zeros(9, dtype=torch.bfloat16), 0.0, 1.0, 0, 0) == 0


@given(
    st.lists(st.floats(-50, 50), min_size=1, max_size=50),
    st.floats(1e-3, 100),
    st.floats(0.01, 1),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**24),
)
def test_any_draw_is_in_the_vocabulary_and_repeats(
    logits: list[float], temperature: float, top_p: float, seed: int, position: int
) -> None:
    values = torch.tensor(logits)
    token = sample(values, temperature, top_p, seed, position)
    assert 0 <= token < len(logits)
    assert token == sample(values, temperature, top_p, seed, position)


def test_a_tiny_temperature_is_greedy() -> None:
    assert sample(torch.tensor([1.0, 1.5, -2.0]), 1e-300, 1.0, 3, 3) == 1


def test_random_numbers_are_the_same_on_every_machine() -> None:
    # Golden: changing these changes what every seed draws.
    assert uniform(0, 0) == GOLDEN[0]
    assert uniform(2**64 - 1, 12345) == GOLDEN[1]


def test_random_numbers_of_neighbours_are_independent() -> None:
    draws = torch.tensor([[uniform(seed, position) for position in range(60)] for seed in range(60)])
    assert abs(draws.mean() - 0.5) < 0.02
    assert abs(torch.corrcoef(torch.stack((draws[:, :-1].flatten(), draws[:, 1:].flatten())))[0, 1]) < 0.06
    assert abs(torch.corrcoef(torch.stack((draws[:-1].flatten(), draws[1:].flatten())))[0, 1]) < 0.06


@pytest.mark.parametrize("logits", [[1.0, float("nan")], [-float("inf")] * 2, [float("inf"), 0.0]])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_are_named(logits: list[float], temperature: float) -> None:
    with pytest.raises(RuleError, match="not finite"):
        sample(torch.tensor(logits), temperature, 1.0, 0, 0)
