"""Watching training jobs from outside."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import trio


def processes_of(directory: Path) -> list[int]:
    """The processes that train something under a directory."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"blyan_node.learning.train" in words and any(word.startswith(os.fsencode(directory)) for word in words):
            found.append(int(path.parent.name))
    return found


async def until(condition: Callable[[], object], timeout: float) -> None:
    """Wait for a condition."""
    with trio.fail_after(timeout):
        while not condition():
            await trio.sleep(0.02)
