"""What stands before every endpoint: may this caller do that, now, and how much is left."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import nullcontext

import trio
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from blyan_node.api.auth import Caller
from blyan_node.api.endpoints import Endpoint
from blyan_node.api.errors import ApiError, error_response
from blyan_node.api.limits import Limits, Terms
from blyan_node.api.usage import Usage
from blyan_node.errors import BlyanError


class Guard:
    """Makes endpoints into applications that are asked only by those who may."""

    def __init__(self, terms: Terms, usage: Usage) -> None:
        self._terms, self._limits, self._usage = terms, Limits(terms), usage

    def before(self, endpoint: Endpoint) -> ASGIApp:
        """Return the endpoint's application behind all checks; errors of ours become answers."""

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            answer = _Answer(send)
            caller: Caller = scope["caller"]
            scope["blyan.path"] = endpoint.path
            try:
                self._authorise(endpoint, caller)
                answer.headers = self._limits.count(endpoint.bucket, caller, trio.current_time())
                if endpoint.generates and caller.key is not None:
                    self._usage.check(caller.key, time.time())
                with self._limits.running(caller) if endpoint.generates else nullcontext():
                    await endpoint.app(scope, receive, answer.send)
            except BlyanError as error:
                if answer.started:
                    raise
                await error_response(error)(scope, receive, answer.send)

        return app

    def _authorise(self, endpoint: Endpoint, caller: Caller) -> None:
        needed = endpoint.scope
        if needed is None or caller.may(needed):
            return
        if caller.scopes is not None:
            raise ApiError(403, "missing_scope", f"this needs a key with scope {needed}; this one has not got it")
        if needed != "chat" or self._terms.public_chats_per_minute == 0:
            raise ApiError(
                401, "missing_api_key", "an API key is needed: send Authorization: Bearer KEY, or X-API-Key: KEY"
            )


class _Answer:
    """Sends an answer with more headers."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = False
        self.headers: Mapping[str, str] = {}

    async def send(self, message: Message) -> None:
        """Send a part."""
        if message["type"] == "http.response.start":
            self.started = True
            pairs = [(name.encode(), value.encode()) for name, value in self.headers.items()]
            message = {**message, "headers": [*message.get("headers", ()), *pairs]}
        await self._send(message)
