"""One-shot requests: a fresh stream, one request, one answer.

The caller sends a frame with the packed request and closes its side. The server answers with a frame whose first byte
is 0 (the packed response follows) or 1 (a reason for the refusal follows, UTF-8), and closes.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import trio

from blyan_node.codec import pack, unpack
from blyan_node.errors import CodecError, Overloaded, PeerTimeout, ProtocolViolation, Refused
from blyan_node.p2p.framing import FrameReader, expect, frame
from blyan_node.p2p.guard import VIOLATION, briefly
from blyan_node.p2p.transport import Network, PeerId, Stream

Q = TypeVar("Q")
A = TypeVar("A")

MOST_REASON = 512
"""Longest reason of a refusal, in bytes."""

WAITING_PER_SLOT = 4
"""Requests that may wait for each slot of a server; those beyond are refused at once."""

_ANSWER, _REFUSAL = b"\0", b"\1"


@dataclass(frozen=True)
class Method(Generic[Q, A]):
    """A kind of request.

    It names the dataclasses of request and response, the largest packed size of each in bytes, and the seconds that
    the whole exchange may take.
    """

    protocol: str
    request: type[Q]
    response: type[A]
    max_request: int
    max_response: int
    timeout: float


async def call(network: Network, peer: PeerId, method: Method[Q, A], request: Q) -> A:
    """Ask a neighbour.

    Raises Unreachable, ChannelClosed, PeerTimeout, Refused with the peer's reason, and ProtocolViolation (which is
    also counted against the peer) for an answer that is not one.
    """
    data = pack(request)
    if len(data) > method.max_request:
        raise ValueError(f"a request of {len(data)} bytes; {method.protocol} takes at most {method.max_request}")
    try:
        with trio.fail_after(method.timeout):
            answer = await _exchange(await network.open_stream(peer, method.protocol), data, method.max_response)
        if answer[:1] == _ANSWER:
            return unpack(method.response, memoryview(answer)[1:].tobytes(), most=method.max_response)
        if answer[:1] != _REFUSAL or len(answer) > 1 + MOST_REASON:
            raise ProtocolViolation(f"an answer to {method.protocol} that is neither answer nor refusal")
    except trio.TooSlowError as error:
        raise PeerTimeout(f"{peer} did not answer {method.protocol} within {method.timeout:g} s") from error
    except (ProtocolViolation, CodecError) as error:
        network.penalise(peer, VIOLATION, f"answer to {method.protocol}: {error}")
        raise ProtocolViolation(f"{peer} answered {method.protocol} wrongly: {error}") from error
    raise Refused(answer[1:].decode(errors="replace"))


async def _exchange(stream: Stream, data: bytes, most: int) -> bytes:
    done = False
    try:
        await stream.send_all(frame(data))
        await stream.close_write()
        reader = FrameReader(stream)
        answer = await expect(reader, 1 + max(most, MOST_REASON))
        await reader.end()
        done = True
        return answer
    finally:
        with briefly(1):
            await (stream.aclose() if done else stream.reset())


def serve(
    network: Network,
    method: Method[Q, A],
    handler: Callable[[PeerId, Q], Awaitable[A]],
    *,
    concurrency: int,
) -> None:
    """Answer requests.

    ``handler`` may raise Refused (or Overloaded), whose text goes to the caller; whatever else it raises is judged by
    the handler guard. At most ``concurrency`` requests are worked on at once; WAITING_PER_SLOT times as many wait,
    within the method's timeout, and those beyond are refused. A request that is not one counts against the peer.
    """
    slots = trio.CapacityLimiter(concurrency)
    most_waiting = math.ceil(concurrency * WAITING_PER_SLOT)

    async def answer(peer: PeerId, data: bytes) -> bytes:
        request = unpack(method.request, data, most=method.max_request)
        try:
            if slots.statistics().tasks_waiting >= most_waiting:
                raise Overloaded("too many requests at once; try again later")
            async with slots:
                response = pack(await handler(peer, request))
        except (Refused, Overloaded) as refusal:
            return frame(_REFUSAL, str(refusal).encode()[:MOST_REASON])
        if len(response) > method.max_response:
            raise ValueError(f"a response of {len(response)} bytes; {method.protocol} allows {method.max_response}")
        return frame(_ANSWER, response)

    async def respond(stream: Stream) -> None:
        try:
            with trio.fail_after(method.timeout):
                reader = FrameReader(stream)
                data = await expect(reader, method.max_request)
                await reader.end()
                await stream.send_all(await answer(stream.peer, data))
        except trio.TooSlowError as error:
            raise PeerTimeout(f"{stream.peer} and we took over {method.timeout:g} s for {method.protocol}") from error

    network.set_handler(method.protocol, respond)
