"""A change that any number of tasks can wait for, without missing one and without a queue."""

from __future__ import annotations

import trio


class Pulse:
    """Counts changes. A waiter says which count it has seen, so a change between two waits is never missed."""

    def __init__(self) -> None:
        self.count = 0
        self._event = trio.Event()

    def beat(self) -> None:
        """Something changed: wake every waiter."""
        self.count += 1
        self._event.set()
        self._event = trio.Event()

    async def after(self, seen: int, *, most: float = float("inf")) -> int:
        """Wait until the count exceeds ``seen``, at most ``most`` seconds; return the count then."""
        with trio.move_on_after(most):
            while self.count <= seen:
                await self._event.wait()
        return self.count
