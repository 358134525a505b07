"""The database: LevelDB, the keys in it, and its failures turned into errors that tell what to do.

Every accepted block is one atomic batch. What was written is on the disk once :meth:`Store.flush` returns; a crash of
the process alone loses nothing.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import cast

import plyvel

from blyan_node.chain.closing import Closing
from blyan_node.errors import AlreadyRunning, DiskFull, StoreError

WRITE_BUFFER = 16 * 2**20
"""Bytes that LevelDB gathers in memory, and in its log, before it writes them as a table."""
FULL = (errno.ENOSPC, errno.EDQUOT)

Batch = list[tuple[bytes, bytes | None]]
"""Keys with their new values; None deletes."""


class Prefix(bytes, Enum):
    """The first byte of every key, and what follows it. Integers are big-endian, 8 bytes, so keys sort by them."""

    STATE = b"S"
    """nothing → [format, network, number of blocks]"""
    BLOCK = b"b"
    """id → encoded block"""
    NODE = b"n"
    """id → the node of the DAG"""
    HEAD = b"h"
    """id → nothing"""
    BRANCH = b"r"
    """number → the branch of an author"""
    HEIGHT = b"i"
    """chain tag, height, id → nothing"""
    AUTHOR = b"a"
    """author, seq, id → nothing"""

    CUT = b"k"
    """number → final cut, certificate, root of the state after it, its authors"""
    FINAL = b"f"
    """id of a block → number of the cut that made it final"""
    RESULT = b"o"
    """id of a record or receipt → cut, why it is void"""
    MOVEMENT = b"m"
    """address, cut, index → movement of money"""
    ROW = b"s"
    """sha256 → row of the final state"""
    SNAPSHOT = b"p"
    """cut, page → rows of the state after that cut"""
    STRIPPED = b"z"
    """nothing → cut through which the bodies of blocks were pruned"""
    VOTE = b"v"
    """cut, round, step → what this validator signed"""
    ABSTAIN = b"x"
    """nothing → cut through which this validator signs nothing; empty: not known yet"""

    def key(self, *parts: bytes | int) -> bytes:
        """Put a key together."""
        return b"".join((self, *[part if isinstance(part, bytes) else part.to_bytes(8, "big") for part in parts]))


class Store(Closing):
    """A LevelDB database in a directory of its own, which it locks. A context manager."""

    def __init__(self, directory: Path) -> None:
        """Open or create. Raises AlreadyRunning, DiskFull, or StoreError for a damaged database."""
        self.directory = directory
        self._database: plyvel.DB | None = None
        self._torn = False
        with self._failures():
            directory.mkdir(parents=True, exist_ok=True)
            self._open()

    def _open(self) -> plyvel.DB:
        if self._database is None:
            # paranoid_checks: a damaged log fails here, rather than leave holes in the middle of the chain
            self._database = plyvel.DB(
                str(self.directory),
                create_if_missing=True,
                paranoid_checks=True,
                write_buffer_size=WRITE_BUFFER,  # fewer, larger tables: compaction stalls writes less often
                bloom_filter_bits=10,  # most look-ups are for blocks that are not here yet
                compression=None,  # hashes and signatures do not compress
                max_open_files=256,
            )
        return self._database

    def get(self, key: bytes) -> bytes | None:
        """Read one value."""
        with self._failures():
            return cast(bytes | None, self._open().get(key, verify_checksums=True))

    def keys(
        self, prefix: bytes, *, after: bytes | None = None, before: bytes | None = None, reverse: bool = False
    ) -> Iterator[bytes]:
        """Iterate over the keys that begin with ``prefix``, in order or backwards, between two that are left out."""
        with self._failures():
            iterator = self._open().iterator(
                start=after or prefix,
                stop=before or _end(prefix),
                include_start=after is None,
                include_value=False,
                reverse=reverse,
                verify_checksums=True,
                fill_cache=False,
            )
            with iterator:
                yield from iterator

    def write(self, batch: Batch) -> None:
        """Write all of a batch or nothing of it."""
        with self._failures():
            if self._torn:
                self._mend()
            self._torn = True
            with self._open().write_batch() as writes:
                for key, value in batch:
                    if value is None:
                        writes.delete(key)
                    else:
                        writes.put(key, value)
            self._torn = False

    def _mend(self) -> None:
        """Open the database again after a write that failed, as on a full disk.

        LevelDB would write behind the half of a record that is in its log, and on its next opening find the log damaged
        there and all that follows lost; and after a failed compaction it refuses to write for good. Opening it again
        drops the half and begins a new log. That takes room: while there is none it stays as it is, and can be read.
        """
        room = self.directory / "room"
        try:
            room.write_bytes(bytes(2 * WRITE_BUFFER))
        finally:
            room.unlink(missing_ok=True)
        self.close()
        self._database = None

    def flush(self) -> None:
        """Return once all that was written is on the disk: it survives power loss.

        Syncs every log there is: LevelDB's own synced write covers the newest only, and while an older one is being
        compacted its tail may still be in memory.
        """
        with self._failures():
            for log in self.directory.glob("*.log"):
                try:
                    _sync(log)
                except FileNotFoundError:
                    pass  # compacted since, into a table that LevelDB has synced
            _sync(self.directory)

    def close(self) -> None:
        """Close and unlock."""
        if self._database is not None:
            self._database.close()

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except plyvel.CorruptionError as error:
            raise StoreError(self.damaged(_text(error))) from error
        except (plyvel.IOError, OSError) as error:
            text = _text(error)
            if any(os.strerror(number) in text for number in FULL) or getattr(error, "errno", None) in FULL:
                raise DiskFull(
                    f"no space left for the chain in {self.directory}: free some; a running node then goes on by itself"
                ) from error
            if "lock" in text.lower():
                raise AlreadyRunning(f"another process holds the chain in {self.directory}: stop it first") from error
            if isinstance(error, plyvel.IOError) and ("No such file" in text or "Invalid argument" in text):
                raise StoreError(self.damaged(_text(error))) from error
            raise StoreError(f"the chain's database in {self.directory} failed: {text}") from error

    def damaged(self, what: str) -> str:
        """Return the text of an error that tells what is damaged, and what to do."""
        return (
            f"the chain's database is damaged ({what}). Stop the node, move {self.directory} away and start again: "
            "the node fetches the chain from its peers. A validator waits until it has caught up before it writes"
        )


def swap(directory: Path, other: Path) -> None:
    """Let the closed database in ``other`` take the place of the one in ``directory``, which is removed.

    A crash in between is mended by :func:`finish_swap`. Raises StoreError.
    """
    try:
        directory.rename(_outgoing(directory))
        other.rename(directory)
        _sync(directory.parent)
        shutil.rmtree(_outgoing(directory))
    except OSError as error:
        raise StoreError(f"cannot put {other} in the place of {directory}: {error.strerror}") from error


def finish_swap(directory: Path) -> None:
    """Finish a swap that a crash cut off, or undo it, before the database is opened."""
    outgoing = _outgoing(directory)
    if outgoing.exists() and directory.exists():
        shutil.rmtree(outgoing, ignore_errors=True)
    elif outgoing.exists():
        outgoing.rename(directory)


def _outgoing(directory: Path) -> Path:
    return directory.with_name(f"{directory.name}.old")


def _end(prefix: bytes) -> bytes | None:
    """Return the first key behind all keys that begin with ``prefix``."""
    stem = prefix.rstrip(b"\xff")
    return stem[:-1] + bytes([stem[-1] + 1]) if stem else None


def _text(error: Exception) -> str:
    """Return the message of an error; plyvel gives LevelDB's as bytes."""
    message = error.args[0] if error.args else ""
    return message.decode(errors="replace") if isinstance(message, bytes) else str(error)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
