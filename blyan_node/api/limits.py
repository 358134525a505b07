"""How much a caller may ask: exact sliding windows over 60 seconds, and generations at once."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from blyan_node.api.auth import Caller
from blyan_node.api.errors import ApiError

WINDOW_S = 60.0
MAX_CALLERS = 10_000
HEALTH_PER_MINUTE = 100


@dataclass(frozen=True)
class Terms:
    """What the operator grants. ``public_chats_per_minute`` 0: nobody chats without a key. ``price_nano`` is a token's.

    ``concurrent`` is how many generations one caller may have under way.
    """

    requests_per_minute: int = 100
    public_chats_per_minute: int = 0
    concurrent: int = 32
    price_nano: int = 0


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


class Limits:
    """All counts of one API. What is read has a window of its own, so that polling never eats a caller's chats."""

    def __init__(self, terms: Terms) -> None:
        self._terms = terms
        self._windows = {
            "health": SlidingWindow(HEALTH_PER_MINUTE),
            "read": SlidingWindow(terms.requests_per_minute),
            "chat": SlidingWindow(terms.requests_per_minute),
        }
        self._public = SlidingWindow(terms.public_chats_per_minute)
        self._running: Counter[str] = Counter()

    def count(self, bucket: str, caller: Caller, now: float) -> dict[str, str]:
        """Count a request; return the headers that tell what is left. Raises ApiError 429."""
        if bucket == "page" or (bucket == "read" and caller.local):
            return {}  # a page is some files at once; the operator's own commands and page poll
        window = self._public if bucket == "chat" and caller.scopes is None else self._windows[bucket]
        # Whoever asks for health is counted by address: the key must not be needed, so it must not help either.
        name = caller.address if bucket == "health" else caller.name
        wait = window.admit(name, now)
        headers = {
            "x-ratelimit-limit-requests": str(window.limit),
            "x-ratelimit-remaining-requests": str(window.left(name)),
        }
        if wait > 0:
            raise ApiError(
                429,
                "rate_limit_exceeded",
                f"more than {window.limit} requests in a minute; try again in {math.ceil(wait)} s",
                retry_after=wait,
                headers=headers,
            )
        return headers

    @contextmanager
    def running(self, caller: Caller) -> Iterator[None]:
        """Hold one of the caller's generations. Raises ApiError 429 where all are under way."""
        if self._running[caller.name] >= self._terms.concurrent and not caller.local:
            raise ApiError(
                429,
                "too_many_at_once",
                f"{self._terms.concurrent} answers to this caller are under way; wait for one to end",
                retry_after=1,
            )
        self._running[caller.name] += 1
        try:
            yield
        finally:
            self._running[caller.name] -= 1
            if not self._running[caller.name]:
                del self._running[caller.name]
