"""The routes that generate: OpenAI's completions and the network's own ``/chat``; and publishing a model."""

from __future__ import annotations

import secrets
import time
from dataclasses import asdict
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from blyan_node.api.auth import Caller
from blyan_node.api.body import read_json
from blyan_node.api.errors import error_body
from blyan_node.api.metering import Meter
from blyan_node.api.requests import include_usage, read_prompt
from blyan_node.api.service import Service
from blyan_node.api.shapes import Shape
from blyan_node.api.streaming import Stream, while_connected
from blyan_node.errors import BlyanError
from blyan_node.inference.generation import Finished, Generate, Hop, Piece, Started

NANO = 10**9


def hops(route: tuple[Hop, ...]) -> list[dict[str, Any]]:
    """A route as JSON."""
    return [asdict(hop) for hop in route]


def _usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def _timing(finished: Finished) -> dict[str, Any]:
    """What this network adds to OpenAI's answers, under ``blyan``."""
    return {
        "route": hops(finished.route),
        "first_token_ms": round(finished.first_token_ms, 3),
        "latency_ms": round(finished.latency_ms, 3),
    }


class Completions:
    """``POST /v1/chat/completions`` or ``/v1/completions``, as the shape says."""

    def __init__(self, meter: Meter, shape: Shape) -> None:
        self._meter, self._shape = meter, shape

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, whole or as a stream."""
        fields = await read_json(scope, receive)
        request, usage, caller = self._shape.read(fields), include_usage(fields), scope["caller"]
        if fields.flag("stream"):
            await while_connected(receive, lambda: self._stream(request, usage, caller, send))
            return
        done = await while_connected(receive, lambda: self._meter.run(request, caller))
        if done is not None:
            await JSONResponse(self._whole(*done))(scope, receive, send)

    async def _stream(self, request: Generate, usage: bool, caller: Caller, send: Send) -> None:
        shape, stream = self._shape, Stream(send, "text/event-stream; charset=utf-8")
        base, text = self._base(shape.chunk), ""
        try:
            async with self._meter.opened(request, caller) as (started, events):
                base["model"] = started.model
                begin = {"route": hops(started.route), "prompt_tokens": started.prompt_tokens}
                await stream.event(base | _choices(shape.first) | {"blyan": begin})
                async for event in events:
                    if isinstance(event, Piece):
                        text += event.text
                        await stream.event(base | _choices(shape.piece(event.text)))
                    elif isinstance(event, Finished):
                        await stream.event(base | _choices(shape.last, event.reason) | {"blyan": _timing(event)})
                        if usage:
                            counts = _usage(event.prompt_tokens, event.completion_tokens)
                            await stream.event(base | {"choices": [], "usage": counts})
                        await stream.done()
        except BlyanError as error:
            if not stream.started:
                raise
            # The status line is gone; what the client has got stands, and it is told so.
            body = error_body(error)
            body["error"]["partial"] = text
            await stream.event(body)
        await stream.close()

    def _whole(self, started: Started, finished: Finished) -> dict[str, Any]:
        return {
            **self._base(self._shape.whole),
            "model": started.model,
            **_choices(self._shape.choice(finished.text), finished.reason),
            "usage": _usage(finished.prompt_tokens, finished.completion_tokens),
            "blyan": _timing(finished),
        }

    def _base(self, kind: str) -> dict[str, Any]:
        return {"id": self._shape.prefix + secrets.token_hex(12), "object": kind, "created": int(time.time())}


def _choices(content: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, **content, "logprobs": None, "finish_reason": reason}]}


class Chat:
    """``POST /chat`` {prompt, max_tokens, …}: text, and what it took."""

    def __init__(self, meter: Meter, price_nano: int) -> None:
        self._meter, self._price_nano = meter, price_nano

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        request = read_prompt(await read_json(scope, receive))
        done = await while_connected(receive, lambda: self._meter.run(request, scope["caller"]))
        if done is not None:
            await JSONResponse(self._answer(*done))(scope, receive, send)

    def _answer(self, started: Started, finished: Finished) -> dict[str, Any]:
        tokens = finished.prompt_tokens + finished.completion_tokens
        cost = tokens * self._price_nano
        return {
            "text": finished.text,
            "tokens_used": tokens,
            "nodes_used": list(dict.fromkeys(hop.peer for hop in finished.route)),
            "latency_ms": round(finished.latency_ms, 3),
            "cost_bly": cost / NANO,
            "cost_nano": cost,
            "model": started.model,
            "route": hops(finished.route),
            "finish_reason": finished.reason,
        }


class ImportModel:
    """``POST /models`` {path, name}: publish a checkpoint that lies on this machine; progress as JSON lines.

    The last line is ``{"published": true}`` or ``{"error": …}``.
    """

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        fields = await read_json(scope, receive)
        path, name = fields.needed_text("path", most=4096), fields.text("name", most=64)
        fields.only("path", "name")
        await while_connected(receive, lambda: self._stream(path, name, send))

    async def _stream(self, path: str, name: str | None, send: Send) -> None:
        stream = Stream(send, "application/x-ndjson")
        try:
            async with self._service.import_model(path, name) as steps:
                async for step in steps:
                    await stream.line(asdict(step))
                await stream.line({"published": True})
        except BlyanError as error:
            if not stream.started:
                raise
            await stream.line(error_body(error))
        await stream.close()


class VerifyModel:
    """``POST /models/verify`` {}: hash the weights on this machine. Answers with the units served, or the error."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        (await read_json(scope, receive)).only()
        units = await self._service.verify()
        await JSONResponse({"verified": list(units)})(scope, receive, send)
