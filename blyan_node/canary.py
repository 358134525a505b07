"""A canary in the event loop: it sings when something held the loop up, which nothing here may do for long.

After ddht's ``canary.py``. Torch, hashing and synced writes belong on the worker lanes; where one of them slips onto
the loop, pings go unanswered and peers think that this node is dead.
"""

from __future__ import annotations

import logging

import trio

log = logging.getLogger(__name__)

INTERVAL = 0.1
ALARM = 0.25  # seconds late


class Canary:
    """Measures how late the loop wakes a task; ``worst`` is the greatest lateness so far, in seconds."""

    def __init__(self) -> None:
        self.worst = 0.0

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen until cancelled."""
        task_status.started()
        while True:
            before = trio.current_time()
            await trio.sleep(INTERVAL)
            late = trio.current_time() - before - INTERVAL
            self.worst = max(self.worst, late)
            if late > ALARM:
                log.warning("the event loop was held up for %.0f ms", 1000 * late)
