"""Requests over both networks."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Annotated

import pytest
import trio
import trio.testing

from blyan_node.codec import Size
from blyan_node.errors import ChannelClosed, IntegrityError, PeerTimeout, ProtocolViolation, Refused, Unreachable
from blyan_node.p2p.framing import frame
from blyan_node.p2p.guard import VIOLATION
from blyan_node.p2p.rpc import WAITING_PER_SLOT, Method, call, serve
from blyan_node.p2p.transport import Network, PeerId, Stream
from tests.support.network import KINDS, network_group


@dataclass(frozen=True)
class Ask:
    count: int


@dataclass(frozen=True)
class Answer:
    data: Annotated[bytes, Size(2**21)]


CHUNK = Method("/test/chunk/1", Ask, Answer, max_request=64, max_response=2**21 + 16, timeout=5.0)


@pytest.fixture(params=KINDS)
async def pair(request: pytest.FixtureRequest) -> AsyncIterator[tuple[Network, Network]]:
    async with network_group(2, request.param) as (alice, bob):
        yield alice, bob


async def chunk(_peer: PeerId, ask: Ask) -> Answer:
    return Answer(bytes(ask.count))


def count_faults(network: Network) -> list[int]:
    counted: list[int] = []
    network.penalise = lambda _peer, points, _why: counted.append(points)  # type: ignore[method-assign]
    return counted


async def test_question_and_answer(pair: tuple[Network, Network]) -> None:
    alice, bob = pair
    serve(bob, CHUNK, chunk, concurrency=2)
    for size in (0, 1, 100_000, 2**21):
        assert await call(alice, bob.peer_id, CHUNK, Ask(size)) == Answer(bytes(size))


async def test_many_at_once(pair: tuple[Network, Network]) -> None:
    alice, bob = pair
    serve(bob, CHUNK, chunk, concurrency=8)
    answers = []

    async def ask(size: int) -> None:
        answers.append(len((await call(alice, bob.peer_id, CHUNK, Ask(size))).data))

    async with trio.open_nursery() as nursery:
        for size in range(30):
            nursery.start_soon(ask, size)
    assert sorted(answers) == list(range(30))


async def test_refusals_carry_the_reason(pair: tuple[Network, Network]) -> None:
    alice, bob = pair

    async def refuse(_peer: PeerId, _ask: Ask) -> Answer:
        raise Refused("we do not have it — sorry")

    serve(bob, CHUNK, refuse, concurrency=1)
    with pytest.raises(Refused, match="do not have it — sorry"):
        await call(alice, bob.peer_id, CHUNK, Ask(1))


async def test_an_unserved_method_is_unreachable(pair: tuple[Network, Network]) -> None:
    alice, bob = pair
    with pytest.raises(Unreachable):
        await call(alice, bob.peer_id, CHUNK, Ask(1))


async def test_a_bug_in_the_handler_is_not_the_callers_fault(pair: tuple[Network, Network]) -> None:
    alice, bob = pair
    faults = count_faults(bob)

    async def fail(_peer: PeerId, _ask: Ask) -> Answer:
        raise ZeroDivisionError

    serve(bob, CHUNK, fail, concurrency=1)
    with pytest.raises(ChannelClosed):
        await call(alice, bob.peer_id, CHUNK, Ask(1))
    assert faults == []


async def test_a_question_that_breaks_a_rule_counts(pair: tuple[Network, Network]) -> None:
    alice, bob = pair
    faults = count_faults(bob)

    async def judge(_peer: PeerId, _ask: Ask) -> Answer:
        raise IntegrityError("what they sent is not what the chain says")

    serve(bob, CHUNK, judge, concurrency=1)
    with pytest.raises(ChannelClosed):
        await call(alice, bob.peer_id, CHUNK, Ask(1))
    assert faults == [VIOLATION]


@pytest.mark.parametrize(
    "request_",
    [frame(bytes(65)), frame(b"\xc1"), frame(b"\x91\x01") * 2, b"\0\0\0\x09cut", (2**32 - 1).to_bytes(4, "big")],
    ids=["too large", "not msgpack", "two", "cut off", "four gigabytes"],
)
async def test_a_malformed_question_counts(pair: tuple[Network, Network], request_: bytes) -> None:
    alice, bob = pair
    faults = count_faults(bob)
    serve(bob, CHUNK, chunk, concurrency=1)
    stream = await alice.open_stream(bob.peer_id, CHUNK.protocol)
    await stream.send_all(request_)
    await stream.close_write()
    with trio.fail_after(5), contextlib.suppress(ChannelClosed):
        assert await stream.receive_some(1) == b"", "no answer"
    assert faults == [VIOLATION]
    assert await call(alice, bob.peer_id, CHUNK, Ask(3)) == Answer(bytes(3))


@pytest.mark.parametrize(
    "response",
    [
        frame(b"\x07"),
        frame(b""),
        frame(b"\0\xc1"),
        frame(b"\x01" + bytes(600)),
        b"\xff\xff\xff\xff",
        frame(b"\x01") * 2,
    ],
    ids=["unknown kind", "empty", "not msgpack", "endless reason", "four gigabytes", "two"],
)
async def test_a_malformed_answer_counts(pair: tuple[Network, Network], response: bytes) -> None:
    alice, bob = pair
    faults = count_faults(alice)

    async def misbehave(stream: Stream) -> None:
        while await stream.receive_some(1000):
            pass
        await stream.send_all(response)

    bob.set_handler(CHUNK.protocol, misbehave)
    with pytest.raises(ProtocolViolation):
        await call(alice, bob.peer_id, CHUNK, Ask(1))
    assert faults == [VIOLATION]


async def test_silence_ends_in_a_timeout_at_either_end(autojump_clock: trio.testing.MockClock) -> None:
    async with network_group(2) as (alice, bob):

        async def sleep(_peer: PeerId, _ask: Ask) -> Answer:
            await trio.sleep_forever()
            raise AssertionError

        serve(bob, CHUNK, sleep, concurrency=1)
        with trio.fail_after(CHUNK.timeout + 0.1), pytest.raises(PeerTimeout):
            await call(alice, bob.peer_id, CHUNK, Ask(1))
        mute = await alice.open_stream(bob.peer_id, CHUNK.protocol)
        with trio.fail_after(CHUNK.timeout + 0.1), pytest.raises(ChannelClosed):
            await mute.receive_some(1)


async def test_a_busy_server_refuses_at_once_beyond_its_queue(autojump_clock: trio.testing.MockClock) -> None:
    async with network_group(2) as (alice, bob):
        release = trio.Event()

        async def wait(_peer: PeerId, _ask: Ask) -> Answer:
            await release.wait()
            return Answer(b"")

        serve(bob, replace(CHUNK, timeout=60.0), wait, concurrency=1)
        outcomes: list[str] = []

        async def ask() -> None:
            try:
                await call(alice, bob.peer_id, replace(CHUNK, timeout=60.0), Ask(1))
                outcomes.append("answered")
            except Refused:
                outcomes.append("refused")

        async with trio.open_nursery() as nursery:
            for _ in range(1 + WAITING_PER_SLOT + 3):
                nursery.start_soon(ask)
            await trio.sleep(1)
            assert outcomes == ["refused"] * 3
            release.set()
        assert outcomes.count("answered") == 1 + WAITING_PER_SLOT


async def test_a_cancelled_call_frees_the_stream(pair: tuple[Network, Network]) -> None:
    alice, bob = pair
    began, ended = trio.Event(), trio.Event()

    async def wait(stream: Stream) -> None:
        await stream.send_all((2**29).to_bytes(4, "big"))
        began.set()
        try:
            while True:
                await stream.send_all(b"x")
                await trio.sleep(0.01)
        finally:
            ended.set()

    bob.set_handler(CHUNK.protocol, wait)
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(call, alice, bob.peer_id, replace(CHUNK, max_response=2**30), Ask(1))
            await began.wait()
            nursery.cancel_scope.cancel()
        await ended.wait()
