"""Who may ask: host, origin and key checks before anything else is looked at.

No request is trusted for coming from loopback: browsers, other users and reverse proxies come from there too. A web
page can make a browser send requests here; it is stopped by its Origin, or by its Host where its own name was pointed
at us (DNS rebinding), and it never has the key.
"""

from __future__ import annotations

import hmac
import ipaddress
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from blyan_node.api.errors import ApiError, error_response
from blyan_node.api.page import PATHS

PUBLIC = frozenset({("GET", "/health"), ("GET", "/v1/models"), ("HEAD", "/health"), *(("GET", path) for path in PATHS)})


@dataclass(frozen=True)
class Access:
    """The local token, and the names that this API answers to besides ``localhost`` and bare IP addresses."""

    token: str
    names: frozenset[str] = frozenset()

    def check(self, method: str, path: str, headers: Headers) -> str | None:
        """Return the caller's name, None for an anonymous one on a public path; ApiError 401 or 403 for others."""
        host = headers.get("host", "")
        if not self._is_ours(host):
            raise ApiError(
                403, "host_not_allowed", f"this node does not answer to the host name {host!r}; add it to api_names"
            )
        origin = headers.get("origin")
        if (origin is not None and urlsplit(origin).netloc != host) or headers.get("sec-fetch-site") == "cross-site":
            raise ApiError(403, "origin_not_allowed", "requests from other web sites are not allowed")
        key = _presented(headers)
        if key is not None:
            if not hmac.compare_digest(key.encode(), self.token.encode()):
                raise ApiError(401, "invalid_api_key", "the API key is wrong; the local one is in api.token")
            return "local"
        if (method, path) not in PUBLIC:
            raise ApiError(
                401, "missing_api_key", "an API key is needed: send Authorization: Bearer KEY, or X-API-Key: KEY"
            )
        return None

    def _is_ours(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name == "localhost" or name in self.names:
            return True
        try:
            ipaddress.ip_address(name)  # an address is not a name that somebody could point at us
        except ValueError:
            return False
        return True


def _presented(headers: Headers) -> str | None:
    """The key a caller presents, right or wrong; None if there is none."""
    if (key := headers.get("x-api-key")) is not None:
        return key
    if (authorization := headers.get("authorization")) is not None:
        scheme, _, key = authorization.partition(" ")
        return key.strip() if scheme.lower() == "bearer" else ""
    return None


class Authenticate:
    """ASGI middleware: refuses, or puts the caller's name under ``scope["caller"]``, else its address."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check one request."""
        if scope["type"] != "http":
            return  # no web sockets here
        try:
            caller = self._access.check(scope["method"], scope["path"], Headers(scope=scope))
        except ApiError as error:
            await error_response(error)(scope, receive, send)
            return
        scope["address"] = scope["client"][0] if scope.get("client") else "unknown"
        scope["caller"] = caller or scope["address"]
        await self._app(scope, receive, send)
