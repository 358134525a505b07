"""How much a swarm bears: the greedy matching against flows that are easy to see, and its bound."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blyan_node.inference.load import Claim, Load, best_rate


def test_a_peer_splits_its_time_over_what_it_holds() -> None:
    one = Claim(0, 3, 8.0)
    assert Load([1.0] * 4, [], one).most(one) == pytest.approx(2.0)


def test_those_that_reach_no_further_go_first() -> None:
    """Unit 1 is reached by both; were the wide one used up on it, unit 2 would starve."""
    wide, narrow = Claim(1, 2, 1.0), Claim(0, 1, 2.0)
    assert Load([1.0] * 3, [wide], narrow).most(narrow) == pytest.approx(1.0)


def test_a_unit_that_nobody_holds_stops_everything() -> None:
    one = Claim(0, 1, 5.0)
    assert Load([1.0] * 3, [], one).most(one) == pytest.approx(0.0, abs=1e-6)


CLAIMS = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(1, 9)).map(
        lambda t: Claim(min(t[:2]), max(t[:2]), float(t[2]))
    ),
    min_size=1,
    max_size=6,
)


@given(CLAIMS, st.lists(st.integers(1, 4), min_size=6, max_size=6))
def test_the_rate_is_what_the_tightest_set_of_units_allows(claims: list[Claim], work: list[int]) -> None:
    """Hall's theorem, over all sets of units; and no placement of these peers passes the bound."""
    sets = [chosen for size in range(1, 7) for chosen in combinations(range(6), size)]
    tightest = min(
        sum(c.speed for c in claims if any(c.first <= unit <= c.last for unit in chosen))
        / sum(work[unit] for unit in chosen)
        for chosen in sets
    )
    load = Load(work, claims[1:], claims[0])
    assert load.most(claims[0]) == pytest.approx(tightest, rel=1e-6, abs=1e-6)
    assert tightest <= load.best * (1 + 1e-9)


def test_a_small_memory_cannot_use_a_great_speed() -> None:
    assert best_rate(10.0, [(100.0, 1.0), (9.0, 10.0)]) == pytest.approx(1.0)
    assert best_rate(10.0, [(5.0, 10.0), (5.0, 10.0)]) == pytest.approx(1.0)
    assert best_rate(10.0, [(5.0, 3.0), (5.0, 3.0), (5.0, 3.0)]) == 0, "they have room for 9 of 10"
