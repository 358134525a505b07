"""What the chain's database survives: crashes at every write, torn logs, flipped bits, a full disk."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import plyvel
import pytest

from blyan_node.chain.outcome import Accepted
from blyan_node.chain.replica import Replica
from blyan_node.chain.store import Batch, Prefix, Store
from blyan_node.errors import AlreadyRunning, DiskFull, StoreError
from tests.support.chains import GENESIS, KEYS, NETWORK, Forge
from tests.unit.test_replica import random_dag, summary, write

BLOCKS = random_dag(3, 25)


class Crash(Exception):
    """The process dies here."""


class CrashingStore(Store):
    """Dies at the nth write: before the batch reaches LevelDB, or right after."""

    def __init__(self, directory: Path, *, at: int, after: bool) -> None:
        super().__init__(directory)
        self.left, self.after = at, after

    def write(self, batch: Batch) -> None:
        self.left -= 1
        if self.left >= 0 or self.after:
            super().write(batch)
        if self.left < 0:
            raise Crash


def accept_all(replica: Replica, blocks, accepted: list) -> None:
    for block in blocks:
        replica.accept(block.raw)
        accepted.append(block)


def read_all(directory: Path) -> None:
    with Replica.open(directory, GENESIS) as replica:
        for block in replica.blocks(limit=1000):
            replica.has(block.id)


def check_consistent(replica: Replica) -> None:
    """Every index says the same about the same blocks."""
    blocks = replica.blocks(limit=1000)
    ids = {block.id for block in blocks}
    store = replica._tables._store
    assert replica.count() == len(blocks)
    assert {key[1:] for key in store.keys(Prefix.BLOCK.key())} == ids
    assert {key[1:] for key in store.keys(Prefix.NODE.key())} == ids
    assert {key[-32:] for key in store.keys(Prefix.AUTHOR.key())} == ids
    assert set(replica.heads()) == (ids - {p for b in blocks for p in b.header.parents} or {NETWORK})
    for block in blocks:
        assert all(parent == NETWORK or parent in ids for parent in block.header.parents)


@pytest.mark.parametrize("after", [False, True])
def test_a_crash_at_any_write_loses_nothing_that_was_accepted(tmp_path, after):
    for at in range(1, len(BLOCKS) + 1):
        directory = tmp_path / str(at)
        store = CrashingStore(directory, at=at, after=after)
        replica = Replica(store, GENESIS)
        accepted = []
        with pytest.raises(Crash):
            accept_all(replica, BLOCKS, accepted)
        assert replica.count() == len(accepted)  # memory did not run ahead of the disk
        store.close()
        with Replica.open(directory, GENESIS) as again:
            check_consistent(again)
            assert [block for block in accepted if not again.has(block.id)] == []
            assert again.count() == len(accepted) + after
            for block in BLOCKS:
                again.accept(block.raw)
            check_consistent(again)
            assert again.count() == len(BLOCKS)


def test_a_crash_while_orphans_are_adopted(tmp_path):
    for at in range(1, len(BLOCKS) + 1):
        directory = tmp_path / str(at)
        store = CrashingStore(directory, at=at, after=False)
        replica = Replica(store, GENESIS)
        with pytest.raises(Crash):
            accept_all(replica, BLOCKS[::-1], [])
        store.close()
        with Replica.open(directory, GENESIS) as again:
            check_consistent(again)
            for block in BLOCKS:
                again.accept(block.raw)
            assert again.count() == len(BLOCKS)


def test_a_failed_write_leaves_the_replica_usable(tmp_path):
    store = CrashingStore(tmp_path / "chain", at=3, after=False)
    with Replica(store, GENESIS) as replica:
        for block in BLOCKS[:2]:
            replica.accept(block.raw)
        before = summary(replica)
        with pytest.raises(Crash):
            replica.accept(BLOCKS[2].raw)
        assert summary(replica) == before
        store.left = 1000
        assert isinstance(replica.accept(BLOCKS[2].raw), Accepted)
        check_consistent(replica)


def test_a_log_cut_off_anywhere_opens_with_what_is_before_the_cut(tmp_path):
    original = tmp_path / "original"
    with Replica.open(original, GENESIS) as replica:
        for block in BLOCKS:
            replica.accept(block.raw)
    (log,) = original.glob("*.log")
    content = log.read_bytes()
    counts = set()
    for cut in range(0, len(content), 211):
        log.write_bytes(content[:cut])
        copy = tmp_path / f"cut{cut}"
        subprocess.run(["cp", "-r", original, copy], check=True)
        with Replica.open(copy, GENESIS) as again:
            check_consistent(again)
            counts.add(again.count())
    assert len(counts) >= len(BLOCKS) - 1


def test_a_flipped_bit_in_the_log_is_found(tmp_path):
    with Replica.open(tmp_path / "chain", GENESIS) as replica:
        for block in BLOCKS:
            replica.accept(block.raw)
    (log,) = (tmp_path / "chain").glob("*.log")
    content = bytearray(log.read_bytes())
    content[len(content) // 2] ^= 1
    log.write_bytes(content)
    with pytest.raises(StoreError, match=r"move .*chain away"):
        Replica.open(tmp_path / "chain", GENESIS)


def compacted(directory: Path) -> list[Path]:
    with Replica.open(directory, GENESIS) as replica:
        for block in BLOCKS:
            replica.accept(block.raw)
    database = plyvel.DB(str(directory))
    database.compact_range()
    database.close()
    return sorted(directory.glob("*.ldb"))


def test_a_damaged_table_is_found(tmp_path):
    tables = compacted(tmp_path / "chain")
    for table in tables:
        content = bytearray(table.read_bytes())
        for at in range(10, len(content) // 2, 50):
            content[at] ^= 0xFF
        table.write_bytes(content)
    with pytest.raises(StoreError, match=r"move .*chain away"):
        read_all(tmp_path / "chain")


@pytest.mark.parametrize("name", ["CURRENT", "MANIFEST-*", "*.ldb"])
def test_a_missing_or_emptied_file_is_found(tmp_path, name):
    compacted(tmp_path / "chain")
    for path in (tmp_path / "chain").glob(name):
        path.write_bytes(b"")
    with pytest.raises(StoreError, match=r"move .*chain away"):
        read_all(tmp_path / "chain")


def test_an_undecodable_value_is_damage_and_not_the_blocks_fault(tmp_path):
    with Replica.open(tmp_path / "chain", GENESIS) as replica:
        for block in BLOCKS:
            replica.accept(block.raw)
    for prefix in (Prefix.STATE, Prefix.BRANCH, Prefix.BLOCK, Prefix.NODE):
        with Store(tmp_path / "chain") as store:
            key = next(iter(store.keys(prefix.key())))
            value = store.get(key)
            store.write([(key, b"\xc1")])
        with pytest.raises(StoreError, match=r"move .*chain away"):
            read_all(tmp_path / "chain")
        with Store(tmp_path / "chain") as store:
            store.write([(key, value)])
    Replica.open(tmp_path / "chain", GENESIS).close()


def test_keys_are_iterated_by_prefix(tmp_path):
    with Store(tmp_path / "chain") as store:
        keys = [b"a", b"a\x00", b"a\xff", b"a\xff\x00", b"a\xff\xff\xff", b"b", b"\xff", b"\xff\xff"]
        store.write([(key, b"") for key in keys])
        for prefix in (b"a", b"a\xff", b"\xff", b"c", b"a\xff\xff\xff"):
            assert list(store.keys(prefix)) == sorted(key for key in keys if key.startswith(prefix))
        assert list(store.keys(b"a", after=b"a\xff")) == [b"a\xff\x00", b"a\xff\xff\xff"]
        store.write([(b"a", None), (b"b", b"value")])
        assert store.get(b"a") is None
        assert store.get(b"b") == b"value"


def test_no_space_left_is_told_as_such(tmp_path, monkeypatch):
    class Full:
        def write_batch(self):
            raise plyvel.IOError(b"IO error: 000005.log: No space left on device".decode())

        def close(self):
            pass

    with Store(tmp_path / "chain") as store:
        real, store._database = store._database, Full()
        with pytest.raises(DiskFull, match="free some"):
            store.write([(b"a", b"b")])
        store._database = real


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """No file of this process can grow beyond so many bytes: a write ends halfway, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_is_written_after_a_write_that_ended_halfway_is_there_on_the_next_opening(tmp_path):
    with Store(tmp_path / "chain") as store:
        store.write([(b"before", b"1" * 1000)])
        (log,) = (tmp_path / "chain").glob("*.log")
        with files_of_at_most(log.stat().st_size + 500):
            for _ in range(3):
                with pytest.raises(StoreError, match="too large"):
                    store.write([(b"failed", b"2" * 1000)])
            assert store.get(b"before") == b"1" * 1000
            assert list(store.keys(b"")) == [b"before"]
        store.write([(b"after", b"3" * 1000)])
    with Store(tmp_path / "chain") as store:
        assert list(store.keys(b"")) == [b"after", b"before"]
        assert {path.suffix for path in (tmp_path / "chain").iterdir()} <= {".log", ".ldb", ".old", ""}
        assert not (tmp_path / "chain" / "room").exists()


