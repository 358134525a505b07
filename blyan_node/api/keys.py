"""API keys: made by the operator's command line, read by the running node, kept as hashes in one file.

A key is ``bly_`` and 32 random bytes in base64url. Its SHA-256 is all that is stored: against 256 random bits no guess
can be tried, so stretching as for passwords would only cost the node time. The file is replaced as a whole, under a
lock on its directory, so that two commands at once lose nothing; the node looks whether it changed at each request.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from blyan_node.datadir import explained, write_whole
from blyan_node.errors import LocalError, RequestError

SCOPES = ("chat", "read", "send", "admin")
"""What a key may do: generate; read the node's state and the chain; hand in signed records; all of it, and publish."""
MAX_KEYS = 10_000
MAX_FILE = 8 << 20
MAX_NAME = 64

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ApiKey:
    """What is stored of a key. Times are whole seconds since 1970; None: never, or without bound."""

    id: str
    name: str
    hash: str
    scopes: tuple[str, ...]
    tokens_per_day: int | None
    created: int
    expires: int | None
    revoked: int | None = None

    def state(self, now: float) -> str:
        """Return ``valid``, ``revoked`` or ``expired``."""
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and now >= self.expires else "valid"


def hash_of(key: str) -> str:
    """The hash under which a key is stored. What a caller presents may be any text."""
    return hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()


def create(
    path: Path,
    name: str,
    *,
    scopes: Iterable[str],
    now: int,
    tokens_per_day: int | None = None,
    expires: int | None = None,
) -> tuple[ApiKey, str]:
    """Make a key; return what is stored, and the key itself, which is shown this once. Raises RequestError."""
    if not 1 <= len(name) <= MAX_NAME or not name.isprintable():
        raise RequestError(f"a key's name has 1 to {MAX_NAME} printable characters", param="name")
    if (wanted := set(scopes)) - set(SCOPES) or not wanted:
        raise RequestError(f"scopes are one or more of {', '.join(SCOPES)}", param="scope")
    if expires is not None and expires <= now:
        raise RequestError("a key that has expired already is of no use", param="expires")
    secret = f"bly_{secrets.token_urlsafe(32)}"
    ordered = tuple(scope for scope in SCOPES if scope in wanted)
    made = ApiKey(secrets.token_hex(6), name, hash_of(secret), ordered, tokens_per_day, now, expires)
    with _locked(path):
        keys = load(path)
        if any(key.name == name and key.revoked is None for key in keys):
            raise RequestError(f"there is a key named {name!r}; revoke it first, or choose another name", param="name")
        if len(keys) >= MAX_KEYS:
            raise RequestError(f"there are {MAX_KEYS} keys; take those that were revoked out of {path}")
        _save(path, (*keys, made))
    return made, secret


def revoke(path: Path, which: str, *, now: int) -> ApiKey:
    """Revoke a key by id, or by the name of one that is not revoked. Raises RequestError where there is none."""
    with _locked(path):
        keys = load(path)
        found = [key for key in keys if key.revoked is None and which in (key.id, key.name)]
        if not found:
            raise RequestError(f"there is no key {which!r} that could be revoked; see: blyan-node key list")
        gone = replace(found[0], revoked=now)
        _save(path, (gone if key is found[0] else key for key in keys))
    return gone


def load(path: Path) -> tuple[ApiKey, ...]:
    """Read all keys, the oldest first. Raises LocalError where others may read the file, or it is damaged."""
    with explained(path):
        try:
            status = path.stat()
        except FileNotFoundError:
            return ()
        if (mode := stat.S_IMODE(status.st_mode)) & 0o077:
            raise LocalError(f"others may read {path} (mode {mode:o}); run: chmod 600 {path}")
        if status.st_size > MAX_FILE:
            raise LocalError(f"{path} is larger than {MAX_FILE} bytes; restore it from a backup")
        text = path.read_bytes()
    try:
        return tuple(_key(entry) for entry in json.loads(text)["keys"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise LocalError(f"{path} is damaged ({error}); restore it, or remove it and make new keys") from error


class KeyFile:
    """The keys as a running node sees them: read again whenever the file has changed.

    While the file cannot be used no key is valid, and the log tells why, once.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int, int] | None = None
        self._keys: dict[str, ApiKey] = {}

    def find(self, presented: str, now: float) -> ApiKey | None:
        """Return the key that a caller presents; None if it is unknown, expired or revoked."""
        self._refresh()
        # A look-up by hash tells nothing by its timing: whoever presents text cannot choose its hash.
        key = self._keys.get(hash_of(presented))
        return key if key is not None and key.state(now) == "valid" else None

    def _refresh(self) -> None:
        try:
            status = self._path.stat()
            seen = (status.st_mtime_ns, status.st_ino, status.st_mode)
        except OSError:
            seen = None
        if seen == self._seen:
            return
        self._seen = seen
        try:
            self._keys = {key.hash: key for key in load(self._path)}
        except LocalError as error:
            self._keys = {}
            log.error("no API key is accepted: %s", error)


def _key(entry: dict[str, object]) -> ApiKey:
    key = ApiKey(**entry)  # type: ignore[arg-type]  # checked below
    words = (key.id, key.name, key.hash, *key.scopes)
    numbers = [number for number in (key.tokens_per_day, key.expires, key.revoked) if number is not None]
    if {type(word) for word in words} != {str} or {type(number) for number in (key.created, *numbers)} != {int}:
        raise ValueError("a field has a wrong type")
    return replace(key, scopes=tuple(key.scopes))


def _save(path: Path, keys: Iterable[ApiKey]) -> None:
    write_whole(path, json.dumps({"keys": [asdict(key) for key in keys]}, indent=1) + "\n", mode=0o600, durable=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the directory of the file against other commands."""
    with explained(path.parent):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
