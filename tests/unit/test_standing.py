"""What challenges did to a peer's name: growing distrust, forgiveness by what is passed afterwards, bounded memory."""

from __future__ import annotations

from blyan_node.inference import standing as module
from blyan_node.inference.standing import DISTRUST_FIRST, DISTRUST_MOST, RECENT, Standing

VERSION = bytes(32)


def until(standing: Standing, peer: str, now: float) -> float:
    """Seconds from now for which a peer is distrusted."""
    low, high = 0.0, 2 * DISTRUST_MOST
    while high - low > 0.5:
        middle = (low + high) / 2
        low, high = (middle, high) if standing.is_distrusted(peer, now + middle) else (low, middle)
    return high


def test_each_failure_doubles_the_time_up_to_a_day() -> None:
    standing, now, spans = Standing(), 0.0, []
    for _ in range(14):
        standing.failed("a", now)
        spans.append(round(until(standing, "a", now)))
        now += spans[-1]
    assert spans[:3] == [DISTRUST_FIRST, 2 * DISTRUST_FIRST, 4 * DISTRUST_FIRST]
    assert spans[-1] == DISTRUST_MOST


def test_passing_takes_one_failure_back_but_only_when_the_time_is_up() -> None:
    standing = Standing()
    standing.failed("a", 0.0)
    standing.failed("a", 0.0)
    standing.passed("a", VERSION, 0, 1, 10.0)
    assert standing.is_distrusted("a", 119.0)
    assert not standing.is_distrusted("a", 121.0)
    standing.passed("a", VERSION, 0, 1, 121.0)
    standing.failed("a", 122.0)
    assert round(until(standing, "a", 122.0)) == 2 * DISTRUST_FIRST, "as after one failure, not after two"


def test_what_was_passed_counts_for_its_units_and_a_while() -> None:
    standing = Standing()
    standing.passed("a", VERSION, 2, 4, 100.0)
    assert [standing.proven("a", VERSION, unit, 101.0) for unit in (1, 2, 4, 5)] == [None, 100.0, 100.0, None]
    assert standing.proven("a", bytes([1] * 32), 2, 101.0) is None
    assert standing.proven("b", VERSION, 2, 101.0) is None
    assert standing.proven("a", VERSION, 2, 101.0 + RECENT) is None
    standing.passed("a", VERSION, 5, 5, 102.0)
    assert standing.proven("a", VERSION, 2, 103.0) == 100.0
    standing.failed("a", 104.0)
    assert standing.proven("a", VERSION, 2, 105.0) is None


def test_one_that_failed_is_challenged_again_just_before_its_time_is_up() -> None:
    standing = Standing()
    standing.failed("a", 0.0)
    assert not standing.may_be_challenged("a", 30.0)
    assert standing.may_be_challenged("a", DISTRUST_FIRST - module.AGAIN)
    assert standing.is_distrusted("a", DISTRUST_FIRST - module.AGAIN)


def test_it_remembers_no_more_peers_than_its_bound(monkeypatch) -> None:
    monkeypatch.setattr(module, "MAX_PEERS", 10)
    standing = Standing()
    for number in range(30):
        standing.passed(f"good {number}", VERSION, 0, 0, float(number))
        standing.failed(f"bad {number}", float(number))
    assert len(standing._passed) == len(standing._failed) == 10
    assert standing.is_distrusted("bad 29", 30.0)
    assert standing.proven("good 29", VERSION, 0, 30.0) is not None
