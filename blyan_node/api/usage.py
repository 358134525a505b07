"""How many tokens each API key has used today, in UTC; kept over restarts."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from blyan_node.api.errors import ApiError
from blyan_node.api.keys import ApiKey
from blyan_node.datadir import write_whole
from blyan_node.errors import LocalError

DAY_S = 86_400
SAVE_EVERY_S = 5.0
"""A node that is killed forgets at most what was used in this time."""

log = logging.getLogger(__name__)


class Usage:
    """Counts tokens by key. ``now`` is in seconds since 1970; ``path`` is where the counts outlive the process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._day, self._used = _read(path)
        self._saved_at = 0.0
        self._unsaved = False

    def check(self, key: ApiKey, now: float) -> None:
        """Raise ApiError 429 where the key has used up its day. What is under way then is not cut off."""
        self._turn(now)
        if key.tokens_per_day is not None and self._used.get(key.id, 0) >= key.tokens_per_day:
            raise ApiError(
                429,
                "insufficient_quota",
                f"this key's {key.tokens_per_day} tokens of today are used up; the day ends at 0:00 UTC",
                retry_after=DAY_S - now % DAY_S,
            )

    def charge(self, key: ApiKey, tokens: int, now: float) -> None:
        """Count tokens."""
        self._turn(now)
        self._used[key.id] = self._used.get(key.id, 0) + tokens
        self._unsaved = True
        if now - self._saved_at >= SAVE_EVERY_S:
            self._saved_at = now
            self.save()

    def save(self) -> None:
        """Write what has been counted since the last time. A disk that fails is logged: it must not fail answers."""
        if not self._unsaved:
            return
        try:
            write_whole(self._path, json.dumps({"day": self._day, "used": self._used}) + "\n", mode=0o600)
            self._unsaved = False
        except LocalError as error:
            log.error("what API keys used today is not saved: %s", error)

    def _turn(self, now: float) -> None:
        if (day := int(now // DAY_S)) != self._day:
            self._day, self._used = day, {}


def _read(path: Path) -> tuple[int, dict[str, int]]:
    """The counts of before; a file that is absent or damaged costs no more than a day's counts."""
    try:
        stored = json.loads(path.read_bytes())
        return int(stored["day"]), {str(id): int(used) for id, used in stored["used"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return 0, {}
