"""What routes are made of: endpoints by method, and plain ones that answer at once."""

from __future__ import annotations

from collections.abc import Callable

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send


class _ByMethod:
    """An endpoint that answers each method with its own application."""

    def __init__(self, methods: dict[str, ASGIApp]) -> None:
        self._methods = methods

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        if method not in self._methods:
            raise HTTPException(405, headers={"Allow": ", ".join(self._methods)})
        await self._methods[method](scope, receive, send)


def route(path: str, **methods: ASGIApp) -> Route:
    """A path, with the application that answers each method; others are refused."""
    return Route(path, endpoint=_ByMethod(methods))


def plain(respond: Callable[[], object]) -> ASGIApp:
    """An endpoint that answers at once, with a value as JSON."""
    return asked(lambda _request: respond())


def asked(respond: Callable[[Request], object]) -> ASGIApp:
    """The same, where the answer depends on the path or the query."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await JSONResponse(respond(Request(scope)))(scope, receive, send)

    return app
