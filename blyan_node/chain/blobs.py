"""Large things, weights above all, as files named by the Merkle root of their content.

A blob is cut into chunks of 1 MiB; its id is the root of the RFC 6962 tree over them. A blob in a directory is two
files: ``ROOT`` (the content) and ``ROOT.leaves`` (the 32-byte leaf hashes in order, so that proofs need no reading of
the content). One that is being fetched is ``ROOT.SIZE.part``, sparse, with ``ROOT.SIZE.part.leaves`` beside it, where
32 zero bytes stand for a chunk that is not here. There is no other state: after a crash a chunk counts as here if it
has a leaf hash and its bytes match it. A content file gets its name only when all of it is verified and on the disk.

For one thread at a time. Names are made from hashes only, so no peer can choose a path.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from blyan_node.chain.merkle import HASH_SIZE, Tree, check_proof, leaf_hash
from blyan_node.chain.records import MAX_BLOB, BlobRef
from blyan_node.errors import DiskFull, IntegrityError, StoreError

CHUNK = 2**20
"""Bytes of every chunk but the last."""
MAX_PROOF = 20
"""Most hashes in a proof: the depth of the tree of the largest blob."""
_TREES = 16
_NOTHING = bytes(HASH_SIZE)

Buffer = bytes | bytearray | memoryview


def chunk_count(ref: BlobRef) -> int:
    """Return the number of chunks of a blob; none for an empty one."""
    return -(-ref.size // CHUNK)


def chunk_size(ref: BlobRef, index: int) -> int:
    """Return the bytes of one chunk."""
    return min(CHUNK, ref.size - index * CHUNK)


class BlobStore:
    """The blobs in a directory. ``cap`` bounds the bytes of all of them, whole or partial, as the operator set it."""

    def __init__(self, directory: Path, *, cap: int | None = None) -> None:
        """Open or create; removes what an interrupted :meth:`add` left. Raises DiskFull or StoreError."""
        self.directory = directory
        self.cap = cap
        self._trees: OrderedDict[bytes, Tree] = OrderedDict()
        self._parts: dict[BlobRef, _Part] = {}
        with self._failures():
            directory.mkdir(parents=True, exist_ok=True)
            for left in directory.glob("*.tmp"):
                left.unlink()

    # Whole blobs

    def add(self, source: Path | Iterable[Buffer]) -> BlobRef:
        """Copy a file, or buffers of any sizes, into the store; holds one chunk in memory.

        Raises DiskFull where the cap or the disk does not allow it; nothing stays behind then.
        """
        leaves: list[bytes] = []
        size, room = 0, self._room()
        temporary = self.directory / "adding.tmp"
        try:
            with self._failures(), temporary.open("wb") as file:
                for chunk in _chunks(_read(source) if isinstance(source, Path) else source):
                    size += len(chunk)
                    self._check_room(size, room)
                    leaves.append(leaf_hash(chunk))
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            ref = BlobRef(Tree(leaves).root, size)
            if not self.has(ref):
                with self._failures():
                    self._finish(ref, temporary, leaves)
                    self._remove_part(ref)
            return ref
        finally:
            temporary.unlink(missing_ok=True)

    def has(self, ref: BlobRef) -> bool:
        """Tell whether all of a blob is here."""
        try:
            return self._whole(ref).stat().st_size == ref.size
        except FileNotFoundError:
            return False

    def path(self, ref: BlobRef) -> Path:
        """Return the file of a blob: read it or map it, never write it. Raises StoreError where it is not here."""
        if not self.has(ref):
            raise StoreError(f"blob {ref.root.hex()} of {ref.size} bytes is not in {self.directory}")
        return self._whole(ref)

    def get_chunk(self, ref: BlobRef, index: int) -> tuple[bytes, tuple[bytes, ...]]:
        """Return a chunk of a whole blob and its proof, both verified.

        Raises StoreError where the blob is not here or has no such chunk, IntegrityError where the disk changed it.
        """
        path = self.path(ref)
        if not 0 <= index < chunk_count(ref):
            raise StoreError(f"blob {ref.root.hex()} has {chunk_count(ref)} chunks; there is no chunk {index}")
        tree = self._tree(ref)
        with self._failures(), path.open("rb") as file:
            file.seek(index * CHUNK)
            data = file.read(chunk_size(ref, index))
        if leaf_hash(data) != tree.leaves[index]:
            raise IntegrityError(self._tampered(ref, [index]))
        return data, tree.proof(index)

    def verify(self, ref: BlobRef) -> None:
        """Read all of a blob and check it. Raises IntegrityError, naming the chunks that differ."""
        path, tree = self.path(ref), self._tree(ref)
        with self._failures():
            wrong = [i for i, chunk in enumerate(_chunks(_read(path))) if leaf_hash(chunk) != tree.leaves[i]]
        if wrong:
            raise IntegrityError(self._tampered(ref, wrong))

    def remove(self, ref: BlobRef) -> None:
        """Delete a blob, whole or partial; does nothing where it is not here."""
        with self._failures():
            self._remove_part(ref)
            if self.has(ref):
                self._trees.pop(ref.root, None)
                whole = self._whole(ref)
                whole.unlink()  # first: leaves alone are no blob
                _leaves(whole).unlink(missing_ok=True)

    def refs(self) -> tuple[BlobRef, ...]:
        """Return the whole blobs, sorted by root."""
        names = sorted(path.name for path in self.directory.iterdir() if len(path.name) == 2 * HASH_SIZE)
        return tuple(BlobRef(bytes.fromhex(name), (self.directory / name).stat().st_size) for name in names)

    def used(self) -> int:
        """Return the bytes of all blobs; of a partial one, its full size."""
        total = 0
        with self._failures(), os.scandir(self.directory) as entries:
            for entry in entries:
                try:
                    total += entry.stat().st_size if entry.is_file() else 0
                except FileNotFoundError:
                    pass  # deleted, or given its final name, while we looked
        return total

    # Blobs on their way in

    def open_partial(self, ref: BlobRef) -> None:
        """Begin or resume a blob; does nothing where it is whole. An empty blob is whole at once.

        Reserves its size. Raises DiskFull where the cap or the disk does not allow it.
        """
        if self.has(ref) or ref in self._parts:
            return
        if ref.size > MAX_BLOB:
            raise StoreError(f"a blob has at most {MAX_BLOB} bytes")
        path = self._part(ref)
        resumes = path.exists()
        if not resumes:
            self._check_room(ref.size + HASH_SIZE * chunk_count(ref), self._room())
        with self._failures():
            self._parts[ref] = part = _Part(ref, path)
        if part.complete:
            self._complete(ref, part)

    def missing(self, ref: BlobRef) -> list[int]:
        """Return the indexes of the chunks that are not here, in order; begins or resumes the blob where needed."""
        self.open_partial(ref)
        return [] if self.has(ref) else self._parts[ref].missing()

    def put_chunk(self, ref: BlobRef, index: int, data: Buffer, proof: tuple[bytes, ...]) -> bool:
        """Verify a chunk and write it; return whether the blob is whole now. A chunk that is here already is dropped.

        Raises IntegrityError where the chunk does not belong to the blob (whoever sent it is at fault; nothing was
        written), DiskFull or StoreError where it could not be written.
        """
        if not 0 <= index < chunk_count(ref) or len(data) != chunk_size(ref, index):
            raise IntegrityError(f"a chunk {index} of {len(data)} bytes does not belong to blob {ref.root.hex()}")
        leaf = leaf_hash(data)
        check_proof(leaf, index, chunk_count(ref), proof, ref.root)
        self.open_partial(ref)
        if self.has(ref):
            return True
        part = self._parts[ref]
        with self._failures():
            part.put(index, data, leaf)
        if part.complete:
            self._complete(ref, part)
        return part.complete

    def _remove_part(self, ref: BlobRef) -> None:
        self._parts.pop(ref, None)
        self._part(ref).unlink(missing_ok=True)
        _leaves(self._part(ref)).unlink(missing_ok=True)

    def _complete(self, ref: BlobRef, part: _Part) -> None:
        if Tree(part.leaves).root != ref.root:  # each chunk had its proof
            self.remove(ref)
            raise IntegrityError(
                f"the chunks of blob {ref.root.hex()} do not add up: its size on the chain is wrong, or the partial "
                "file was changed on the disk"
            )
        with self._failures():
            part.sync()
            del self._parts[ref]
            self._finish(ref, self._part(ref), part.leaves)
            _leaves(self._part(ref)).unlink(missing_ok=True)

    def _finish(self, ref: BlobRef, content: Path, leaves: list[bytes]) -> None:
        """Give synced content its name: leaves first, so that content never stands without them."""
        whole = self._whole(ref)
        temporary = self.directory / "leaves.tmp"
        with temporary.open("wb") as file:
            file.write(b"".join(leaves))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(_leaves(whole))
        content.replace(whole)
        handle = os.open(self.directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def _tree(self, ref: BlobRef) -> Tree:
        """Return the tree of a whole blob, from its leaves; where those are lost or changed, from its content."""
        if (tree := self._trees.get(ref.root)) is None:
            whole = self._whole(ref)
            with self._failures():
                packed = _leaves(whole).read_bytes() if _leaves(whole).exists() else b""
                tree = Tree([packed[at : at + HASH_SIZE] for at in range(0, len(packed), HASH_SIZE)])
                if tree.root != ref.root or len(tree.leaves) != chunk_count(ref):
                    tree = Tree([leaf_hash(chunk) for chunk in _chunks(_read(whole))])
            if tree.root != ref.root:
                raise IntegrityError(self._tampered(ref, []))
            self._trees[ref.root] = tree
            if len(self._trees) > _TREES:
                self._trees.popitem(last=False)
        self._trees.move_to_end(ref.root)
        return tree

    def _whole(self, ref: BlobRef) -> Path:
        return self.directory / ref.root.hex()

    def _part(self, ref: BlobRef) -> Path:
        return self.directory / f"{ref.root.hex()}.{ref.size}.part"

    def _room(self) -> int | None:
        return None if self.cap is None else self.cap - self.used()

    def _check_room(self, size: int, room: int | None) -> None:
        if room is not None and size > room:
            raise DiskFull(
                f"the cap of {self.cap} bytes for blobs in {self.directory} is reached: raise it, or remove a model"
            )
        if size > shutil.disk_usage(self.directory).free:
            raise DiskFull(f"{size} bytes do not fit on the disk of {self.directory}: free some space")

    def _tampered(self, ref: BlobRef, chunks: list[int]) -> str:
        where = f" in chunks {', '.join(map(str, chunks))}" if chunks else ""
        return f"the file {self._whole(ref)} differs from its hash{where}: it was changed or the disk is failing"

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DiskFull(f"no space left for blobs in {self.directory}: free some and start again") from error
            raise StoreError(f"the blobs in {self.directory} failed: {error}") from error


class _Part:
    """The files of a partial blob, and its leaf hashes in memory (32 bytes a chunk)."""

    def __init__(self, ref: BlobRef, path: Path) -> None:
        """Create the files, or look at what an earlier run left in them."""
        self.ref, self.path = ref, path
        with _open(path, ref.size) as file, _open(_leaves(path), HASH_SIZE * chunk_count(ref)) as leaf_file:
            packed = leaf_file.read()
            self.leaves = [packed[at : at + HASH_SIZE] for at in range(0, len(packed), HASH_SIZE)]
            for index, leaf in enumerate(self.leaves):
                if leaf != _NOTHING:
                    data = os.pread(file.fileno(), chunk_size(ref, index), index * CHUNK)
                    self.leaves[index] = leaf if leaf_hash(data) == leaf else _NOTHING
        self._left = self.leaves.count(_NOTHING)

    def missing(self) -> list[int]:
        return [index for index, leaf in enumerate(self.leaves) if leaf == _NOTHING]

    @property
    def complete(self) -> bool:
        return self._left == 0

    def put(self, index: int, data: Buffer, leaf: bytes) -> None:
        if self.leaves[index] != _NOTHING:
            return
        with self.path.open("r+b", buffering=0) as file:
            _write(file.fileno(), data, index * CHUNK)
        with _leaves(self.path).open("r+b", buffering=0) as file:
            _write(file.fileno(), leaf, index * HASH_SIZE)
        self.leaves[index] = leaf
        self._left -= 1

    def sync(self) -> None:
        with self.path.open("r+b", buffering=0) as file:
            os.fsync(file.fileno())


def _leaves(content: Path) -> Path:
    return content.with_name(content.name + ".leaves")


def _open(path: Path, size: int) -> FileIO:
    """Open a file of exactly ``size`` bytes to read and write; what is new in it is zero and takes no space yet."""
    file = FileIO(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+")
    file.truncate(size)
    return file


def _write(handle: int, data: Buffer, offset: int) -> None:
    rest = memoryview(data)
    while rest:
        written = os.pwrite(handle, rest, offset)
        rest, offset = rest[written:], offset + written


def _read(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while data := file.read(CHUNK):
            yield data


def _chunks(buffers: Iterable[Buffer]) -> Iterator[Buffer]:
    """Cut buffers of any sizes into chunks; whole chunks pass through uncopied."""
    rest = bytearray()
    for buffer in buffers:
        view = memoryview(buffer).cast("B")
        if rest:
            taken = CHUNK - len(rest)
            rest += view[:taken]
            view = view[taken:]
            if len(rest) < CHUNK:
                continue
            yield rest
            rest = bytearray()
        while len(view) >= CHUNK:
            yield view[:CHUNK]
            view = view[CHUNK:]
        rest += view
    if rest:
        yield rest
