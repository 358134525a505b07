"""The wallet's file: an Ethereum V3 keystore ("Web3 Secret Storage Definition"), which other wallets read and write.

The password is stretched (scrypt, RFC 7914, or PBKDF2 in files from elsewhere) to 32 bytes: the first half encrypts the
secret with AES-128-CTR, the second authenticates it: keccak-256(second half | ciphertext).
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import stat
import tempfile
import unicodedata
import uuid
from pathlib import Path
from typing import Any

from Crypto.Cipher import AES
from Crypto.Hash import keccak
from Crypto.Protocol.KDF import scrypt

from blyan_node.chain.keys import Key, show_address
from blyan_node.errors import ConfigError, LocalError, RequestError

SCRYPT_N = 262_144
"""Cost for users: 256 MiB and about a second for each guess at a password."""
SCRYPT_R, SCRYPT_P = 8, 1
MAX_FILE = 64 * 1024
MAX_MEMORY = 1 << 30
"""Bytes that stretching the password of somebody's file may take: 128 · n · r."""
MAX_WORK = 1 << 24
"""The same for time: n · r · p, of which users' own files take 2**21."""
MAX_ROUNDS = 10_000_000
LEAST_PASSWORD = 8


def encrypt_key(key: Key, password: str, *, n: int = SCRYPT_N) -> dict[str, Any]:
    """Return the keystore of a key, ready to be written as JSON. ``n`` is scrypt's cost, a power of two.

    Raises RequestError for a password of fewer than eight characters.
    """
    if len(password) < LEAST_PASSWORD:
        raise RequestError(f"a password has at least {LEAST_PASSWORD} characters")
    salt, iv = secrets.token_bytes(32), secrets.token_bytes(16)
    parameters = {"dklen": 32, "n": n, "r": SCRYPT_R, "p": SCRYPT_P, "salt": salt.hex()}
    stretched = _stretch("scrypt", parameters, password)
    ciphertext = _aes(stretched, iv, key.secret)
    return {
        "version": 3,
        "id": str(uuid.uuid4()),
        "address": key.address.hex(),
        "crypto": {
            "cipher": "aes-128-ctr",
            "cipherparams": {"iv": iv.hex()},
            "ciphertext": ciphertext.hex(),
            "kdf": "scrypt",
            "kdfparams": parameters,
            "mac": _mac(stretched, ciphertext).hex(),
        },
    }


def decrypt_key(keystore: object, password: str) -> Key:
    """Return the key in a parsed keystore.

    Raises ConfigError where it is not a keystore of version 3, is damaged, or would cost too much to open;
    RequestError for a wrong password, which cannot be told from damage to the ciphertext.
    """
    file = _Fields(keystore, "the file")
    if file.number("version") != 3:
        raise ConfigError("a keystore of another version than 3: export it again from a current wallet")
    crypto = file.table("crypto" if isinstance(keystore, dict) and "crypto" in keystore else "Crypto")
    if (cipher := crypto.text("cipher")) != "aes-128-ctr":
        raise ConfigError(f"the keystore is encrypted with {cipher!r}; only aes-128-ctr is supported")
    ciphertext = crypto.hex("ciphertext", 32)
    iv, mac = crypto.table("cipherparams").hex("iv", 16), crypto.hex("mac", 32)
    stretched = _stretch(crypto.text("kdf"), crypto.table("kdfparams").value, password)
    if not hmac.compare_digest(_mac(stretched, ciphertext), mac):
        raise RequestError("wrong password (or the wallet's file is damaged)")
    key = Key(_aes(stretched, iv, ciphertext))
    claimed = file.value.get("address")
    if isinstance(claimed, str) and claimed.lower().removeprefix("0x") != key.address.hex():
        raise ConfigError(f"the keystore names another address than that of its key, {show_address(key.address)}")
    return key


def save_keystore(path: Path, keystore: dict[str, Any]) -> None:
    """Write a keystore with :func:`save_secret`."""
    save_secret(path, json.dumps(keystore, indent=2) + "\n")


