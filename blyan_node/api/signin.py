"""Signing in with a wallet: nonces, the checks of a signed message, and the tokens that it is exchanged for.

A nonce carries its time and our MAC, so handing one out stores nothing; only nonces that were used are remembered,
until they would expire anyway. All is lost at a restart: a wallet then signs in again.
"""

from __future__ import annotations

import hmac
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from blyan_node.api.body import read_json
from blyan_node.api.errors import ApiError
from blyan_node.api.keys import hash_of
from blyan_node.api.siwe import MAX_MESSAGE, Message, parse, seconds_of, signer_of
from blyan_node.chain.keys import show_address
from blyan_node.errors import Overloaded, SignatureError

NONCE_S = 600
TOKEN_S = 3600
SKEW_S = 60
"""Seconds by which a wallet's clock may be ahead of ours."""
MAX_USED = 10_000
MAX_TOKENS = 10_000


@dataclass
class SignIn:
    """The wallets' door. ``site`` is the origin that messages must name, as configured: ``https://node.example``.

    ``allowed`` are the addresses (EIP-55) that may sign in; None: whoever has one. ``clock`` tells seconds since 1970.
    """

    site: str
    chain_id: int
    allowed: frozenset[str] | None = None
    clock: Callable[[], float] = time.time
    _secret: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)
    _used: OrderedDict[str, float] = field(default_factory=OrderedDict, repr=False)
    _tokens: OrderedDict[str, tuple[str, float]] = field(default_factory=OrderedDict, repr=False)

    def challenge(self) -> dict[str, object]:
        """What a wallet needs to write its message."""
        return {
            "nonce": self.nonce(),
            "domain": urlsplit(self.site).netloc,
            "uri": self.site,
            "chain_id": self.chain_id,
            "expires_in": NONCE_S,
        }

    def nonce(self) -> str:
        """Return a new nonce: letters and digits, good once and for NONCE_S seconds."""
        told = f"{int(self.clock()):010x}{secrets.token_hex(8)}"
        return told + self._mac(told)

    def redeem(self, text: str, signature: str) -> tuple[str, str]:
        """Check a signed message; return a token, good for TOKEN_S seconds, and the wallet's address.

        Raises RequestError where it is no message of EIP-4361; ApiError 401 where it is not good here or now, or was
        signed by another, 403 where this wallet may not sign in; Overloaded.
        """
        message, now = parse(text), self.clock()
        if fault := self._fault(message, now):
            raise ApiError(401, "siwe_refused", fault)
        try:
            signer = show_address(signer_of(text, signature))
        except SignatureError as error:
            raise ApiError(401, "siwe_refused", str(error)) from error
        if signer != message.address:
            raise ApiError(401, "siwe_refused", f"the message was not signed by {message.address}")
        if self.allowed is not None and signer not in self.allowed:
            raise ApiError(403, "wallet_not_allowed", f"{signer} may not sign in here; ask who runs this node")
        self._use(message.nonce, now)
        token = f"siwe_{secrets.token_urlsafe(32)}"
        self._tokens[hash_of(token)] = (signer, now + TOKEN_S)
        if len(self._tokens) > MAX_TOKENS:
            self._tokens.popitem(last=False)
        return token, signer

    def find(self, token: str) -> str | None:
        """Return the address that a token was given to; None if it is unknown or has expired."""
        address, until = self._tokens.get(hash_of(token), ("", 0.0))
        return address if self.clock() < until else None

    def _fault(self, message: Message, now: float) -> str | None:
        """Tell what is wrong with a message here and now."""
        site = urlsplit(self.site)
        if message.domain != site.netloc or message.scheme not in (None, site.scheme):
            return f"the message is for {message.domain}, and this is {site.netloc}"
        if message.uri.rstrip("/") != self.site and not message.uri.startswith(f"{self.site}/"):
            return f"the message's URI {message.uri} is not of {self.site}"
        if message.chain_id != self.chain_id:
            return f"the message is for chain {message.chain_id}, and this node signs in on chain {self.chain_id}"
        if not self._is_good(message.nonce, now):
            return "the nonce is not one of ours, was used, or is too old; get a new one from /auth/nonce"
        issued = seconds_of(message.issued_at)
        if not now - NONCE_S <= issued <= now + SKEW_S:
            return f"the message was issued at {message.issued_at}, which is not now"
        if message.expires is not None and now >= seconds_of(message.expires):
            return f"the message expired at {message.expires}"
        if message.not_before is not None and now + SKEW_S < seconds_of(message.not_before):
            return f"the message is not valid before {message.not_before}"
        return None

    def _is_good(self, nonce: str, now: float) -> bool:
        told, mac = nonce[:26], nonce[26:]
        if not hmac.compare_digest(mac.encode(), self._mac(told).encode()):
            return False
        return nonce not in self._used and now < int(told[:10], 16) + NONCE_S

    def _use(self, nonce: str, now: float) -> None:
        """Remember a nonce as used; those that have expired meanwhile are forgotten."""
        while self._used and next(iter(self._used.values())) <= now:
            self._used.popitem(last=False)
        if len(self._used) >= MAX_USED:
            raise Overloaded("too many wallets sign in; try again in some minutes")
        self._used[nonce] = now + NONCE_S

    def _mac(self, told: str) -> str:
        return hmac.digest(self._secret, told.encode(), "sha256").hex()[:32]


class Redeem:
    """``POST /auth/siwe`` {message, signature}: a token for a signed message."""

    def __init__(self, signin: SignIn) -> None:
        self._signin = signin

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        fields = await read_json(scope, receive)
        fields.only("message", "signature")
        text, signature = fields.needed_text("message", most=MAX_MESSAGE), fields.needed_text("signature", most=132)
        token, address = self._signin.redeem(text, signature)
        answer = {"token": token, "address": address, "expires_in": TOKEN_S, "scopes": ["chat"]}
        await JSONResponse(answer)(scope, receive, send)
