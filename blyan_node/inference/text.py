"""Turns drawn tokens into text that is safe to show. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Detokenizer(Protocol):
    """Turns tokens into text one by one; holds back until characters are whole."""

    def push(self, token: int) -> str:
        """Take a token; return the text that is now certain."""
        ...

    def finish(self) -> str:
        """Return what was held back."""
        ...


class TextStream:
    """The text of one generation: whole characters, and nothing of a stop string or of what follows it."""

    def __init__(self, detokenizer: Detokenizer, stop: Sequence[str]) -> None:
        self._detokenizer, self._stop = detokenizer, tuple(text for text in stop if text)
        self._held = ""  # text that may be the beginning of a stop string
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Take a token; return the piece of text that is now safe to show."""
        return self._release(self._detokenizer.push(token))

    def finish(self) -> str:
        """Return what was held back: a stop string that began and never ended."""
        piece = self._release(self._detokenizer.finish())
        held, self._held = self._held, ""
        self.text += held
        return piece + held

    def _release(self, piece: str) -> str:
        if self.stopped:
            return ""
        pending = self._held + piece
        found = [at for stop in self._stop if (at := pending.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            safe = pending[: min(found)]
        else:
            keep = max((_overlap(pending, stop) for stop in self._stop), default=0)
            safe, self._held = pending[: len(pending) - keep], pending[len(pending) - keep :]
        self.text += safe
        return safe


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of ``stop`` that ``text`` ends with."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
