"""What has to be sent again after a loss: every stage gets just what it lacks, from whoever remembers it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from blyan_node.inference.recovery import Standing, Task, share_out

NEW = Standing()


def survivor(held: int, journal: int = 0) -> Standing:
    return Standing(held, journal)


def test_a_new_route_computes_all_and_remembers_nothing() -> None:
    assert share_out([NEW, NEW, NEW]) == (Task(0, 0), Task(0, 0), Task(0, 0))


def test_a_lost_middle_stage_is_fed_from_the_journal_before_it() -> None:
    assert share_out([survivor(99), NEW, survivor(99)]) == (Task(99, 0), Task(0, 99), Task(99, 99))


def test_a_lost_first_stage_is_fed_by_the_entry_and_sends_on_only_what_is_new() -> None:
    assert share_out([NEW, survivor(99), survivor(99)]) == (Task(0, 99), Task(99, 99), Task(99, 99))


def test_a_lost_last_stage_is_fed_from_the_journal() -> None:
    assert share_out([survivor(99), survivor(99), NEW]) == (Task(99, 99), Task(99, 0), Task(0, 0))


def test_a_journal_that_does_not_reach_makes_its_stage_and_those_before_it_start_again() -> None:
    standings = [survivor(99, 40), survivor(99, 40), NEW, survivor(99, 40)]
    assert share_out(standings) == (Task(0, 0), Task(0, 0), Task(0, 99), Task(99, 99))
    reaches = [survivor(99), survivor(99, 40), NEW, survivor(99, 40)]
    assert share_out(reaches) == (Task(99, 0), Task(0, 0), Task(0, 99), Task(99, 99))


def test_in_the_middle_of_a_prompt_what_was_under_way_is_sent_again() -> None:
    standings = [survivor(512), survivor(256), NEW, survivor(64)]
    assert share_out(standings) == (Task(512, 256), Task(256, 0), Task(0, 64), Task(64, 64))


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=6))
def test_every_stage_gets_exactly_the_positions_that_it_lacks(drawn: list[tuple[int, int]]) -> None:
    """Play it: each stage sends what it remembers and computes; the next must find no gap and nothing twice."""
    log = 50
    standings = [Standing(held, min(held, journal)) for held, journal in drawn]
    tasks = share_out(standings)
    arriving = list(range(tasks[0].keep, log))
    for standing, task in zip(standings, tasks, strict=True):
        assert task.keep <= standing.held
        assert arriving == list(range(task.keep, log))
        resent = list(range(task.send_from, task.keep))
        assert not resent or standing.journal <= task.send_from
        arriving = resent + [position for position in arriving if position >= task.send_from]
