"""The addresses of this network: multiaddrs of one form, ``/ip4/203.0.113.7/tcp/4001/p2p/16Uiu2...``.

The host part may also be ``ip6`` or a name (``dns``, ``dns4``, ``dns6``). See https://multiformats.io/multiaddr/.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from blyan_node.errors import CodecError, ConfigError
from blyan_node.p2p.identity import public_key_of
from blyan_node.p2p.transport import PeerId

MOST_CHARACTERS = 384
"""Longest address that is looked at: a DNS name has at most 253 characters."""

_NAME = re.compile(r"(?=.{1,253}$)([A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?\.?)+")


@dataclass(frozen=True)
class Address:
    """Where a TCP port is, and whose, if that is said. ``kind`` is ip4, ip6, dns, dns4 or dns6."""

    kind: str
    host: str
    port: int
    peer: PeerId | None = None

    def __str__(self) -> str:
        where = f"/{self.kind}/{self.host}/tcp/{self.port}"
        return where if self.peer is None else f"{where}/p2p/{self.peer}"


def parse_address(text: str) -> Address:
    """Parse an address with or without a peer id; raise ConfigError, saying what one looks like."""
    parts = text.split("/")
    if len(text) > MOST_CHARACTERS or len(parts) not in (5, 7) or parts[0] != "" or parts[3] != "tcp":
        raise _unlike(text)
    kind, host, port = parts[1], parts[2], parts[4]
    if not port.isascii() or not port.isdigit() or int(port) > 0xFFFF or not _is_host(kind, host):
        raise _unlike(text)
    if len(parts) == 5:
        return Address(kind, host, int(port))
    if parts[5] != "p2p":
        raise _unlike(text)
    try:
        public_key_of(parts[6])
    except CodecError as error:
        raise ConfigError(f"{text!r} names no peer of this network: {error}") from error
    return Address(kind, host, int(port), PeerId(parts[6]))


def parse_dialable(text: str) -> tuple[Address, PeerId]:
    """Parse an address that says whose it is and has a port; raise ConfigError for any other."""
    address = parse_address(text)
    if address.peer is None or address.port == 0:
        raise _unlike(text)
    return address, address.peer


def _is_host(kind: str, host: str) -> bool:
    if kind in ("dns", "dns4", "dns6"):
        return _NAME.fullmatch(host) is not None
    try:
        return (kind, ipaddress.ip_address(host).version) in (("ip4", 4), ("ip6", 6))
    except ValueError:
        return False


def _unlike(text: str) -> ConfigError:
    shown = text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + "..."
    return ConfigError(f"{shown!r} is not the address of a peer, like /ip4/203.0.113.7/tcp/4001/p2p/16Uiu2...")
