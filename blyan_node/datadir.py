"""The data directory of a node: what lies where, who may read it, and that one process at a time uses it.

::

    node.key      secret key of the node, mode 600          chain/    LevelDB: blocks and what follows from them
    api.token     local API token, mode 600                 blobs/    weights, content-addressed
    genesis.toml  the network this node belongs to          peers.json  addresses of peers
    network.toml  what an invite told: settings (config.py) wallets/  encrypted keys, mode 600
    node.json     while running: pid, API and p2p addresses lock      held (flock) while running
    blocked.txt   yours to write: ids of peers to refuse    api-keys.json, api-usage.json  hashes of API keys and
                                                            what they used today, mode 600
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from blyan_node.errors import AlreadyRunning, DiskFull, LocalError


@dataclass(frozen=True)
class Running:
    """What a running node tells local programs about itself."""

    pid: int
    peer_id: str
    api: str
    """Base URL of the HTTP API, without a slash at its end."""
    p2p: tuple[str, ...]
    """Full multiaddrs, peer id included, that others can bootstrap from."""


@dataclass(frozen=True)
class DataDir:
    """Paths inside a data directory."""

    root: Path

    @property
    def key(self) -> Path:
        """The node's secret key."""
        return self.root / "node.key"

    @property
    def wallets(self) -> Path:
        """The keystores of the wallets, mode 700; they are the CLI's, the node never reads them."""
        return self.root / "wallets"

    @property
    def token(self) -> Path:
        """The local API token."""
        return self.root / "api.token"

    @property
    def api_keys(self) -> Path:
        """The API keys that the operator has made, as hashes."""
        return self.root / "api-keys.json"

    @property
    def api_usage(self) -> Path:
        """What each API key has used today."""
        return self.root / "api-usage.json"

    @property
    def genesis(self) -> Path:
        """The genesis that is used when the configuration names none."""
        return self.root / "genesis.toml"

    @property
    def chain(self) -> Path:
        """The database of blocks."""
        return self.root / "chain"

    @property
    def blobs(self) -> Path:
        """The weights."""
        return self.root / "blobs"

    @property
    def peers(self) -> Path:
        """The address book."""
        return self.root / "peers.json"

    @property
    def blocked(self) -> Path:
        """The operator's list of peers to refuse: one id per line, heeded while the node runs."""
        return self.root / "blocked.txt"

    @property
    def state(self) -> Path:
        """What a running node tells local programs."""
        return self.root / "node.json"

    @property
    def lock(self) -> Path:
        """Held by the process that uses this directory."""
        return self.root / "lock"

    def read_token(self) -> str:
        """Return the local API token; LocalError, saying what to do, if it is absent or others may read it."""
        return _read_secret(self.token)

    def make_token(self) -> str:
        """Return the local API token, made now if this is the first start."""
        with explained(self.token):
            try:
                descriptor = os.open(self.token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            except FileExistsError:
                return _read_secret(self.token)
            with os.fdopen(descriptor, "w") as file:
                file.write(secrets.token_urlsafe(32) + "\n")
                file.flush()
                os.fsync(file.fileno())
        return _read_secret(self.token)

    def publish(self, running: Running) -> None:
        """Write node.json, at once and whole."""
        write_whole(self.state, json.dumps(asdict(running), indent=2) + "\n")

    def holder(self) -> int | None:
        """The id of the process that holds this directory; None if none does."""
        if not self.lock.exists() or not _is_locked(self.lock):
            return None
        text = self.lock.read_text().strip()
        return int(text) if text.isdigit() else None  # it has locked, and not yet written its id

    def running(self) -> Running | None:
        """What the node that runs here tells; None if none does, also after it was killed."""
        if self.holder() is None:
            return None
        try:
            fields = json.loads(self.state.read_text())
            return Running(fields["pid"], fields["peer_id"], fields["api"], tuple(fields["p2p"]))
        except FileNotFoundError:
            return None  # starting, or just ending
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise LocalError(f"{self.state} cannot be read ({error}); restart the node") from error


@contextmanager
def open_data_dir(root: Path) -> Iterator[DataDir]:
    """Make the directory if need be (mode 700), lock it, and tidy up on leaving.

    Raises AlreadyRunning, naming the process, if another one holds it; LocalError or DiskFull if it cannot be made.
    """
    directory = DataDir(root)
    with explained(root):
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(directory.lock, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            raise AlreadyRunning(
                f"{root} is in use by process {holder}. Stop that node, or give this one another --data-dir."
            ) from error
        with explained(root):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
            directory.state.unlink(missing_ok=True)  # left behind by a node that was killed
        try:
            yield directory
        finally:
            directory.state.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn an OSError about ``path`` into a LocalError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(f"no space left for {path}; free some, or choose another --data-dir") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise LocalError(
                f"no permission to write {path}; choose another --data-dir, or change its owner"
            ) from error
        raise LocalError(f"cannot use {path}: {error.strerror}") from error


def write_whole(path: Path, text: str, *, mode: int = 0o644, durable: bool = False) -> None:
    """Replace a file so that readers see the old text or the new, never a part; ``durable``: also if power is lost."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with explained(path):
        try:
            temporary.unlink(missing_ok=True)
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            with os.fdopen(descriptor, "w") as file:
                file.write(text)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            temporary.replace(path)
            if durable:
                _sync_directory(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_secret(path: Path) -> str:
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o077:
            raise LocalError(f"others may read {path} (mode {mode:o}); run: chmod 600 {path}")
        secret = path.read_text().strip()
    except FileNotFoundError as error:
        raise LocalError(f"there is no {path}; start the node once, or name its --data-dir") from error
    except OSError as error:
        raise LocalError(f"cannot read {path}: {error.strerror}") from error
    if not secret:
        raise LocalError(f"{path} is empty; remove it and start the node again")
    return secret


def _is_locked(path: Path) -> bool:
    with explained(path):
        descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
