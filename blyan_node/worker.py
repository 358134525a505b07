"""The only place that leaves the trio thread.

A compute lane runs torch, one step per hand-over, always on the same thread (so ``inference_mode`` and thread-local
state set up there hold); a disk lane runs synced writes, hashing and database work. Tests inject :class:`Inline`,
because the virtual clock and real threads do not mix.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, ParamSpec, Protocol, TypeVar

import outcome
import trio

P = ParamSpec("P")
R = TypeVar("R")


class Lane(Protocol):
    """Runs functions one after another, away from the event loop."""

    async def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run ``function`` to its end and return its result.

        A cancelled caller leaves only after the function has ended: what it changes is never half done, and nobody
        frees what it is still using.
        """
        ...


class Inline:
    """A lane that runs on the caller's thread: for tests under the virtual clock."""

    async def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run at once, with a checkpoint before, as any lane has."""
        await trio.lowlevel.checkpoint()
        return function(*args, **kwargs)


class Thread:
    """A lane of one dedicated thread. Its queue is bounded by the number of waiting tasks, each of which waits."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            del job  # while waiting for the next one, keep no tensors of this one

    async def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run on the lane's thread; shielded from cancellation while it runs."""
        await trio.lowlevel.checkpoint_if_cancelled()
        task, token = trio.lowlevel.current_task(), trio.lowlevel.current_trio_token()

        def job() -> None:
            result: Any = outcome.capture(function, *args, **kwargs)
            token.run_sync_soon(trio.lowlevel.reschedule, task, result)

        self._jobs.put(job)
        result: R = await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.FAILED)
        return result

    def close(self) -> None:
        """Let the thread end, and wait for it: freeing tensors while the interpreter shuts down would abort it.

        That is short: whoever runs something here has waited for its end.
        """
        self._jobs.put(None)
        self._thread.join()


async def run_apart(function: Callable[[], R]) -> R:
    """Run a long function that touches nothing of ours, such as a download, on a thread of its own.

    A cancelled caller leaves at once, and what the function does then is for nobody.
    """
    return await trio.to_thread.run_sync(function, abandon_on_cancel=True)


@dataclass(frozen=True)
class Workers:
    """The lanes of one node."""

    compute: Lane
    disk: Lane


@asynccontextmanager
async def open_workers() -> AsyncIterator[Workers]:
    """Open the two real lanes; they end when the context does."""
    compute, disk = Thread("compute"), Thread("disk")
    try:
        yield Workers(compute, disk)
    finally:
        compute.close()
        disk.close()
