"""The real lanes: one thread each, which keeps nothing and ends before the program does."""

from __future__ import annotations

import gc
import threading
import time
import weakref

import pytest
import trio

from blyan_node.worker import Thread, open_workers


class Work:
    """Something that a lane is given, and that takes its time to be freed, as large tensors do."""

    def __del__(self) -> None:
        time.sleep(0.05)


async def test_lanes_have_ended_when_the_context_is_left() -> None:
    """A thread that still frees tensors while the interpreter shuts down aborts the process."""
    async with open_workers() as workers:
        for lane in (workers.compute, workers.disk):
            await lane.run(lambda _work: None, Work())
        assert {"compute", "disk"} <= {thread.name for thread in threading.enumerate()}
    assert not {"compute", "disk"} & {thread.name for thread in threading.enumerate()}


async def test_a_lane_keeps_nothing_of_what_it_ran() -> None:
    lane = Thread("kept")
    work = Work()
    gone = threading.Event()
    weakref.finalize(work, gone.set)
    try:
        await lane.run(lambda _work: None, work)
        del work
        gc.collect()
        with trio.fail_after(10):
            while not gone.is_set():
                await trio.sleep(0.01)
    finally:
        lane.close()


async def test_functions_run_in_turn_on_one_thread_and_their_errors_come_back() -> None:
    names: list[str] = []
    async with open_workers() as workers, trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(workers.disk.run, lambda: names.append(threading.current_thread().name))
        with pytest.raises(ZeroDivisionError):
            await workers.compute.run(lambda: 1 // 0)
    assert names == ["disk"] * 5


async def test_a_cancelled_caller_leaves_when_its_function_has_ended() -> None:
    began, ended = threading.Event(), threading.Event()

    def slow() -> None:
        began.set()
        time.sleep(0.1)
        ended.set()

    async with open_workers() as workers:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(workers.compute.run, slow)
                with trio.fail_after(10):
                    while not began.is_set():
                        await trio.sleep(0.001)
                scope.cancel()
        assert ended.is_set()
