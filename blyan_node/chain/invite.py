"""Invites: one line of text that names a network and how to reach it.

``blyan1`` and the base64url form, without padding, of::

    [version, network id, name, bootstrap addresses, [k, id] of a final cut | nil] | first 4 bytes of its sha256

The checksum finds typing errors; it proves nothing. Whoever gives the invite is trusted: with the network, and with the
cut, which spares a newcomer from believing validators who have long taken their stake away (weak subjectivity).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from dataclasses import dataclass
from typing import Annotated

from blyan_node.chain.checkpoint import Checkpoint
from blyan_node.chain.records import Hash
from blyan_node.codec import Bound, Size, encode, from_value, to_value, unpack
from blyan_node.errors import CodecError, RequestError

PREFIX = "blyan1"
VERSION = 1
MAX_ADDRESSES = 8
MAX_BYTES = 2560
_CHECKSUM = 4


@dataclass(frozen=True)
class Invite:
    """A network and how to reach it. ``bootstrap`` are full multiaddrs, peer id included."""

    version: Annotated[int, Bound(VERSION, VERSION)]
    network: Hash
    name: Annotated[str, Size(64, 1)]
    bootstrap: Annotated[tuple[Annotated[str, Size(256, 1)], ...], Size(MAX_ADDRESSES, 1)]
    checkpoint: Checkpoint | None

    @classmethod
    def make(
        cls, network: bytes, name: str, bootstrap: tuple[str, ...], checkpoint: Checkpoint | None = None
    ) -> Invite:
        """Make an invite; the first eight addresses are taken. Raises RequestError where a bound is broken."""
        try:
            return from_value(cls, to_value([VERSION, network, name, bootstrap[:MAX_ADDRESSES], checkpoint]))
        except CodecError as error:
            raise RequestError(f"not a usable invite: {error}") from error

    def __str__(self) -> str:
        packed = encode(to_value(self))
        return PREFIX + base64.urlsafe_b64encode(packed + _checksum(packed)).rstrip(b"=").decode()


def parse_invite(text: str) -> Invite:
    """Read an invite; white space, as mail programs put into long lines, is skipped. Raises RequestError."""
    text = "".join(text[: 4 * MAX_BYTES].split())
    body = text.removeprefix(PREFIX)
    if body == text:
        raise RequestError(f"not an invite: those begin with {PREFIX}")
    try:
        raw = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError("the invite is mistyped or cut off: copy it again as a whole") from error
    packed, checksum = raw[:-_CHECKSUM], raw[-_CHECKSUM:]
    if checksum != _checksum(packed):
        raise RequestError("the invite is mistyped or cut off (its checksum differs): copy it again as a whole")
    try:
        invite = unpack(Invite, packed, most=MAX_BYTES)
    except CodecError as error:
        raise RequestError(f"the invite is of another version than this program knows ({error})") from error
    if str(invite) != text:
        raise RequestError("the invite is mistyped: its last character carries bits that belong to nothing")
    return invite


def _checksum(packed: bytes) -> bytes:
    return hashlib.sha256(packed).digest()[:_CHECKSUM]
