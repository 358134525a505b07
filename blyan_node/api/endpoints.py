"""What an endpoint is: one row of the table that the router, the guard and the OpenAPI document are made from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

Schema = dict[str, Any]
JSON = "application/json"


@dataclass(frozen=True)
class Parameter:
    """A value in the path (where its name stands in braces) or in the query."""

    name: str
    meaning: str
    schema: Schema
    required: bool = False


@dataclass(frozen=True)
class Endpoint:
    """A method of a path: what answers it, who may ask, how requests are counted, and how it is documented.

    ``scope`` None: no key is needed. ``bucket`` is ``health``, ``read`` or ``chat``, or ``page`` for what is not
    counted; requests to ``generates`` run a generation, so they also count against quotas and concurrency.
    ``answers`` has schemas by media type.
    """

    method: str
    path: str
    app: ASGIApp
    summary: str
    scope: str | None
    answers: dict[str, Schema]
    status: int = 200
    bucket: str = "read"
    generates: bool = False
    parameters: tuple[Parameter, ...] = ()
    body: Schema | None = None
    errors: tuple[int, ...] = field(default=())
    """Statuses besides those that follow from the rest."""


class _ByMethod:
    """An endpoint that answers each method with its own application."""

    def __init__(self, methods: dict[str, ASGIApp]) -> None:
        self._methods = methods

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        if method not in self._methods:
            raise HTTPException(405, headers={"Allow": ", ".join(self._methods)})
        await self._methods[method](scope, receive, send)


def routes(endpoints: Iterable[Endpoint], guard: Callable[[Endpoint], ASGIApp]) -> list[Route]:
    """Routes to all endpoints, each behind its guard; other methods are refused."""
    paths: dict[str, dict[str, ASGIApp]] = {}
    for endpoint in endpoints:
        paths.setdefault(endpoint.path, {})[endpoint.method] = guard(endpoint)
    return [Route(path, endpoint=_ByMethod(methods)) for path, methods in paths.items()]


def plain(respond: Callable[[], object]) -> ASGIApp:
    """An endpoint that answers at once, with a value as JSON."""
    return asked(lambda _request: respond())


def asked(respond: Callable[[Request], object]) -> ASGIApp:
    """The same, where the answer depends on the path or the query."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await JSONResponse(respond(Request(scope)))(scope, receive, send)

    return app
