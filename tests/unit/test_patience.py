"""How long a session waits for a token, and whom it suspects when none comes."""

from __future__ import annotations

import pytest

from blyan_node.inference.patience import LEAST, STALL, Patience, suspects


@pytest.mark.parametrize(
    ("computed", "late"),
    [
        ([8, 9, 9], 0),
        ([9, 8, 8], 1),
        ([9, 9, 8], 2),
        ([9, None, 8], 1),
        ([None, None, None], 0),
        ([9, 9, 9], 2),  # all done, and no token: the last has not told it
        ([8], 0),
    ],
)
def test_the_first_stage_behind_the_log_is_suspected(computed: list[int | None], late: int) -> None:
    assert suspects(computed, 9, stalls=1) == [late]


def test_where_that_did_not_help_the_one_before_goes_too() -> None:
    assert suspects([9, 8, 8], 9, stalls=2) == [1, 0]
    assert suspects([8, 8, 8], 9, stalls=2) == [0]


def test_the_deadline_follows_what_steps_took() -> None:
    patience = Patience()
    first = patience.prefill(2000)
    assert first == STALL + 100
    patience.took(0.05)
    assert patience.step() == LEAST
    patience.took(1.5)
    patience.took(0.05)
    assert patience.step() == 15
    assert patience.prefill(2000) == 115


def test_stalls_in_a_row_make_it_patient_and_a_token_ends_the_row() -> None:
    patience = Patience()
    patience.took(0.05)
    patience.stalls += 1
    assert patience.step() == 2 * LEAST
    patience.stalls += 5
    assert patience.step() == STALL
    patience.took(0.05)
    assert patience.step() == LEAST


def test_what_stands_in_front_of_a_stage_is_waited_for_within_bounds() -> None:
    patience = Patience()
    assert patience.queue(0) == 0.5
    assert patience.queue(200) == 10.5
    assert patience.queue(10**6) == STALL
