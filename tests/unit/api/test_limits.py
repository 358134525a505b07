from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from blyan_node.api.limits import MAX_CALLERS, WINDOW_S, SlidingWindow


@given(st.lists(st.integers(0, 30 * 64), max_size=200), st.integers(1, 10))
def test_no_window_ever_holds_more_than_the_limit(gaps: list[int], limit: int) -> None:
    window, now, admitted = SlidingWindow(limit), 0.0, []
    for gap in gaps:
        now += gap / 64  # exact in binary, so the edges of windows are too
        wait = window.admit("a", now)
        if wait == 0:
            admitted.append(now)
        else:
            assert 0 < wait <= WINDOW_S
    for begin in admitted:
        assert sum(begin <= time < begin + WINDOW_S for time in admitted) <= limit


def test_callers_do_not_share_and_are_bounded() -> None:
    window = SlidingWindow(1)
    assert window.admit("a", 0) == 0
    assert window.admit("a", 59) == 1
    assert window.admit("a", 60) == 0
    for number in range(MAX_CALLERS):
        assert window.admit(str(number), 61) == 0
    assert len(window._callers) == MAX_CALLERS
