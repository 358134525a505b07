"""A DAG drawn in the terminal, children above their parents, as ``git log --graph`` does. Pure: rows in, lines out.

Every column is a lane that waits for one row further down. A row stands where a lane waited for it, or in a free
column where nobody named it. ``●`` stands above its parents, ``○`` has none. The lane goes on to one parent; where a
row has others, the line below it leads there, and meets only lanes that end in a corner or a tee: ``╮ ╭ ┬`` begin a
lane, ``┤ ├ ┼`` join one. A plain ``│`` in the midst of a line is a lane that passes behind it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_GLYPHS = {
    # (up, down, left, right): what a cell of a connecting line is joined to
    (True, True, False, False): "│",
    (True, True, False, True): "├",
    (True, True, True, False): "┤",
    (True, True, True, True): "┼",
    (True, False, False, True): "╰",
    (True, False, True, False): "╯",
    (True, False, True, True): "┴",
    (False, True, False, True): "╭",
    (False, True, True, False): "╮",
    (False, True, True, True): "┬",
}


@dataclass(frozen=True)
class Row:
    """A point of the graph. ``parents`` that never come as rows are lanes that are open at the bottom."""

    id: str
    parents: tuple[str, ...]
    label: str


@dataclass(frozen=True)
class Rule:
    """A line across all lanes, with a title: it parts the rows above from those below."""

    title: str


def draw(rows: Iterable[Row | Rule]) -> list[str]:
    """Return the lines of a drawing; labels begin in one column.

    Raises ValueError where a row comes twice, or after one of its parents.
    """
    canvas = _Canvas()
    for row in rows:
        if isinstance(row, Rule):
            canvas.rule(row)
        else:
            canvas.add(row)
    width = max((len(line.cells) for line in canvas.lines), default=0)
    return [f"{line.cells.ljust(width, line.fill)} {line.text}".rstrip() for line in canvas.lines]


@dataclass(frozen=True)
class _Line:
    """``cells`` are the lanes, two characters each; ``fill`` goes on from them to the text."""

    cells: str
    text: str = ""
    fill: str = " "


class _Canvas:
    """``lanes`` holds what each column waits for, None where it is free."""

    def __init__(self) -> None:
        self.lines: list[_Line] = []
        self._lanes: list[str | None] = []
        self._seen: set[str] = set()
        self._ended: int | None = None

    def rule(self, rule: Rule) -> None:
        cells = "─".join("─" if lane is None else "│" for lane in self._lanes)
        self.lines.append(_Line(cells, f"── {rule.title} ──", fill="─"))

    def add(self, row: Row) -> None:
        if row.id in self._seen or not self._seen.isdisjoint(row.parents):
            raise ValueError(f"row {row.id} comes twice, or after one of its parents")
        self._seen.add(row.id)
        column = self._lanes.index(row.id) if row.id in self._lanes else self._free(shunned=self._ended)
        self._lanes[column] = None
        before = self._lanes.copy()
        cells = [" " if lane is None else "│" for lane in before]
        cells[column] = "●" if row.parents else "○"
        self.lines.append(_Line(" ".join(cells).rstrip(), row.label))
        targets = {self._lead(parent, column) for parent in row.parents}
        if targets - {column}:
            self._connect(column, targets, before)
        while self._lanes and self._lanes[-1] is None:
            self._lanes.pop()
        # A row without parents leaves its column free; the next row must not stand right below, as if it were one.
        self._ended = None if row.parents else column

    def _free(self, *, shunned: int | None = None) -> int:
        """Return a column that is free, a new one where none is."""
        for column, lane in enumerate(self._lanes):
            if lane is None and column != shunned:
                return column
        self._lanes += [None, None] if len(self._lanes) == shunned else [None]
        return len(self._lanes) - 1

    def _lead(self, parent: str, column: int) -> int:
        """Return the column that waits for a parent, from now on if none did; the row's own one is taken first."""
        if parent in self._lanes:
            return self._lanes.index(parent)
        target = column if self._lanes[column] is None else self._free()
        self._lanes[target] = parent
        return target

    def _connect(self, column: int, targets: set[int], before: Sequence[str | None]) -> None:
        """Draw the line from a row's column to those of its parents."""
        first, last = min(targets | {column}), max(targets | {column})
        cells = ""
        for place, lane in enumerate(self._lanes):
            left, right = first < place <= last, first <= place < last
            if place == column or place in targets:
                up = place == column or (place < len(before) and before[place] is not None)
                cells += _GLYPHS[up, place in targets, left, right]
            else:
                cells += "│" if lane is not None else "─" if left and right else " "
            cells += "─" if right else " "
        self.lines.append(_Line(cells.rstrip()))
