"""A node's HTTP API: the table of its endpoints, and the layers around them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from blyan_node.api import schemas
from blyan_node.api.auth import Access, Authenticate, Caller
from blyan_node.api.body import MAX_BODY
from blyan_node.api.chain import chain_endpoints
from blyan_node.api.endpoints import JSON, Endpoint, Schema, asked, plain, routes
from blyan_node.api.errors import ApiError, error_response
from blyan_node.api.generations import NANO, Chat, Completions, ImportModel, VerifyModel
from blyan_node.api.guard import Guard
from blyan_node.api.limits import Terms
from blyan_node.api.metering import Meter
from blyan_node.api.metrics import Measured, Metrics
from blyan_node.api.openapi import document
from blyan_node.api.page import page_endpoints
from blyan_node.api.requests import MAX_TEXT
from blyan_node.api.schemas import all_of, schema_of
from blyan_node.api.service import ModelLayers, PeerStatus, Service, Status
from blyan_node.api.shapes import CHAT, TEXT
from blyan_node.api.signin import Redeem
from blyan_node.api.usage import Usage

_EVENTS = "text/event-stream"


def create_app(service: Service, access: Access, terms: Terms, usage: Usage) -> ASGIApp:
    """Build the ASGI application over a service. Must run on trio."""
    metrics = Metrics(service)
    meter = Meter(service, usage, metrics)
    endpoints = [
        *_open_endpoints(service, access),
        *_generating_endpoints(service, meter, terms),
        *_node_endpoints(service, metrics),
        *chain_endpoints(service.chain),
    ]
    described = document([*endpoints, _document_endpoint({})])
    endpoints.append(_document_endpoint(described))
    app = Starlette(
        routes=routes([*endpoints, *page_endpoints()], Guard(terms, usage).before),
        middleware=[
            Middleware(Measured, metrics=metrics),
            Middleware(_NoSniffing),
            Middleware(_Drain),
            Middleware(Authenticate, access=access),
        ],
        exception_handlers={HTTPException: _on_http_error, Exception: _on_bug},
    )
    app.router.redirect_slashes = False  # a redirection would repeat the Host header, which the caller chooses
    return app


def _document_endpoint(described: dict[str, Any]) -> Endpoint:
    return Endpoint("GET", "/openapi.json", plain(lambda: described), "This document", None, {JSON: {"type": "object"}})


def _open_endpoints(service: Service, access: Access) -> tuple[Endpoint, ...]:
    """What needs no key."""

    def health() -> object:
        why = service.ready()
        return {"live": True, "ready": why is None, "why": why}

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

    return (
        Endpoint(
            "GET",
            "/health",
            plain(health),
            "Whether it runs, and can answer",
            None,
            {JSON: schemas.HEALTH},
            bucket="health",
        ),
        Endpoint("GET", "/v1/models", plain(models), "Models of the network", None, {JSON: schemas.MODELS}),
        Endpoint(
            "GET",
            "/auth/nonce",
            plain(access.signin.challenge),
            "What a wallet signs to sign in (EIP-4361)",
            None,
            {JSON: schemas.NONCE},
        ),
        Endpoint(
            "POST",
            "/auth/siwe",
            Redeem(access.signin),
            "A token with scope chat for a message that a wallet has signed",
            None,
            {JSON: schemas.TOKEN},
            body=schemas.SIWE_REQUEST,
            errors=(503,),
        ),
    )


def _generating_endpoints(service: Service, meter: Meter, terms: Terms) -> tuple[Endpoint, ...]:
    def granted(request: Request) -> object:
        caller: Caller = request.scope["caller"]
        return {
            "models": [model.name for model in service.models()],
            "price": {"bly_per_token": terms.price_nano / NANO, "nano_per_token": terms.price_nano},
            "limits": {
                "requests_per_minute": (
                    terms.public_chats_per_minute if caller.scopes is None else terms.requests_per_minute
                ),
                "concurrent": terms.concurrent,
                "prompt_characters": MAX_TEXT,
                "body_bytes": MAX_BODY,
                "tokens_per_day": None if caller.key is None else caller.key.tokens_per_day,
            },
        }

    def generating(path: str, app: ASGIApp, summary: str, body: Schema, **answers: Schema) -> Endpoint:
        media = {JSON: answers["whole"]} | ({_EVENTS: answers["events"]} if "events" in answers else {})
        return Endpoint("POST", path, app, summary, "chat", media, body=body, bucket="chat", generates=True)

    return (
        Endpoint(
            "GET", "/chat", asked(granted), "Models, price and limits for this caller", "chat", {JSON: schemas.TERMS}
        ),
        generating(
            "/chat",
            Chat(meter, terms.price_nano),
            "One question, one answer, and what it took",
            schemas.CHAT_REQUEST,
            whole=schemas.CHAT_ANSWER,
        ),
        generating(
            "/v1/chat/completions",
            Completions(meter, CHAT),
            "OpenAI's chat completions; as events if stream is true",
            schemas.CHAT_COMPLETION_REQUEST,
            whole=schemas.CHAT_COMPLETION,
            events=schemas.EVENT,
        ),
        generating(
            "/v1/completions",
            Completions(meter, TEXT),
            "OpenAI's completions of a text; as events if stream is true",
            schemas.COMPLETION_REQUEST,
            whole=schemas.COMPLETION,
            events=schemas.EVENT,
        ),
    )


def _node_endpoints(service: Service, metrics: Metrics) -> tuple[Endpoint, ...]:
    def listed(items: tuple[PeerStatus, ...] | tuple[ModelLayers, ...]) -> object:
        return {"object": "list", "data": [asdict(item) for item in items]}

    return (
        Endpoint(
            "GET",
            "/status",
            plain(lambda: asdict(service.status())),
            "The state of this node",
            "read",
            {JSON: schema_of(Status)},
        ),
        Endpoint(
            "GET",
            "/peers",
            plain(lambda: listed(service.status().peers)),
            "Peers that this node hears",
            "read",
            {JSON: all_of(schema_of(PeerStatus))},
        ),
        Endpoint(
            "GET",
            "/layers",
            plain(lambda: listed(service.layers())),
            "Coverage: who serves and stores which layers",
            "read",
            {JSON: all_of(schema_of(ModelLayers))},
        ),
        Endpoint(
            "GET",
            "/metrics",
            metrics.app,
            "Metrics for Prometheus",
            "read",
            {"text/plain": schemas.STRING, "application/openmetrics-text": schemas.STRING},
        ),
        Endpoint(
            "POST",
            "/models",
            ImportModel(service),
            "Publish a checkpoint that lies on the node's machine; progress as lines of JSON",
            "admin",
            {"application/x-ndjson": schemas.STRING},
            body=schemas.IMPORT_REQUEST,
            errors=(409, 422, 507),
        ),
        Endpoint(
            "POST",
            "/models/verify",
            VerifyModel(service),
            "Hash the weights that are served here, on disk and in memory",
            "admin",
            {JSON: schemas.VERIFIED},
            body=schemas.VERIFY_REQUEST,
            errors=(422,),
        ),
    )


class _NoSniffing:
    """Tells browsers to take every answer for what it says it is: text of strangers must never become a page."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", ()), (b"x-content-type-options", b"nosniff")]
                message = {**message, "headers": headers}
            await send(message)

        await self._app(scope, receive, told)


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


async def _on_http_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    told = {
        404: ApiError(404, "not_found", f"there is no {request.url.path} here", headers=error.headers),
        405: ApiError(
            405, "method_not_allowed", f"{request.method} is not for {request.url.path}", headers=error.headers
        ),
    }.get(error.status_code, ApiError(error.status_code, "http_error", error.detail, headers=error.headers))
    return error_response(told)


async def _on_bug(_request: Request, _error: Exception) -> Response:
    # starlette raises it again after this answer, and hypercorn then logs it with its traceback.
    return error_response(ApiError(500, "internal_error", "this node has a bug; its log tells more"))
