from __future__ import annotations

import errno
import hashlib
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blyan_node.chain import blobs as module
from blyan_node.chain.blobs import CHUNK, MAX_PROOF, BlobStore, chunk_count
from blyan_node.chain.merkle import Tree, leaf_hash
from blyan_node.chain.records import MAX_BLOB, BlobRef
from blyan_node.errors import DiskFull, IntegrityError, StoreError

SIZES = [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5]


def content(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


@pytest.fixture
def source(tmp_path):
    return BlobStore(tmp_path / "source")


@pytest.fixture
def store(tmp_path):
    return BlobStore(tmp_path / "store")


def copy(source: BlobStore, store: BlobStore, ref: BlobRef, indexes=None) -> None:
    (held,) = (each for each in source.refs() if each.root == ref.root)
    for index in store.missing(ref) if indexes is None else indexes:
        store.put_chunk(ref, index, *source.get_chunk(held, index))


@pytest.mark.parametrize("size", SIZES)
def test_a_blob_travels_chunk_by_chunk(source, store, tmp_path, size):
    data = content(size)
    file = tmp_path / "file"
    file.write_bytes(data)
    ref = source.add(file)
    assert ref.size == size
    chunks = [data[at : at + CHUNK] for at in range(0, size, CHUNK)]
    assert ref.root == Tree([leaf_hash(chunk) for chunk in chunks]).root
    assert not store.has(ref)
    assert store.missing(ref) == list(range(len(chunks)))
    for index in random.Random(1).sample(range(len(chunks)), len(chunks)):
        chunk, proof = source.get_chunk(ref, index)
        assert chunk == chunks[index]
        assert len(proof) <= MAX_PROOF
        whole = store.put_chunk(ref, index, chunk, proof)
        assert whole == store.has(ref)
    assert store.has(ref)
    assert store.missing(ref) == []
    assert store.path(ref).read_bytes() == data
    assert store.refs() == (ref,)
    store.verify(ref)
    assert not list(tmp_path.glob("*/*.part*"))


def test_an_empty_blob_is_whole_at_once_and_has_a_root(store):
    ref = store.add([])
    assert ref == BlobRef(hashlib.sha256(b"").digest(), 0)
    assert store.path(ref).read_bytes() == b""
    store.remove(ref)
    store.open_partial(ref)
    assert store.has(ref)
    with pytest.raises(StoreError):
        store.get_chunk(ref, 0)


def test_the_largest_blob_has_proofs_of_the_stated_bound():
    assert (chunk_count(BlobRef(bytes(32), MAX_BLOB)) - 1).bit_length() == MAX_PROOF


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 2 * CHUNK), max_size=6))
def test_how_buffers_are_cut_does_not_matter(store, sizes):
    data = content(sum(sizes))
    buffers, at = [], 0
    for number, size in enumerate(sizes):
        buffers.append([bytes, bytearray, memoryview][number % 3](data[at : at + size]))
        at += size
    ref = store.add(iter(buffers))
    assert ref == store.add([data])
    assert store.path(ref).read_bytes() == data


def test_adding_twice_keeps_one(store):
    ref = store.add([b"a" * 10])
    used = store.used()
    assert store.add([b"a" * 10]) == ref
    assert store.used() == used
    store.verify(ref)


