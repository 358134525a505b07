"""The canary hears what holds up the loop, and nothing else."""

from __future__ import annotations

import logging
import time

import pytest
import trio

from blyan_node.canary import ALARM, INTERVAL, Canary


async def test_it_sings_when_the_loop_is_held_up_and_only_then(caplog: pytest.LogCaptureFixture) -> None:
    canary = Canary()
    with caplog.at_level(logging.WARNING):
        async with trio.open_nursery() as nursery:
            await nursery.start(canary.run)
            await trio.sleep(2 * INTERVAL)
            assert not caplog.records
            time.sleep(2 * ALARM)  # noqa: ASYNC251 - blocking the loop is the point
            with trio.fail_after(5):
                while not caplog.records:
                    await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
    assert canary.worst > ALARM
    assert "held up" in caplog.text
