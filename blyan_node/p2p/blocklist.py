"""The operator's list of blocked peers: a file with one peer id per line, heeded while the node runs.

``#`` begins a comment. A missing file blocks nobody. A line that is no peer id is logged once and skipped; a file
that cannot be read leaves things as they are, for a slip of the editor shall let nobody in.
"""

from __future__ import annotations

import logging
from pathlib import Path

import trio

from blyan_node.errors import CodecError
from blyan_node.p2p.identity import public_key_of
from blyan_node.p2p.peers import Peers
from blyan_node.p2p.transport import PeerId

logger = logging.getLogger(__name__)

LOOK_EVERY = 0.5
"""Seconds between two looks at the file."""

MOST_BYTES = 256 * 1024


class Blocklist:
    """Keeps ``peers`` from those whom the file at ``path`` names."""

    def __init__(self, peers: Peers, path: Path) -> None:
        self._peers, self._path = peers, path
        self._text = self._trouble = ""
        self._bad: frozenset[str] = frozenset()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Heed the file until cancelled; it has been heeded once when this has started."""
        self._look()
        task_status.started()
        while True:
            await trio.sleep(LOOK_EVERY)
            self._look()

    def _look(self) -> None:
        try:
            text, trouble = self._read(), ""
        except (OSError, ValueError) as error:
            text, trouble = self._text, str(error)
        if trouble and trouble != self._trouble:
            logger.warning("%s cannot be read (%s); who was blocked stays so", self._path, trouble)
        self._trouble = trouble
        if text != self._text:
            self._text = text
            blocked = self._parse(text)
            logger.info("%d peers are blocked by %s", len(blocked), self._path)
            self._peers.block(blocked)

    def _read(self) -> str:
        """Return the text of the file, "" where there is none. Raises OSError; ValueError where it is no text."""
        try:
            with self._path.open("rb") as file:
                data = file.read(MOST_BYTES + 1)
        except FileNotFoundError:
            return ""
        if len(data) > MOST_BYTES:
            raise ValueError(f"more than {MOST_BYTES} bytes")
        return data.decode()

    def _parse(self, text: str) -> frozenset[PeerId]:
        """Return who is named; log the lines that name nobody and were not there before."""
        blocked, bad = set(), set()
        for line in text.splitlines():
            peer = line.partition("#")[0].strip()
            try:
                if peer:
                    public_key_of(peer)
                    blocked.add(PeerId(peer))
            except CodecError as error:
                bad.add(peer)
                if peer not in self._bad:
                    logger.warning("%s: the line %.80r is skipped: %s", self._path, peer, error)
        self._bad = frozenset(bad)
        return frozenset(blocked)
