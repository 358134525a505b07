"""What a stage remembers of the activations that it sent, so that only what was lost is computed again. Pure.

When the stage after it is replaced, the replacement's cache is built from this journal: nobody before the gap computes
anything twice. A journal is a run of consecutive positions up to the newest. All journals of a stage share one budget
of bytes. Where that is exceeded the largest goes, whole: a session without its first positions has to be computed from
the log anyway, so cutting a little off each would soon leave none that is of use.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from itertools import islice

from blyan_node.model.activation import Activation

SHARE = 1 / 16
"""The part of the memory limit that journals may take: what a decoder layer or two take in keys and values."""


@dataclass
class Journal:
    """The activations of positions ``first`` to ``end`` - 1 of one session, in the pieces in which they were sent."""

    first: int = 0
    end: int = 0
    size: int = 0
    _pieces: list[tuple[int, Activation]] = field(default_factory=list)

    def append(self, position: int, rows: Activation) -> None:
        """Remember rows that begin at ``position``; older ones from there on are void, and all where there is a gap."""
        self.truncate(position)
        if position != self.end:
            self.clear(position)
        self._pieces.append((position, rows))
        self.end = position + rows.shape[0]
        self.size += len(rows.data)

    def truncate(self, position: int) -> None:
        """Forget positions from ``position`` on."""
        if position <= self.first:
            self.clear(min(position, self.end))
        while self.end > position:
            start, rows = self._pieces.pop()
            self.size -= len(rows.data)
            self.end = start
            if start < position:
                self.append(start, rows.rows(0, position - start))

    def clear(self, position: int) -> None:
        """Forget all, and go on from ``position``."""
        self._pieces.clear()
        self.first = self.end = position
        self.size = 0

    def read(self, position: int, end: int, most: int) -> Activation | None:
        """Up to ``most`` rows of positions ``position`` to ``end`` - 1; None where the first is not remembered."""
        end = min(end, position + most, self.end)
        if not self.first <= position < end:
            return None
        parts = []
        begin = bisect_right(self._pieces, position, key=_start) - 1
        for start, rows in islice(self._pieces, begin, bisect_left(self._pieces, end, key=_start)):
            parts.append(rows.rows(max(position - start, 0), min(end - start, rows.shape[0])))
        return Activation(parts[0].dtype, (end - position, parts[0].shape[1]), b"".join(part.data for part in parts))


class Journals:
    """The journals of all sessions of a stage, ``limit`` bytes together at most."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._journals: dict[bytes, Journal] = {}
        self.size = 0

    def append(self, session: bytes, position: int, rows: Activation) -> None:
        """Remember what was sent for a session; see :meth:`Journal.append`."""
        journal = self._journals.setdefault(session, Journal(position, position))
        self.size -= journal.size
        journal.append(position, rows)
        self.size += journal.size
        while self.size > self.limit:
            largest = max(self._journals.values(), key=lambda one: one.size)
            self.size -= largest.size
            largest.clear(largest.end)

    def truncate(self, session: bytes, position: int) -> int:
        """Forget what a session sent from ``position`` on; return the first position that is remembered."""
        journal = self._journals.setdefault(session, Journal(position, position))
        self.size -= journal.size
        journal.truncate(position)
        if journal.end < position:
            journal.clear(position)
        self.size += journal.size
        return journal.first

    def read(self, session: bytes, position: int, end: int, most: int) -> Activation | None:
        """See :meth:`Journal.read`."""
        journal = self._journals.get(session)
        return None if journal is None else journal.read(position, end, most)

    def drop(self, session: bytes) -> None:
        """Forget a session."""
        if (journal := self._journals.pop(session, None)) is not None:
            self.size -= journal.size


def _start(piece: tuple[int, Activation]) -> int:
    return piece[0]