def test_adding_does_not_hold_all_in_memory(store):
    alive = 0

    class Counted(bytearray):
        def __init__(self, size):
            nonlocal alive
            super().__init__(size)
            alive += 1

        def __del__(self):
            nonlocal alive
            alive -= 1

    def buffers():
        for _ in range(20):
            yield Counted(CHUNK // 2)
            assert alive <= 4

    assert store.add(buffers()).size == 10 * CHUNK


# Wrong chunks


def test_a_wrong_chunk_is_refused_and_nothing_is_written(source, store):
    ref = source.add([content(3 * CHUNK + 5)])
    good, proof = source.get_chunk(ref, 1)
    flipped = bytearray(good)
    flipped[-1] ^= 1
    last, last_proof = source.get_chunk(ref, 3)
    for index, data, path in [
        (1, bytes(flipped), proof),
        (0, good, proof),
        (1, good[:-1], proof),
        (1, good + b"x", proof),
        (1, good, proof[:-1]),
        (1, good, (*proof, bytes(32))),
        (1, good, (bytes(32), *proof[1:])),
        (-1, good, proof),
        (4, good, proof),
        (3, last + b"x", last_proof),
        (3, b"", last_proof),
    ]:
        with pytest.raises(IntegrityError):
            store.put_chunk(ref, index, data, path)
    assert store.missing(ref) == [0, 1, 2, 3]
    copy(source, store, ref)
    store.verify(ref)


def test_a_blob_under_a_wrong_size_never_completes(source, store):
    ref = source.add([content(2 * CHUNK)])
    for size in (0, CHUNK, 2 * CHUNK - 1, 2 * CHUNK + 1, 3 * CHUNK):
        lie = BlobRef(ref.root, size)
        with pytest.raises(IntegrityError):
            copy(source, store, lie, [0, 1])
        assert not source.has(lie)
        assert not store.has(lie)
    copy(source, store, ref)
    store.verify(ref)


def test_an_empty_claim_does_not_stand_for_a_root(source, store):
    lie = BlobRef(source.add([b"something"]).root, 0)
    with pytest.raises(IntegrityError):
        store.open_partial(lie)
    assert not store.has(lie)


# Interruptions


def test_a_download_goes_on_where_it_stopped(source, store):
    ref = source.add([content(5 * CHUNK + 7)])
    copy(source, store, ref, [0, 3, 5])
    again = BlobStore(store.directory)
    assert again.missing(ref) == [1, 2, 4]
    copy(source, again, ref)
    again.verify(ref)


def test_chunks_that_a_power_loss_took_are_fetched_again(source, store):
    ref = source.add([content(5 * CHUNK)])
    copy(source, store, ref, [0, 1, 2])
    (part,) = store.directory.glob("*.part")
    with part.open("r+b") as file:
        file.seek(CHUNK + 17)
        file.write(b"\0" * 100)  # written, never synced
    with part.with_name(part.name + ".leaves").open("r+b") as file:
        file.seek(2 * 32)
        file.write(bytes(32))
    again = BlobStore(store.directory)
    assert again.missing(ref) == [1, 2, 3, 4]
    copy(source, again, ref)
    again.verify(ref)


def test_part_files_of_the_wrong_size_do_no_harm(source, store):
    ref = source.add([content(3 * CHUNK)])
    copy(source, store, ref, [0])
    for path in store.directory.iterdir():
        path.write_bytes(path.read_bytes()[:-5] + b"")
        path.write_bytes(path.read_bytes() + bytes(70))
    again = BlobStore(store.directory)
    copy(source, again, ref)
    again.verify(ref)


def crashes(step: int):
    """Make the nth of the calls that change the disk raise, once."""
    left = [step]

    def wrap(function):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return call

    return wrap


@pytest.mark.parametrize("step", range(1, 25))
def test_a_crash_at_any_step_loses_no_whole_blob_and_names_none_that_is_not(tmp_path, monkeypatch, step):
    source = BlobStore(tmp_path / "source")
    ref, kept = source.add([content(2 * CHUNK + 3)]), source.add([b"kept"])
    store = BlobStore(tmp_path / "store")
    store.add([b"kept"])
    with monkeypatch.context() as patch:
        wrap = crashes(step)
        for name in ("fsync", "pwrite"):
            patch.setattr(module.os, name, wrap(getattr(os, name)))
        for name in ("replace", "unlink"):
            patch.setattr(Path, name, wrap(getattr(Path, name)))
        try:
            copy(source, store, ref)
            store.add([b"more"])
        except KeyboardInterrupt:
            pass
    again = BlobStore(tmp_path / "store")
    for whole in again.refs():
        again.verify(whole)
    assert kept in again.refs()
    copy(source, again, ref)
    again.verify(ref)
    again.add([b"more"])
    assert len(again.refs()) == 3
    assert all(len(path.name.split(".")[0]) == 64 for path in again.directory.iterdir())


KILLED = """
import sys
from pathlib import Path
from blyan_node.chain.blobs import BlobStore, CHUNK
store, source = BlobStore(Path(sys.argv[1])), BlobStore(Path(sys.argv[2]))
(ref,) = source.refs()
for index in store.missing(ref):
    store.put_chunk(ref, index, *source.get_chunk(ref, index))
    print(index, flush=True)
"""


def test_kill_9_leaves_a_partial_blob_that_is_resumed(source, store):
    ref = source.add([content(16 * CHUNK)])
    done = []
    for _ in range(3):
        args = [sys.executable, "-c", KILLED, store.directory, source.directory]
        with subprocess.Popen(args, stdout=subprocess.PIPE) as process:
            done += [int(process.stdout.readline()) for _ in range(3)]
            process.kill()
    assert len(set(done)) == len(done)  # nothing is fetched twice
    if not store.has(ref):
        assert not set(done) & set(store.missing(ref))
        assert store.refs() == ()
    copy(source, store, ref)
    store.verify(ref)


# Tampering


@pytest.mark.parametrize("at", [0, CHUNK, 2 * CHUNK + 9])
def test_tampered_bytes_are_found_and_never_served(store, at):
    ref = store.add([content(2 * CHUNK + 10)])
    with store.path(ref).open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))
    for fresh in (store, BlobStore(store.directory)):
        with pytest.raises(IntegrityError, match=f"in chunks {at // CHUNK}: it was changed"):
            fresh.verify(ref)
        with pytest.raises(IntegrityError):
            fresh.get_chunk(ref, at // CHUNK)
        assert fresh.get_chunk(ref, (at // CHUNK + 1) % 3)


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(bytes(96))])
def test_lost_leaves_are_made_anew_from_the_content(store, damage):
    ref = store.add([content(2 * CHUNK + 10)])
    damage(store.path(ref).with_name(ref.root.hex() + ".leaves"))
    again = BlobStore(store.directory)
    again.verify(ref)
    assert again.get_chunk(ref, 2)[0] == content(2 * CHUNK + 10)[2 * CHUNK :]


def test_lost_leaves_and_changed_content_are_an_integrity_error(store):
    ref = store.add([content(CHUNK + 10)])
    path = store.path(ref)
    path.with_name(path.name + ".leaves").unlink()
    path.write_bytes(bytes(CHUNK + 10))
    with pytest.raises(IntegrityError):
        BlobStore(store.directory).verify(ref)


def test_a_truncated_file_is_not_here_and_is_fetched_again(source, store):
    ref = source.add([content(2 * CHUNK)])
    copy(source, store, ref)
    os.truncate(store.path(ref), CHUNK)
    assert not store.has(ref)
    with pytest.raises(StoreError, match="is not in"):
        store.path(ref)
    copy(source, store, ref)
    store.verify(ref)


# Room


def test_the_cap_holds_for_whole_and_partial_blobs(source, tmp_path):
    capped = BlobStore(tmp_path / "capped", cap=3 * CHUNK)
    ref = capped.add([content(2 * CHUNK)])
    with pytest.raises(DiskFull, match=str(3 * CHUNK)):
        capped.add(content(CHUNK // 4, seed) for seed in range(8))
    assert capped.refs() == (ref,)
    assert not list(capped.directory.glob("*.tmp"))
    large = source.add([content(2 * CHUNK, 1)])
    with pytest.raises(DiskFull, match="raise it"):
        capped.put_chunk(large, 0, *source.get_chunk(large, 0))
    capped.remove(ref)
    assert capped.used() == 0
    copy(source, capped, large, [0])
    with pytest.raises(DiskFull):
        capped.add([content(2 * CHUNK, 2)])  # the partial blob's room is taken
    copy(source, capped, large)
    capped.verify(large)


def test_a_blob_larger_than_the_disk_is_refused_at_once(store):
    with pytest.raises(DiskFull, match="free some space"):
        store.open_partial(BlobRef(bytes(32), MAX_BLOB))
    assert list(store.directory.iterdir()) == []


def test_a_full_disk_is_told_as_such(source, store, monkeypatch):
    ref = source.add([content(10)])
    chunk = source.get_chunk(ref, 0)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "pwrite", full)
        with pytest.raises(DiskFull, match="free some"):
            store.put_chunk(ref, 0, *chunk)
    assert store.missing(ref) == [0]
    assert store.put_chunk(ref, 0, *chunk)
    with monkeypatch.context() as patch:
        patch.setattr(module.os, "fsync", full)
        with pytest.raises(DiskFull):
            store.add([b"more"])
    assert store.refs() == (ref,)


def test_other_failures_of_the_disk_name_the_place(tmp_path, store):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="file"):
        BlobStore(tmp_path / "file" / "blobs")
    with pytest.raises(StoreError):
        store.add(tmp_path / "absent")


def test_removing(source, store):
    ref, other = source.add([content(CHUNK + 1)]), source.add([b"other"])
    copy(source, store, ref, [0])
    store.remove(ref)
    assert list(store.directory.iterdir()) == []
    assert store.missing(ref) == [0, 1]
    copy(source, store, ref)
    copy(source, store, other)
    store.remove(ref)
    store.remove(ref)
    assert store.refs() == (other,)
    store.remove(other)
    assert list(store.directory.iterdir()) == []
