"""Peer ids, computed without importing libp2p.

A peer id is the multihash of the protobuf-encoded public key; keys of at most 42 bytes, as ours, are hashed with the
identity function, so a peer id carries the public key (libp2p specs, ``peer-ids/peer-ids.md``).
"""

from __future__ import annotations

from blyan_node.errors import CodecError
from blyan_node.p2p.transport import PeerId

PUBLIC_KEY_BYTES = 33
"""Length of a compressed secp256k1 point (SEC 1, 2.3.3)."""

MOST_ID_CHARACTERS = 64
"""Longest text that is looked at as a peer id; ours have 53 characters."""

# identity multihash (code 0, 37 bytes) of PublicKey{Type: 2 (Secp256k1), Data: 33 bytes}
_PREFIX = bytes([0x00, 37, 0x08, 0x02, 0x12, PUBLIC_KEY_BYTES])
_ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_DIGITS = {character: value for value, character in enumerate(_ALPHABET)}


def peer_id_of(public: bytes) -> PeerId:
    """Return the peer id of a compressed secp256k1 public key of 33 bytes; raise CodecError for other bytes."""
    if len(public) != PUBLIC_KEY_BYTES or public[0] not in (2, 3):
        raise CodecError("a node's public key is a compressed secp256k1 point of 33 bytes")
    return PeerId(_base58(_PREFIX + public))


def public_key_of(peer: str) -> bytes:
    """Return the 33-byte public key inside a peer id; raise CodecError where it is not one of ours."""
    if len(peer) > MOST_ID_CHARACTERS:
        raise CodecError("a peer id is at most 64 characters long")
    value = 0
    for character in peer:
        if character not in _DIGITS:
            raise CodecError(f"{character!r} cannot be part of a peer id (base58)")
        value = value * 58 + _DIGITS[character]
    zeros = len(peer) - len(peer.lstrip(_ALPHABET[0]))
    data = bytes(zeros) + value.to_bytes((value.bit_length() + 7) // 8, "big")
    public = data[len(_PREFIX) :]
    if not data.startswith(_PREFIX) or len(public) != PUBLIC_KEY_BYTES or public[0] not in (2, 3):
        raise CodecError("not the peer id of a secp256k1 key; ours begin with 16Uiu2")
    return public


def _base58(data: bytes) -> str:
    """Encode as Bitcoin does: big-endian, leading zero bytes as leading ones."""
    zeros = len(data) - len(data.lstrip(b"\0"))
    value, digits = int.from_bytes(data, "big"), []
    while value:
        value, digit = divmod(value, 58)
        digits.append(_ALPHABET[digit])
    return _ALPHABET[0] * zeros + "".join(reversed(digits))
