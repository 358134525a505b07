"""The routes of a node's HTTP API, and the layers around them: drain, authenticate, limit, explain errors."""

from __future__ import annotations

import math
from dataclasses import asdict

import trio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from blyan_node.api.auth import Access, Authenticate
from blyan_node.api.chain import chain_routes
from blyan_node.api.endpoints import plain, route
from blyan_node.api.errors import ApiError, error_response
from blyan_node.api.generations import NANO, Chat, ChatCompletions, ImportModel, VerifyModel
from blyan_node.api.limits import SlidingWindow
from blyan_node.api.page import page_routes
from blyan_node.api.requests import MAX_TEXT
from blyan_node.api.service import Service
from blyan_node.errors import BlyanError

HEALTH_PER_MINUTE = 100


def create_app(service: Service, access: Access, *, requests_per_minute: int, price_nano: int) -> ASGIApp:
    """Build the ASGI application over a service. Must run on trio."""
    chats = SlidingWindow(requests_per_minute)
    healths = SlidingWindow(HEALTH_PER_MINUTE)

    def health() -> object:
        why = service.ready()
        return {"live": True, "ready": why is None, "why": why}

    def status() -> object:
        return asdict(service.status())

    def models() -> object:
        listed = [
            {
                "id": model.name,
                "object": "model",
                "created": model.created,
                "owned_by": model.owner,
                "context_length": model.context_length,
                "missing": list(model.missing),
            }
            for model in service.models()
        ]
        return {"object": "list", "data": listed}

    def terms() -> object:
        return {
            "models": [model.name for model in service.models()],
            "price": {"bly_per_token": price_nano / NANO, "nano_per_token": price_nano},
            "limits": {"requests_per_minute": requests_per_minute, "prompt_characters": MAX_TEXT},
        }

    def limited(endpoint: ASGIApp) -> ASGIApp:
        return _Limited(endpoint, chats, "caller")

    routes = [
        route("/health", GET=_Limited(plain(health), healths, "address")),
        route("/status", GET=plain(status)),
        route("/v1/models", GET=plain(models)),
        route("/v1/chat/completions", POST=limited(ChatCompletions(service))),
        route("/chat", GET=plain(terms), POST=limited(Chat(service, price_nano))),
        route("/models", POST=ImportModel(service)),
        route("/models/verify", POST=VerifyModel(service)),
        *chain_routes(service.chain),
        *page_routes(),
    ]
    return Starlette(
        routes=routes,
        middleware=[Middleware(_Drain), Middleware(Authenticate, access=access)],
        exception_handlers={BlyanError: _on_error, HTTPException: _on_http_error, Exception: _on_bug},
    )


class _Limited:
    """Counts requests of one kind, by the value that ``scope`` holds under ``key``."""

    def __init__(self, app: ASGIApp, window: SlidingWindow, key: str) -> None:
        self._app, self._window, self._key = app, window, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        caller = scope[self._key]
        wait = self._window.admit(caller, trio.current_time())
        headers = {
            "x-ratelimit-limit-requests": str(self._window.limit),
            "x-ratelimit-remaining-requests": str(self._window.left(caller)),
        }
        if wait > 0:
            error = ApiError(
                429,
                "rate_limit_exceeded",
                f"more than {self._window.limit} requests in a minute; try again in {math.ceil(wait)} s",
                retry_after=wait,
            )
            await error_response(error, headers)(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
                message = {**message, "headers": [*message["headers"], *pairs]}
            await send(message)

        await self._app(scope, receive, send_with_headers)


class _Drain:
    """Swallows what is left of a body after the answer, so that the connection's reader never waits for us."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        complete = scope["type"] != "http"

        async def watched() -> Message:
            nonlocal complete
            message = await receive()
            complete = complete or message["type"] == "http.disconnect" or not message.get("more_body", False)
            return message

        await self._app(scope, watched, send)
        while not complete:
            await watched()


async def _on_error(_request: Request, error: Exception) -> Response:
    if not isinstance(error, BlyanError):
        raise error
    return error_response(error)


async def _on_http_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    told = {
        404: ApiError(404, "not_found", f"there is no {request.url.path} here"),
        405: ApiError(405, "method_not_allowed", f"{request.method} is not for {request.url.path}"),
    }.get(error.status_code, ApiError(error.status_code, "http_error", error.detail))
    return error_response(told, error.headers)


async def _on_bug(_request: Request, _error: Exception) -> Response:
    # starlette raises it again after this answer, and hypercorn then logs it with its traceback.
    return error_response(ApiError(500, "internal_error", "this node has a bug; its log tells more"))
