"""How much history a replica keeps: snapshots of the state that new nodes start from, and the bodies of blocks.

Headers, signatures, cuts and certificates are kept for ever: they prove everything that is final, and who wrote two
blocks in one place; and a block may have a parent however old. Bodies are stripped once a snapshot stands for what they
did. Such a chain can be verified from that snapshot on, and proven back to the genesis by its certificates.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

from blyan_node.chain.state import MAX_ROW
from blyan_node.codec import Bound, Size

PAGE = 512 * 1024
"""Bytes of rows in a page of a snapshot, unless one row alone is larger."""
MAX_PAGE_ROWS = 65_536
MAX_PAGES = 2048
"""Pages of the largest snapshot that is taken from a peer: 1 GiB, as a state has to fit into memory."""


@dataclass(frozen=True)
class Page:
    """A part of a snapshot: rows of the state, sorted, and how many pages there are in all."""

    pages: Annotated[int, Bound(MAX_PAGES, 1)]
    rows: Annotated[tuple[Annotated[bytes, Size(MAX_ROW)], ...], Size(MAX_PAGE_ROWS, 1)]


@dataclass(frozen=True)
class Retention:
    """A snapshot is kept of every ``every``-th cut. Bodies of blocks are kept for at least ``bodies`` cuts.

    None keeps all bodies: an archive, which new nodes can verify the whole history with.
    """

    every: int = 8192
    bodies: int | None = 65_536

    def base(self, k: int, snapshots: Iterable[int]) -> int:
        """Return the cut through which bodies may go when ``k`` is final; 0 where none may.

        It is that of a snapshot, since the ledger is verified from there on.
        """
        if self.bodies is None:
            return 0
        return max((each for each in snapshots if each <= k - self.bodies), default=0)

    def outdated(self, k: int, snapshots: Sequence[int], base: int) -> list[int]:
        """Return the snapshots that nobody needs any more; the last two stay, lest a download be cut off."""
        return [each for each in snapshots if each < (k - 2 * self.every if self.bodies is None else base)]


def paged(rows: Sequence[bytes]) -> Iterator[Page]:
    """Cut the sorted rows of a state into pages."""
    parts: list[list[bytes]] = []
    size = PAGE
    for row in rows:
        size += len(row)
        if size > PAGE or len(parts[-1]) == MAX_PAGE_ROWS:
            parts.append([])
            size = len(row)
        parts[-1].append(row)
    for part in parts:
        yield Page(len(parts), tuple(part))
