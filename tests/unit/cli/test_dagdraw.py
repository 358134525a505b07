from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blyan_node.cli.dagdraw import Row, Rule, draw

DOWN = set("│├┤┼╭╮┬●")
UP = set("│├┤┼╰╯┴●○")


def rows_of(*edges: str) -> list[Row]:
    """``"c:a b"`` is a row c with parents a and b."""
    return [Row(id, tuple(parents.split()), id) for id, _, parents in (edge.partition(":") for edge in edges)]


@st.composite
def graphs(draw) -> list[Row]:
    """Any DAG, children first; some parents lie below the end of the list."""
    size = draw(st.integers(0, 14))
    rows = []
    for place in range(size):
        below = list(range(place + 1, size + 4))
        parents = draw(st.lists(st.sampled_from(below), unique=True, max_size=5))
        rows.append(Row(f"n{place}", tuple(f"n{parent}" for parent in parents), f"n{place}"))
    return rows


def read_back(lines: list[str], rows: list[Row]) -> dict[str, set[str]]:
    """Follow the lanes of a drawing and return each row's parents; an open lane leads to ``?``."""
    parents: dict[str, set[str]] = {row.id: set() for row in rows}
    waiting = iter(rows)
    lanes: dict[int, set[str]] = {}  # the children that each column leads down from
    row, column = None, 0
    for line in lines:
        if "●" in line or "○" in line:
            row = next(waiting)
            assert line.endswith(" " + row.label)
            cells = line.removesuffix(row.label).rstrip()
            (column,) = (place for place, cell in enumerate(cells[::2]) if cell in "●○")
            assert set(cells[1::2]) <= {" "}
            assert {place for place, cell in enumerate(cells[::2]) if cell == "│"} == set(lanes) - {column}
            for child in lanes.pop(column, set()):
                parents[child].add(row.id)
            if cells[column * 2] == "●":
                lanes[column] = {row.id}
        elif "── rule ──" in line:
            cells = line.removesuffix(" ── rule ──")
            assert {place for place, cell in enumerate(cells[::2]) if cell == "│"} == set(lanes)
            assert set(cells.replace("│", "─")) <= {"─"}
        else:
            assert row is not None
            cells = line.ljust(2 * column + 1)
            first = last = column
            while cells[2 * first - 1 : 2 * first] == "─":
                first -= 1
            while cells[2 * last + 1 : 2 * last + 2] == "─":
                last += 1
            for place, cell in enumerate(cells[::2]):
                if not first <= place <= last:
                    assert (cell == "│") == (place in lanes)
                    continue
                assert cell != " "
                if cell in "│─" and place != column:
                    assert (cell == "│") == (place in lanes)
                    continue
                assert (cell in UP) == (place in lanes), "a lane from above ends at nothing"
                if place == column:
                    lanes.pop(place)
                if cell in DOWN:
                    lanes.setdefault(place, set()).add(row.id)
    assert next(waiting, None) is None
    for children in lanes.values():
        for child in children:
            parents[child].add("?")
    return parents


def expected(rows: list[Row]) -> dict[str, set[str]]:
    shown = {row.id for row in rows}
    return {row.id: {parent if parent in shown else "?" for parent in row.parents} for row in rows}


@given(graphs(), st.sets(st.integers(0, 14)))
def test_every_edge_is_drawn_and_no_other(rows, ruled):
    given = [part for place, row in enumerate(rows) for part in ([Rule("rule"), row] if place in ruled else [row])]
    assert read_back(draw(given), rows) == expected(rows)


@given(graphs())
def test_one_line_for_each_row_and_at_most_one_more(rows):
    lines = draw(rows)
    assert len(lines) <= 2 * len(rows)
    assert len({line.rindex(" n") for line in lines if " n" in line}) <= 1, "labels begin in one column"
    assert all(line == line.rstrip() for line in lines)


def test_how_it_looks():
    rows = rows_of("f:d e", "e:b c", "d:a b", "c:a", "b:a", "a:")
    assert draw([*rows[:3], Rule("cut 1"), *rows[3:]]) == [
        "●     f",
        "├─╮",
        "│ ●   e",
        "│ ├─╮",
        "● │ │ d",
        "├─┤ │",
        "│─│─│ ── cut 1 ──",
        "│ │ ● c",
        "├─│─╯",
        "│ ●   b",
        "├─╯",
        "○     a",
    ]


def test_a_line_passes_behind_lanes_that_it_does_not_join():
    assert draw(rows_of("x:a", "y:b", "z:a", "b:", "a:")) == [
        "●     x",
        "│ ●   y",
        "│ │ ● z",
        "├─│─╯",
        "│ ○   b",
        "○     a",
    ]


def test_rows_that_are_not_joined_do_not_stand_on_each_other():
    assert draw(rows_of("b:", "a:")) == ["○   b", "  ○ a"]


def test_nothing_is_drawn_as_nothing():
    assert draw([]) == []


@pytest.mark.parametrize("rows", [("a:", "b:a"), ("a:", "a:")])
def test_an_order_that_cannot_be_drawn_is_told(rows):
    with pytest.raises(ValueError, match="comes twice, or after"):
        draw(rows_of(*rows))
