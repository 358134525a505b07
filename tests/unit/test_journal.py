"""The journal of what was sent: whatever the pieces, it gives back the rows of any run of positions that it holds."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from blyan_node.inference.journal import Journal, Journals
from blyan_node.model.activation import Activation

HIDDEN = 2


def rows(*values: int) -> Activation:
    """One row for each value, told apart by it."""
    return Activation("float32", (len(values), HIDDEN), b"".join(bytes([value]) * 4 * HIDDEN for value in values))


def values(read: Activation | None) -> list[int] | None:
    return None if read is None else list(read.data[:: 4 * HIDDEN])


Step = tuple[str, int, int]
STEPS = st.lists(st.tuples(st.sampled_from(["append", "truncate"]), st.integers(0, 30), st.integers(1, 8)), max_size=20)


@given(STEPS, st.integers(0, 40), st.integers(0, 40), st.integers(1, 10))
def test_it_reads_as_a_plain_record_of_rows_would(steps: list[Step], position: int, end: int, most: int) -> None:
    journal, plain, first, stamp = Journal(), dict[int, int](), 0, 0
    for kind, at, count in steps:
        held = first + len(plain)
        if kind == "truncate":
            journal.truncate(at)
            plain = {one: value for one, value in plain.items() if one < at}
            first = min(first, at)
            continue
        fresh = [(stamp := (stamp + 1) % 256) for _ in range(count)]
        journal.append(at, rows(*fresh))
        if at > held:
            plain, first = {}, at
        plain = {one: value for one, value in plain.items() if one < at}
        first = min(first, at)
        plain |= {at + offset: value for offset, value in enumerate(fresh)}
    assert journal.size == 4 * HIDDEN * len(plain)
    assert (journal.first, journal.end) == (first, first + len(plain))
    expected = [plain[one] for one in range(position, min(end, position + most)) if one in plain]
    assert values(journal.read(position, end, most)) == (expected if position in plain and expected else None)


def test_the_largest_goes_whole_when_all_together_are_too_large() -> None:
    journals = Journals(limit=10 * 4 * HIDDEN)
    journals.append(b"large", 0, rows(1, 2, 3, 4, 5, 6))
    journals.append(b"small", 0, rows(1, 2, 3))
    journals.append(b"small", 3, rows(4, 5))
    assert values(journals.read(b"small", 0, 5, 5)) == [1, 2, 3, 4, 5]
    assert journals.read(b"large", 0, 6, 6) is None
    assert journals.size == 5 * 4 * HIDDEN
    assert journals.truncate(b"large", 6) == 6
    journals.append(b"large", 6, rows(7))  # it goes on from where it is, which helps with what is under way
    assert values(journals.read(b"large", 6, 7, 9)) == [7]
    journals.drop(b"small")
    journals.drop(b"large")
    assert journals.size == 0


def test_a_stage_without_room_remembers_nothing() -> None:
    journals = Journals(limit=0)
    journals.append(b"one", 0, rows(1, 2))
    assert journals.size == 0
    assert journals.truncate(b"one", 2) == 2


def test_a_session_that_held_more_than_it_sent_remembers_from_its_end() -> None:
    """A stage that rebuilt its cache from the log has sent nothing of it yet."""
    journals = Journals(limit=1000)
    assert journals.truncate(b"one", 9) == 9
    journals.append(b"one", 9, rows(1))
    assert values(journals.read(b"one", 9, 10, 5)) == [1]
