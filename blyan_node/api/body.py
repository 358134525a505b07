"""Reading a request's JSON: bounded before it is read, checked field by field, every fault named."""

from __future__ import annotations

import json
from typing import Any

import trio
from starlette.datastructures import Headers
from starlette.types import Receive, Scope

from blyan_node.api.errors import ApiError
from blyan_node.errors import RequestError

MAX_BODY = 1 << 20
READ_TIMEOUT_S = 30.0


async def read_json(scope: Scope, receive: Receive) -> Fields:
    """Read the body as a JSON object. ApiError: 415 not JSON by type, 413 too large, 408 too slow, 400 malformed."""
    headers = Headers(scope=scope)
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "unsupported_media_type", "send the body as JSON, with Content-Type: application/json")
    length = headers.get("content-length", "0")
    if not length.isdigit() or int(length) > MAX_BODY:
        raise _too_large()
    body = bytearray()
    with trio.move_on_after(READ_TIMEOUT_S) as slow:
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ApiError(400, "disconnected", "the client left before its request was complete")
            body += message.get("body", b"")
            if len(body) > MAX_BODY:
                raise _too_large()
            if not message.get("more_body", False):
                break
    if slow.cancelled_caught:
        raise ApiError(408, "request_timeout", f"the body did not arrive within {READ_TIMEOUT_S:.0f} s")
    try:
        value = json.loads(body, parse_constant=_no_number)
        if b"\\u" in body:
            _check_text(value)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "invalid_json", f"the body is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ApiError(400, "invalid_json", "the body must be a JSON object")
    return Fields(value)


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _check_text(value: Any) -> None:
    """Refuse half a surrogate pair, which JSON can escape and UTF-8 cannot say: it would fail far from here."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError("a string holds half a surrogate pair") from error


def _too_large() -> ApiError:
    return ApiError(413, "body_too_large", f"the body may have at most {MAX_BODY} bytes")


class Fields:
    """The fields of a JSON object. Null counts as absent. Every method raises RequestError naming the field."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = {name: value for name, value in values.items() if value is not None}

    def names(self) -> set[str]:
        """Fields that are present."""
        return set(self._values)

    def only(self, *known: str) -> None:
        """Refuse fields other than these."""
        for name in sorted(self.names() - set(known)):
            raise RequestError(f"the parameter {name} is not known here", param=name)

    def raw(self, name: str) -> Any:
        """A value as it came; None if absent."""
        return self._values.get(name)

    def text(self, name: str, *, most: int) -> str | None:
        """A string of at most ``most`` characters."""
        value = self._values.get(name)
        if value is not None and not isinstance(value, str):
            raise RequestError(f"{name} must be a string", param=name)
        if value is not None and len(value) > most:
            raise RequestError(f"{name} may have at most {most} characters", param=name)
        return value

    def needed_text(self, name: str, *, most: int) -> str:
        """A string that must be there and not be empty."""
        if not (value := self.text(name, most=most)):
            raise RequestError(f"{name} is needed", param=name)
        return value

    def integer(self, name: str, least: int, most: int) -> int | None:
        """A whole number within bounds, inclusive."""
        value = self._values.get(name)
        if type(value) is float and value.is_integer():
            value = int(value)  # JSON knows only numbers: 5.0 is 5, and some clients write it so
        if value is not None and (type(value) is not int or not least <= value <= most):
            raise RequestError(f"{name} must be a whole number from {least} to {most}", param=name)
        return value

    def number(self, name: str, least: float, most: float, default: float) -> float:
        """A number within bounds, inclusive."""
        value = self._values.get(name, default)
        # A comparison with NaN is false, so NaN is refused too.
        if type(value) not in (int, float) or not least <= value <= most:
            raise RequestError(f"{name} must be a number from {least:g} to {most:g}", param=name)
        return float(value)

    def flag(self, name: str) -> bool:
        """A boolean; false if absent."""
        value = self._values.get(name, False)
        if not isinstance(value, bool):
            raise RequestError(f"{name} must be true or false", param=name)
        return value
