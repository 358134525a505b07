"""Answers that take time: cancelled at once when the client leaves, and streamed as events or lines."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import trio
from starlette.types import Receive, Send

from blyan_node.errors import BlyanError

T = TypeVar("T")


async def while_connected(receive: Receive, work: Callable[[], Awaitable[T]]) -> T | None:
    """Run ``work`` and return its result; None if the client left, in which case it was cancelled.

    The request's body must have been read. Errors of ours that ``work`` raises come out as they are.
    """
    results: list[T] = []
    errors: list[BlyanError] = []

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        try:
            results.append(await work())
        except BlyanError as error:
            errors.append(error)
        nursery.cancel_scope.cancel()
    if errors:
        raise errors[0]
    return results[0] if results else None


class Stream:
    """A response whose body is written piece by piece, as server-sent events or as JSON lines."""

    def __init__(self, send: Send, media_type: str) -> None:
        self._send, self._media_type = send, media_type
        self.started = False

    async def _write(self, data: bytes) -> None:
        if not self.started:
            self.started = True
            headers = [
                (b"content-type", self._media_type.encode()),
                (b"cache-control", b"no-store"),
                (b"x-accel-buffering", b"no"),  # a proxy in front must not collect what is meant to flow
            ]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def event(self, value: Any) -> None:
        """Write one server-sent event (WHATWG HTML, section 9.2), whose data is ``value`` as JSON."""
        await self._write(b"data: " + _json(value) + b"\n\n")

    async def done(self) -> None:
        """Write the event with which OpenAI's streams end."""
        await self._write(b"data: [DONE]\n\n")

    async def line(self, value: Any) -> None:
        """Write one line of JSON."""
        await self._write(_json(value) + b"\n")

    async def close(self) -> None:
        """End the response."""
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