def save_secret(path: Path, text: str) -> None:
    """Write ASCII text, mode 600, whole or not at all; never over a file that is there. Raises LocalError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 600 from the start
        try:
            with os.fdopen(handle, "w", encoding="ascii") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            _link(Path(temporary), path)
            _sync_directory(path.parent)
        finally:
            Path(temporary).unlink()
    except OSError as error:
        raise LocalError(f"cannot write {path}: {error.strerror or error}") from error


def load_keystore(path: Path) -> object:
    """Read a keystore without opening it. Raises LocalError, where others may read the file too, or ConfigError."""
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            raw = file.read(MAX_FILE + 1)
    except FileNotFoundError as error:
        raise LocalError(f"there is no wallet in {path}: make one with `wallet new`, or import one") from error
    except OSError as error:
        raise LocalError(f"cannot read the wallet {path}: {error.strerror or error}") from error
    if mode & 0o077:
        raise LocalError(f"the wallet {path} can be read by others (mode {mode:o}); run: chmod 600 {path}")
    if len(raw) > MAX_FILE:
        raise ConfigError(f"{path} is no wallet: it is larger than {MAX_FILE} bytes")
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the wallet {path} is damaged (not JSON); restore it from its phrase or a backup") from error


def _stretch(kdf: str, parameters: dict[str, Any], password: str) -> bytes:
    """Derive 32 bytes from a password, within bounds on memory and time. Raises ConfigError."""
    # The definition leaves the password's encoding open; NFKC lets one password be typed on any keyboard.
    text = unicodedata.normalize("NFKC", password).encode()
    fields = _Fields(parameters, "kdfparams")
    salt = fields.hex("salt")
    if fields.number("dklen") != 32:
        raise ConfigError("the keystore's dklen is not 32")
    if kdf == "scrypt":
        n, r, p = fields.number("n"), fields.number("r"), fields.number("p")
        if n < 2 or n & (n - 1) or r < 1 or p < 1 or 128 * n * r > MAX_MEMORY or n * r * p > MAX_WORK:
            raise ConfigError(f"the keystore asks for scrypt with n={n}, r={r}, p={p}: not valid, or far too much")
        derived = scrypt(
            text, salt, 32, N=n, r=r, p=p
        )  # OpenSSL's refuses the r=1, n=2**18 of the definition's example
        if not isinstance(derived, bytes):
            raise TypeError("one derived key was asked for")  # the signature allows several
        return derived
    if kdf == "pbkdf2":
        rounds = fields.number("c")
        if fields.text("prf") != "hmac-sha256" or not 1 <= rounds <= MAX_ROUNDS:
            raise ConfigError(f"the keystore asks for PBKDF2 other than hmac-sha256 in 1 to {MAX_ROUNDS} rounds")
        return hashlib.pbkdf2_hmac("sha256", text, salt, rounds, 32)
    raise ConfigError(f"the keystore's kdf {kdf!r} is not supported: scrypt and pbkdf2 are")


def _aes(stretched: bytes, iv: bytes, data: bytes) -> bytes:
    return AES.new(stretched[:16], AES.MODE_CTR, nonce=b"", initial_value=iv).encrypt(data)


def _mac(stretched: bytes, ciphertext: bytes) -> bytes:
    return keccak.new(digest_bits=256, data=stretched[16:32] + ciphertext).digest()


def _link(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)  # unlike rename, fails where something is there
    except FileExistsError as error:
        raise LocalError(f"there is a file {path} already: move it away first, or choose another name") from error


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class _Fields:
    """The fields of a JSON table, checked as they are read. Raises ConfigError that names the field."""

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise ConfigError(f"not a keystore: {where} is no table")
        self.value: dict[str, Any] = value

    def _get(self, name: str, kind: type) -> Any:
        if type(value := self.value.get(name)) is not kind:
            raise ConfigError(f"not a keystore, or a damaged one: {name} is missing or of the wrong type")
        return value

    def table(self, name: str) -> _Fields:
        return _Fields(self.value.get(name), name)

    def text(self, name: str) -> str:
        return str(self._get(name, str))

    def number(self, name: str) -> int:
        return int(self._get(name, int))

    def hex(self, name: str, length: int | None = None) -> bytes:
        try:
            value = bytes.fromhex(self.text(name).removeprefix("0x"))
        except ValueError as error:
            raise ConfigError(f"the keystore is damaged: {name} is not hex") from error
        if length is not None and len(value) != length:
            raise ConfigError(f"the keystore is damaged: {name} has {len(value)} bytes, not {length}")
        return value
