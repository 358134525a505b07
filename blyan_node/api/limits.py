"""Exact sliding windows: no more than so many requests of one caller in any 60 seconds."""

from __future__ import annotations

from collections import OrderedDict, deque

WINDOW_S = 60.0
MAX_CALLERS = 10_000


class SlidingWindow:
    """Remembers when each caller's latest ``limit`` requests came.

    At most ``MAX_CALLERS`` callers are remembered; beyond, the one longest unseen is forgotten (so, forgiven).
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._callers: OrderedDict[str, deque[float]] = OrderedDict()

    def admit(self, caller: str, now: float) -> float:
        """Count a request and return 0, or refuse it and return the seconds after which one will be admitted."""
        times = self._callers.setdefault(caller, deque())
        self._callers.move_to_end(caller)
        if len(self._callers) > MAX_CALLERS:
            self._callers.popitem(last=False)
        while times and times[0] <= now - WINDOW_S:
            times.popleft()
        if len(times) >= self.limit:
            return times[0] + WINDOW_S - now
        times.append(now)
        return 0

    def left(self, caller: str) -> int:
        """How many requests the caller may make now, by the last count."""
        return self.limit - len(self._callers.get(caller, ()))