def test_a_store_that_could_not_be_mended_is_tried_again(tmp_path, monkeypatch):
    with Store(tmp_path / "chain") as store:
        store.write([(b"before", b"1")])
        store._torn = True
        with monkeypatch.context() as patch:
            patch.setattr(plyvel, "DB", failing("MANIFEST-000007: No space left on device"))
            for _ in range(2):
                with pytest.raises(DiskFull, match="free some"):
                    store.write([(b"after", b"2")])
                with pytest.raises(DiskFull, match="free some"):
                    store.get(b"before")
        assert store.get(b"before") == b"1"
        store.write([(b"after", b"2")])
        assert list(store.keys(b"")) == [b"after", b"before"]


def failing(text):
    def fail(*_arguments, **_options):
        raise plyvel.IOError(f"IO error: {text}")

    return fail


KILLED = """
import sys
from pathlib import Path
from blyan_node.chain.replica import Replica
from tests.support.chains import GENESIS, KEYS
from tests.unit.test_replica import write

replica = Replica.open(Path(sys.argv[1]), GENESIS)
while True:
    block = write(replica, KEYS[replica.count() % 8])
    replica.flush()
    sys.stdout.buffer.write(block.id)
    sys.stdout.buffer.flush()
"""


def test_kill_9_loses_nothing_that_was_flushed(tmp_path):
    acknowledged = []
    for _ in range(3):
        with subprocess.Popen([sys.executable, "-c", KILLED, tmp_path / "chain"], stdout=subprocess.PIPE) as process:
            acknowledged += [process.stdout.read(32) for _ in range(20)]
            with pytest.raises(AlreadyRunning):
                Replica.open(tmp_path / "chain", GENESIS)
            process.kill()
            rest = process.stdout.read()
            acknowledged += [rest[at : at + 32] for at in range(0, len(rest) // 32 * 32, 32)]
    with Replica.open(tmp_path / "chain", GENESIS) as replica:
        check_consistent(replica)
        assert [id for id in acknowledged if not replica.has(id)] == []
        assert len(acknowledged) >= 60
        assert not any(replica.is_equivocator(key.address) for key in KEYS)
        write(replica, KEYS[0])


def test_flush_may_run_while_blocks_are_accepted(tmp_path):
    forge = Forge()
    with Replica.open(tmp_path / "chain", GENESIS) as replica:
        replica.flush()
        replica.accept(forge.block().raw)
        replica.flush()
        check_consistent(replica)
