"""What the guard makes of exceptions, and how scores decay."""

from __future__ import annotations

import logging

import pytest
import trio

from blyan_node.errors import ChannelClosed, CodecError, Overloaded, ProtocolViolation
from blyan_node.p2p.guard import HALF_LIFE, LIMIT, REFUSED_FOR, VIOLATION, Scores, survive
from blyan_node.p2p.transport import PeerId

MALLORY = PeerId("mallory")


def test_points_decay_and_add_up() -> None:
    now = 0.0
    scores = Scores(lambda: now)
    assert not scores.add(MALLORY, 60)
    now += HALF_LIFE
    assert scores.points(MALLORY) == pytest.approx(30)
    assert not scores.add(MALLORY, LIMIT - 31)
    assert scores.add(MALLORY, 1)
    assert scores.refused(MALLORY)
    assert not scores.add(MALLORY, 1000), "the limit is reached once"
    now += REFUSED_FOR
    assert not scores.refused(MALLORY)
    assert scores.points(MALLORY) == 0


def test_memory_of_faults_is_bounded() -> None:
    scores = Scores(lambda: 0.0)
    for number in range(6000):
        scores.add(PeerId(str(number)), 1)
    scores.add(MALLORY, LIMIT - 1)
    assert scores.add(MALLORY, 1)


class Book:
    def __init__(self) -> None:
        self.points = 0

    def penalise(self, _peer: PeerId, points: int, _reason: str) -> None:
        self.points += points


@pytest.mark.parametrize(
    ("error", "points"),
    [
        (ProtocolViolation("x"), VIOLATION),
        (CodecError("x"), VIOLATION),
        (ChannelClosed("x"), 0),
        (Overloaded("x"), 0),
        (ZeroDivisionError("x"), 0),
        (ExceptionGroup("", [ChannelClosed("x"), ProtocolViolation("y")]), VIOLATION),
        (ExceptionGroup("", [ProtocolViolation("x"), ZeroDivisionError("y")]), VIOLATION),
    ],
)
async def test_only_the_peers_faults_count(error: Exception, points: int, caplog: pytest.LogCaptureFixture) -> None:
    async def fail() -> None:
        raise error

    book = Book()
    with caplog.at_level(logging.ERROR):
        assert not await survive(fail, "work", MALLORY, book.penalise)
    assert book.points == points
    assert ("ZeroDivisionError" in caplog.text) == ("ZeroDivisionError" in repr(error))


async def test_cancellation_passes_even_beside_a_fault() -> None:
    book = Book()

    async def work() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            try:
                await trio.sleep_forever()
            finally:
                raise ProtocolViolation("while being cancelled")

    with trio.move_on_after(0.01) as scope:
        await survive(work, "work", MALLORY, book.penalise)
    assert scope.cancel_called
    assert book.points == VIOLATION
