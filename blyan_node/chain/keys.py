"""Keys, signatures and addresses: recoverable ECDSA on secp256k1, with Ethereum's addresses.

An address is the last 20 bytes of keccak-256 over the uncompressed public key (Ethereum yellow paper, appendix F);
it is shown with the mixed-case checksum of EIP-55. Signatures are 65 bytes ``r | s | v`` with ``v`` in 0..3, over a
32-byte digest; only the low ``s`` of the two that verify is accepted (BIP-62, EIP-2), so one signature has one form.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from functools import lru_cache
from pathlib import Path

from coincurve import PrivateKey, PublicKey
from Crypto.Hash import keccak

from blyan_node.errors import ConfigError, LocalError, RuleError, SignatureError

GROUP_ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
ADDRESS_SIZE = 20
SIGNATURE_SIZE = 65


def digest(domain: bytes, payload: bytes) -> bytes:
    """Hash ``payload`` for one purpose: sha256(len(domain) as one byte | domain | payload), 32 bytes.

    The domain keeps a signature over one kind of message from being valid over another.
    """
    return hashlib.sha256(bytes([len(domain)]) + domain + payload).digest()


class Key:
    """A secp256k1 private key. Its secret never appears in ``repr``."""

    __slots__ = ("_private", "address", "public")

    def __init__(self, secret: bytes) -> None:
        """Take the 32-byte secret; raise ConfigError where it is no private key."""
        if len(secret) != 32 or not 0 < int.from_bytes(secret) < GROUP_ORDER:
            raise ConfigError("a private key is 32 bytes, between 1 and the order of secp256k1")
        self._private = PrivateKey(secret)
        self.public: bytes = self._private.public_key.format(compressed=True)
        """33 bytes, compressed."""
        self.address: bytes = address_of(self.public)
        """20 bytes."""

    @classmethod
    def generate(cls) -> Key:
        """Draw a new key from the system's randomness."""
        return cls(PrivateKey().secret)

    @property
    def secret(self) -> bytes:
        """The 32-byte secret: for the key file and for the identity of the network host."""
        return self._private.secret

    def sign(self, message_digest: bytes) -> bytes:
        """Sign a 32-byte digest: 65 bytes ``r | s | v``, deterministic (RFC 6979), low ``s``."""
        return self._private.sign_recoverable(message_digest, hasher=None)

    def __repr__(self) -> str:
        return f"Key({show_address(self.address)})"


def recover(message_digest: bytes, signature: bytes) -> bytes:
    """Return the 33-byte public key that made ``signature`` over a 32-byte digest.

    Raises SignatureError for a wrong length, the high one of the two ``s`` values, or values no key can have made.
    """
    if len(signature) != SIGNATURE_SIZE:
        raise SignatureError(f"a signature has {SIGNATURE_SIZE} bytes, not {len(signature)}")
    if int.from_bytes(signature[32:64]) > GROUP_ORDER // 2:
        raise SignatureError("the signature's s is not the low one")
    try:
        return PublicKey.from_signature_and_message(signature, message_digest, hasher=None).format(compressed=True)
    except ValueError as error:
        raise SignatureError("no key can have made this signature") from error


@lru_cache(maxsize=8192)
def recover_address(message_digest: bytes, signature: bytes) -> bytes:
    """Return the address whose key made a signature. Raises SignatureError.

    Remembers the last good ones: a record comes from its sender and then in a block, a block by gossip and then into
    the replica, a vote alone and then in a certificate.
    """
    return address_of(recover(message_digest, signature))


@lru_cache(maxsize=4096)
def address_of(public: bytes) -> bytes:
    """Return the 20-byte address of a public key (33 or 65 bytes). Raises SignatureError where it is none."""
    try:
        point = PublicKey(public).format(compressed=False)
    except ValueError as error:
        raise SignatureError("not a point of secp256k1") from error
    return keccak.new(digest_bits=256, data=point[1:]).digest()[-ADDRESS_SIZE:]


def show_address(address: bytes) -> str:
    """Return an address as EIP-55 text: ``0x`` and 40 hex digits whose case is a checksum."""
    text = address.hex()
    checksum = keccak.new(digest_bits=256, data=text.encode()).hexdigest()
    return "0x" + "".join(
        letter.upper() if int(nibble, 16) >= 8 else letter for letter, nibble in zip(text, checksum, strict=False)
    )


def parse_address(text: str) -> bytes:
    """Return the 20 bytes of an address. Raises RuleError for bad form, or mixed case with a wrong checksum (EIP-55).

    All-lower and all-upper case carry no checksum and are taken.
    """
    digits = text[2:]
    if not text.startswith("0x") or len(digits) != 40 or set(digits) - set("0123456789abcdefABCDEF"):
        raise RuleError(f"{text!r} is not an address: 0x and 40 hex digits")
    address = bytes.fromhex(digits)
    if digits not in (digits.lower(), digits.upper()) and show_address(address) != text:
        raise RuleError(f"{text!r} has a wrong checksum (EIP-55): a digit or a letter's case is mistyped")
    return address


def load_or_create_key(path: Path) -> Key:
    """Read the key at ``path`` (64 hex digits, mode 600), or create it there on first use.

    Creation is atomic: of several processes that start at once one writes, and all load the same key. Beside a key
    that was made here lies an empty file, see :func:`unused_mark`. Raises LocalError where the file is readable by
    others, cannot be read, or holds no key.
    """
    try:
        if not path.exists():
            _create(path)
        return _load(path)
    except OSError as error:
        raise LocalError(f"cannot read or write the key file {path}: {error.strerror or error}") from error


def unused_mark(path: Path) -> Path:
    """Return the file that lies beside a key until its first use: while it does, no signature of the key is lost."""
    return path.with_name(f"{path.name}.unused")


def _create(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 600 from the start
    try:
        with os.fdopen(handle, "w") as file:
            file.write(Key.generate().secret.hex() + "\n")
            file.flush()
            os.fsync(file.fileno())
        unused_mark(path).touch()
        os.link(temporary, path)  # unlike rename, fails where another process was first
    except FileExistsError:
        pass  # the other process's key is loaded instead
    finally:
        Path(temporary).unlink()


def _load(path: Path) -> Key:
    with path.open(encoding="ascii", errors="replace") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        if mode & 0o077:
            raise LocalError(f"the key file {path} can be read by others (mode {mode:o}); run: chmod 600 {path}")
        text = file.read(256)
    try:
        return Key(bytes.fromhex(text))
    except (ValueError, ConfigError) as error:
        raise LocalError(
            f"the key file {path} does not hold a key (64 hex digits); "
            "restore it from a backup, or move it away to start under a new address"
        ) from error
