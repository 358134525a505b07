"""Errors as HTTP: one body shape for all of them, OpenAI's, so that its clients show our messages."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from blyan_node.errors import (
    BlyanError,
    CheckpointError,
    ConfigError,
    DiskFull,
    GenerationFailed,
    IntegrityError,
    ModelUnavailable,
    Overloaded,
    PeerError,
    RequestError,
    RuleError,
    UnknownModel,
)


class ApiError(BlyanError):
    """An answer other than success, decided by the API itself."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.retry_after = status, code, param, retry_after
        self.headers = headers or {}


# The first class that matches decides: status, code, seconds after which trying again makes sense.
_KINDS: tuple[tuple[type[BlyanError], int, str, float | None], ...] = (
    (UnknownModel, 404, "model_not_found", None),
    (RequestError, 400, "invalid_request", None),
    (CheckpointError, 422, "unusable_checkpoint", None),
    (IntegrityError, 422, "damaged_weights", None),
    (RuleError, 400, "invalid_data", None),
    (ModelUnavailable, 503, "model_unavailable", 5),
    (Overloaded, 503, "overloaded", 1),
    (GenerationFailed, 502, "generation_failed", None),
    (ConfigError, 409, "configuration", None),
    (DiskFull, 507, "disk_full", None),
    (PeerError, 502, "peer_failed", None),
    (BlyanError, 500, "internal_error", None),
)

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def explain(error: BlyanError) -> ApiError:
    """Give any of our errors its status and code."""
    if isinstance(error, ApiError):
        return error
    status, code, retry_after = next((s, c, r) for kind, s, c, r in _KINDS if isinstance(error, kind))
    param = error.param if isinstance(error, RequestError) else None
    return ApiError(status, code, str(error), param=param, retry_after=retry_after)


def error_body(error: BlyanError) -> dict[str, Any]:
    """The JSON of an error; ``partial`` is the text that stands, where a generation had begun."""
    told = explain(error)
    kind = _TYPES.get(told.status, "invalid_request_error" if told.status < 500 else "server_error")
    body = {"message": str(told), "type": kind, "param": told.param, "code": told.code}
    if isinstance(error, GenerationFailed):
        body["partial"] = error.partial
    return {"error": body}


def error_response(error: BlyanError) -> JSONResponse:
    """The whole answer to a request that failed."""
    told = explain(error)
    headers = dict(told.headers)
    if told.retry_after is not None:
        headers["Retry-After"] = str(math.ceil(told.retry_after))
    if told.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(error), status_code=told.status, headers=headers)
