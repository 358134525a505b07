"""Blocks: header, signature and body, and their canonical encoding.

::

    block  = [header bytes, signature (65), body bytes]
    header = [version, network, chain, type, author, seq, prev | nil, parents, height, [k, cut id],
              timestamp_ms, body_hash, body_len]
    body   = [record, ...]
    id     = sha256(header bytes)

The signature is over a digest of the header with a domain of its own and stands outside it, so it cannot change the
id. Header and body travel as bytes inside the block: their hashes are taken over exactly what was received.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

from blyan_node.chain.keys import Key, digest
from blyan_node.chain.records import Address, Hash, Record, Signature
from blyan_node.codec import Size, encode, from_value, pack, to_value, unpack
from blyan_node.codec import decode as decode_value
from blyan_node.errors import CodecError, RuleError

VERSION = 1
BLOCK_DOMAIN = b"blyan/block/1"
CHAINS = ("A", "B", "T")
MAX_PARENTS = 16
MAX_RECORDS = 256
MAX_HEADER = 4 * 1024
MAX_BODY = 256 * 1024
EMPTY_BODY = encode([])
_NO_BODY = encode(b"")
MAX_BLOCK = MAX_HEADER + MAX_BODY + 128
"""Bytes of an encoded block: its parts, the signature and the framing."""


@dataclass(frozen=True)
class Anchor:
    """The last final cut that the author knew: its number and id. Cut 0 is the genesis, by the network's id."""

    k: int
    cut: Hash


@dataclass(frozen=True)
class Header:
    """What is hashed and signed. ``timestamp_ms`` is advisory: no rule reads it.

    ``seq`` counts the author's blocks from 0; ``prev`` is the author's block before this one, None for the first.
    ``height`` is 1 + the greatest height of a parent; the genesis has height 0.
    """

    version: int
    network: Hash
    chain: Annotated[str, Size(1, 1)]
    type: Annotated[str, Size(32, 1)]
    author: Address
    seq: int
    prev: Hash | None
    parents: Annotated[tuple[Hash, ...], Size(MAX_PARENTS, 1)]
    height: int
    anchor: Anchor
    timestamp_ms: int
    body_hash: Hash
    body_len: int

    @property
    def carries(self) -> bool:
        """Whether the block carries records; one without acknowledges."""
        return self.body_len > len(EMPTY_BODY)


@dataclass(frozen=True)
class _Envelope:
    header: Annotated[bytes, Size(MAX_HEADER)]
    signature: Signature
    body: Annotated[bytes, Size(MAX_BODY)]


@dataclass(frozen=True)
class Block:
    """A block as received or written: its parts as bytes, and what they decode to."""

    raw: bytes
    header_bytes: bytes
    signature: bytes
    body: bytes
    header: Header
    records: tuple[Record, ...]

    @cached_property
    def id(self) -> bytes:
        """sha256 of the header's bytes; shown as 64 hex digits."""
        return hashlib.sha256(self.header_bytes).digest()

    @property
    def is_stripped(self) -> bool:
        """Whether its body was pruned: the records that it had are not known here any more."""
        return not self.body

    @property
    def type(self) -> str:
        """What the author calls the block: ``manifest``, ``layer``, ``delta``, …; for people and filters, not rules."""
        return self.header.type

    @property
    def chain(self) -> str:
        """A, B or T."""
        return self.header.chain

    @property
    def height(self) -> int:
        """Distance from the genesis."""
        return self.header.height

    def calculate_hash(self) -> str:
        """Return the id as 64 hex digits."""
        return self.id.hex()


def decode_block(raw: bytes) -> Block:
    """Decode a block; checks encoding, types and sizes only. Raises CodecError."""
    block = decode_stored(raw)
    if block.is_stripped:
        raise CodecError("a block without its body")
    return block


def decode_stored(raw: bytes) -> Block:
    """Decode a block that may have been stripped of its body; it has no records then. Raises CodecError."""
    envelope = unpack(_Envelope, raw, most=MAX_BLOCK)
    header = unpack(Header, envelope.header, most=MAX_HEADER)
    records = decode_body(envelope.body) if envelope.body else ()
    return Block(raw, envelope.header, envelope.signature, envelope.body, header, records)


def strip(raw: bytes) -> bytes:
    """Return an encoded block without its body: what is left when it is pruned. Its id stays. Raises CodecError."""
    envelope = unpack(_Envelope, raw, most=MAX_BLOCK)
    return encode([envelope.header, envelope.signature, b""])


def is_stripped(raw: bytes) -> bool:
    """Tell whether an encoded block has lost its body. Raises CodecError."""
    return raw.endswith(_NO_BODY) and not unpack(_Envelope, raw, most=MAX_BLOCK).body


def peek_id(raw: bytes) -> bytes:
    """Return the id of an encoded block without decoding its header and body. Raises CodecError."""
    return hashlib.sha256(unpack(_Envelope, raw, most=MAX_BLOCK).header).digest()


def peek_header(raw: bytes) -> tuple[bytes, Header, bytes]:
    """Return id and header of an encoded block, and its body, which is not decoded. Raises CodecError."""
    envelope = unpack(_Envelope, raw, most=MAX_BLOCK)
    header = unpack(Header, envelope.header, most=MAX_HEADER)
    return hashlib.sha256(envelope.header).digest(), header, envelope.body


def encode_body(records: tuple[Record, ...]) -> bytes:
    """Encode the records of a block."""
    return encode(to_value(records))


def decode_body(body: bytes) -> tuple[Record, ...]:
    """Decode the records of a block, at most MAX_RECORDS. Raises CodecError."""
    return from_value(_Records, [decode_value(body, most=MAX_BODY)]).records


@dataclass(frozen=True)
class _Records:
    records: Annotated[tuple[Record, ...], Size(MAX_RECORDS)]


def make_block(
    key: Key,
    network: bytes,
    records: tuple[Record, ...],
    *,
    chain: str,
    type: str,
    seq: int,
    prev: bytes | None,
    parents: tuple[bytes, ...],
    height: int,
    anchor: Anchor,
    timestamp_ms: int,
) -> Block:
    """Write and sign a block. Raises RuleError where it would be too large; other rules are the caller's."""
    body = encode_body(records)
    if len(body) > MAX_BODY or len(records) > MAX_RECORDS:
        raise RuleError(f"a block holds at most {MAX_RECORDS} records in {MAX_BODY} bytes; write several blocks")
    header = Header(
        version=VERSION,
        network=network,
        chain=chain,
        type=type,
        author=key.address,
        seq=seq,
        prev=prev,
        parents=tuple(sorted(parents)),
        height=height,
        anchor=anchor,
        timestamp_ms=timestamp_ms,
        body_hash=hashlib.sha256(body).digest(),
        body_len=len(body),
    )
    return seal(key, header, body)


def seal(key: Key, header: Header, body: bytes) -> Block:
    """Sign a header and put the block together. Raises CodecError where a bound is broken."""
    header_bytes = pack(header)
    raw = encode([header_bytes, key.sign(digest(BLOCK_DOMAIN, header_bytes)), body])
    return decode_block(raw)
