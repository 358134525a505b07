"""Whose key a peer has."""

from __future__ import annotations

from functools import lru_cache

from blyan_node.chain.keys import address_of
from blyan_node.errors import RuleError
from blyan_node.p2p.identity import public_key_of
from blyan_node.p2p.transport import PeerId


@lru_cache(maxsize=4096)
def address_of_peer(peer: PeerId) -> bytes | None:
    """Return the address of a peer's key; None where its id is of another kind of key, as libp2p allows."""
    try:
        return address_of(public_key_of(peer))
    except RuleError:
        return None
