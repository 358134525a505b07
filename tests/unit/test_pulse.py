"""A pulse wakes every waiter, and none misses a beat that came before it waited."""

from __future__ import annotations

import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from blyan_node.pulse import Pulse


async def test_a_beat_before_the_wait_is_not_missed() -> None:
    pulse = Pulse()
    seen = pulse.count
    pulse.beat()
    with trio.fail_after(1):
        assert await pulse.after(seen) == 1


async def test_one_beat_wakes_all_who_wait() -> None:
    pulse, woken = Pulse(), []

    async def wait() -> None:
        woken.append(await pulse.after(0))

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(wait)
        await wait_all_tasks_blocked()
        assert woken == []
        pulse.beat()
        pulse.beat()
    assert woken == [2, 2, 2]


async def test_patience_ends_without_a_beat(autojump_clock: MockClock) -> None:
    pulse, began = Pulse(), trio.current_time()
    assert await pulse.after(0, most=5) == 0
    assert trio.current_time() - began == 5
    assert await pulse.after(0, most=0) == 0


async def test_a_waiter_for_a_later_count_sleeps_through_earlier_beats(autojump_clock: MockClock) -> None:
    pulse = Pulse()
    pulse.beat()
    assert await pulse.after(1, most=1) == 1
