"""Records: what anyone may put on the chain, signed by its originator and carried in a block by a bonded author.

A record is the canonical array ``[network, kind, sender, nonce, fee, expires_at_cut, arguments, signature]``. Its
unsigned form, the first seven fields, gives its id (sha256) and what is signed (a digest of its own domain), so the
signature cannot change the id. ``arguments`` are opaque bytes here: each kind has a typed form, and a record whose
arguments do not parse, or whose kind is unknown, is void; it never makes its block invalid.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

from blyan_node.chain.keys import Key, digest, recover_address
from blyan_node.codec import MAX_INT, Bound, Size, encode, exactly, pack, to_value, unpack
from blyan_node.errors import CodecError, RuleError, SignatureError

RECORD_DOMAIN = b"blyan/record/1"
MAX_ARGUMENTS = 128 * 1024
MAX_BLOB = 1 << 40
MAX_BEACON = 256

Hash = Annotated[bytes, exactly(32)]
Address = Annotated[bytes, exactly(20)]
Signature = Annotated[bytes, exactly(65)]
MAX_MONEY = 10**18
Amount = Annotated[int, Bound(MAX_MONEY, 1)]
"""Nano-BLY. All the money that there can be is MAX_MONEY."""


@dataclass(frozen=True)
class BlobRef:
    """A content-addressed blob: the Merkle root over its 1 MiB chunks, and its size in bytes."""

    root: Hash
    size: Annotated[int, Bound(MAX_BLOB)]


@dataclass(frozen=True)
class Manifest:
    """A model is published. The id of the record that carries this is the id of the model; its sender owns it.

    ``spec`` is the JSON form of the model's spec, ``units`` names the parts that hold its weights, in order.
    """

    name: Annotated[str, Size(128, 1)]
    spec: Annotated[bytes, Size(8 * 1024)]
    units: Annotated[tuple[Annotated[str, Size(64, 1)], ...], Size(1024, 1)]
    tokenizer: BlobRef


@dataclass(frozen=True)
class Layer:
    """The weights of one unit of a model. ``unit`` is an index into the manifest's units.

    ``beacon`` sums up what the unit makes of an input drawn from the blob's root; empty: its publisher does not say.
    """

    model: Hash
    unit: Annotated[int, Bound(1023)]
    blob: BlobRef
    beacon: Annotated[bytes, Size(MAX_BEACON)] = b""


@dataclass(frozen=True)
class Transfer:
    """The sender pays ``payee``."""

    payee: Address
    amount: Amount


@dataclass(frozen=True)
class Bond:
    """The sender puts money behind a validator's key, its own or another: stake, from the next epoch on."""

    validator: Address
    amount: Amount


@dataclass(frozen=True)
class Unbond:
    """The sender takes back money that it bonded to ``validator``: spendable when the unbonding period is over."""

    validator: Address
    amount: Amount


@dataclass(frozen=True)
class Faucet:
    """On a test net: new money for ``payee``."""

    payee: Address
    amount: Amount


@dataclass(frozen=True)
class Signed:
    """A header or a vote, byte for byte as it was signed."""

    payload: Annotated[bytes, Size(4 * 1024)]
    signature: Signature


@dataclass(frozen=True)
class Evidence:
    """Two things that one key may not both sign; ``fault`` says of what kind: see :mod:`blyan_node.chain.evidence`."""

    fault: Annotated[str, Size(32, 1)]
    first: Signed
    second: Signed


Arguments = Manifest | Layer | Transfer | Bond | Unbond | Faucet | Evidence

KINDS: dict[str, type[Arguments]] = {
    "manifest": Manifest,
    "layer": Layer,
    "transfer": Transfer,
    "bond": Bond,
    "unbond": Unbond,
    "faucet": Faucet,
    "evidence": Evidence,
}
"""Which typed arguments belong to which kind."""


@dataclass(frozen=True)
class Record:
    """A signed record. ``nonce`` counts the sender's records; ``fee`` is in nano-BLY."""

    network: Hash
    kind: Annotated[str, Size(32, 1)]
    sender: Address
    nonce: int
    fee: int
    expires_at_cut: int
    arguments: Annotated[bytes, Size(MAX_ARGUMENTS)]
    signature: Signature

    @cached_property
    def unsigned(self) -> bytes:
        """The canonical encoding of everything but the signature."""
        return _unsigned(
            self.network, self.kind, self.sender, self.nonce, self.fee, self.expires_at_cut, self.arguments
        )

    @cached_property
    def id(self) -> bytes:
        """sha256 of the unsigned form."""
        return hashlib.sha256(self.unsigned).digest()

    def parsed(self) -> Arguments:
        """Return the typed arguments. Raises RuleError for an unknown kind or arguments that do not parse."""
        if (cls := KINDS.get(self.kind)) is None:
            raise RuleError(f"unknown kind {self.kind!r}")
        return unpack(cls, self.arguments, most=MAX_ARGUMENTS)


def _unsigned(
    network: bytes, kind: str, sender: bytes, nonce: int, fee: int, expires_at_cut: int, arguments: bytes
) -> bytes:
    return encode([network, to_value(kind), sender, nonce, fee, expires_at_cut, arguments])


def sign_record(
    key: Key,
    network: bytes,
    kind: str,
    arguments: bytes,
    *,
    nonce: int,
    fee: int = 0,
    expires_at_cut: int = MAX_INT,
) -> Record:
    """Make a record of any kind, signed by ``key``. Raises CodecError where a field is out of bounds."""
    unsigned = _unsigned(network, kind, key.address, nonce, fee, expires_at_cut, arguments)
    signature = key.sign(digest(RECORD_DOMAIN, unsigned))
    record = Record(network, kind, key.address, nonce, fee, expires_at_cut, arguments, signature)
    if len(arguments) > MAX_ARGUMENTS or not 1 <= len(kind.encode()) <= 32:
        raise CodecError(f"a record takes at most {MAX_ARGUMENTS} bytes of arguments and a kind of 1 to 32 bytes")
    return record


def make_record(
    key: Key, network: bytes, arguments: Arguments, *, nonce: int, fee: int = 0, expires_at_cut: int = MAX_INT
) -> Record:
    """Make a record from typed arguments. Raises CodecError where they break a bound of their kind."""
    (kind,) = (name for name, cls in KINDS.items() if isinstance(arguments, cls))
    packed = pack(arguments)
    unpack(type(arguments), packed, most=MAX_ARGUMENTS)  # what nobody could read is not signed
    return sign_record(key, network, kind, packed, nonce=nonce, fee=fee, expires_at_cut=expires_at_cut)


def check_record(record: Record, network: bytes) -> None:
    """Check a decoded record by itself: its network and its signature. Raises RuleError or SignatureError."""
    if record.network != network:
        raise RuleError("a record of another network")
    if recover_address(digest(RECORD_DOMAIN, record.unsigned), record.signature) != record.sender:
        raise SignatureError("a record that its sender did not sign")
