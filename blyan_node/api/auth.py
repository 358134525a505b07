"""Who asks: host, origin and key checks before anything else is looked at.

No request is trusted for coming from loopback: browsers, other users and reverse proxies come from there too. A web
page can make a browser send requests here; it is stopped by its Origin, or by its Host where its own name was pointed
at us (DNS rebinding), and it never has the key.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from blyan_node.api.errors import ApiError, error_response
from blyan_node.api.keys import SCOPES, ApiKey, KeyFile
from blyan_node.api.signin import SignIn

_HOST = re.compile(r"(?:(?P<name>[A-Za-z0-9._-]+)|\[(?P<ip6>[0-9A-Fa-f:.]+)\])(?::[0-9]{1,5})?")
_OWN = frozenset({None, "none", "same-origin"})
"""What a browser tells in Sec-Fetch-Site of requests by its user and by our page; another port is another site."""


@dataclass(frozen=True)
class Caller:
    """Who asks. Requests are counted under ``name``; ``scopes`` None: nobody that we know.

    ``address`` is where it asks from: an IPv4 address, or the /64 that one IPv6 host has to itself.
    """

    name: str
    address: str
    scopes: frozenset[str] | None = None
    key: ApiKey | None = None
    local: bool = False

    def may(self, scope: str) -> bool:
        """Tell whether it may do what needs a scope."""
        return self.scopes is not None and not self.scopes.isdisjoint((scope, "admin"))


@dataclass(frozen=True)
class Access:
    """The ways to be known here: the local token, API keys, wallets.

    ``names`` are those that this API answers to besides ``localhost`` and bare IP addresses.
    """

    token: str
    keys: KeyFile
    signin: SignIn
    names: frozenset[str] = frozenset()

    def identify(self, headers: Headers, client: str) -> Caller:
        """Tell who asks from address ``client``. Raises ApiError 403 for where it comes from, 401 for a wrong key."""
        host = headers.get("host", "")
        if not self._is_ours(host):
            raise ApiError(
                403, "host_not_allowed", f"this node does not answer to the host name {host!r}; add it to api_names"
            )
        origin = headers.get("origin")
        if (origin is not None and not _is_same_site(origin, host)) or headers.get("sec-fetch-site") not in _OWN:
            raise ApiError(403, "origin_not_allowed", "requests from other web sites are not allowed")
        address = _network_of(client)
        presented = _presented(headers)
        if presented is None:
            return Caller(address, address)
        if hmac.compare_digest(presented.encode(errors="replace"), self.token.encode()):
            return Caller("local", address, frozenset(SCOPES), local=True)
        if (key := self.keys.find(presented, time.time())) is not None:
            return Caller(f"key {key.id}", address, frozenset(key.scopes), key)
        if self.signin.find(presented) is not None:
            # Wallets cost nothing to make, so each new one must not bring a new allowance: the address is counted.
            return Caller(address, address, frozenset({"chat"}))
        raise ApiError(
            401, "invalid_api_key", "the API key is wrong, expired or revoked; the local one is in api.token"
        )

    def _is_ours(self, host: str) -> bool:
        if (found := _HOST.fullmatch(host)) is None:
            return False
        name = (found["name"] or found["ip6"]).lower()
        if name == "localhost" or name in self.names:
            return True
        try:
            ipaddress.ip_address(name)  # an address is not a name that somebody could point at us
        except ValueError:
            return False
        return True


def _is_same_site(origin: str, host: str) -> bool:
    try:
        return urlsplit(origin).netloc == host
    except ValueError:
        return False


def _network_of(client: str) -> str:
    try:
        address = ipaddress.ip_address(client)
    except ValueError:
        return client
    if isinstance(address, ipaddress.IPv4Address):
        return client
    return str(address.ipv4_mapped or ipaddress.ip_network((int(address) >> 64 << 64, 64)))


def _presented(headers: Headers) -> str | None:
    """The key a caller presents, right or wrong; None if there is none. Keys that differ are none of them right."""
    keys = set(headers.getlist("x-api-key"))
    for authorization in headers.getlist("authorization"):
        scheme, _, key = authorization.partition(" ")
        keys.add(key.strip() if scheme.lower() == "bearer" else "")
    return (keys.pop() if len(keys) == 1 else "") if keys else None


class Authenticate:
    """ASGI middleware: refuses, or puts the caller under ``scope["caller"]``."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check one request."""
        if scope["type"] != "http":
            return  # no web sockets here
        try:
            client = scope["client"][0] if scope.get("client") else "unknown"
            scope["caller"] = self._access.identify(Headers(scope=scope), client)
        except ApiError as error:
            await error_response(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)
