"""Pruned chains, and chains that begin with a snapshot: they go on, verify, and refuse all that is not proven."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from blyan_node.api.chain_json import block_json
from blyan_node.api.chain_service import BlockInfo
from blyan_node.chain.block import decode_block, decode_stored, strip
from blyan_node.chain.checkpoint import Checkpoint
from blyan_node.chain.cut import Certificate, Cut
from blyan_node.chain.evidence import check_evidence, of_blocks
from blyan_node.chain.records import Transfer
from blyan_node.chain.replica import Replica
from blyan_node.chain.retention import PAGE, Retention, paged
from blyan_node.chain.snapshot import SnapshotStart
from blyan_node.chain.state import state_of_rows
from blyan_node.chain.store import Prefix, Store
from blyan_node.chain.validators import ValidatorSet
from blyan_node.chain.verify import Fault, verify
from blyan_node.errors import CodecError, LocalError, RuleError, SignatureError, StoreError
from tests.support.decided import GENESIS, NETWORK, USERS, VALIDATORS, Decided, write_chain

ARCHIVE = Retention(every=4, bodies=None)
PRUNING = Retention(every=2, bodies=3)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine cuts, all bodies, snapshots of cuts 4 and 8."""
    directory = tmp_path_factory.mktemp("sound") / "chain"
    write_chain(directory, ARCHIVE)
    return directory


@pytest.fixture
def old(sound: Path, tmp_path: Path) -> Iterator[Replica]:
    shutil.copytree(sound, tmp_path / "old")
    with Replica.open(tmp_path / "old", GENESIS, retention=ARCHIVE) as replica:
        yield replica


def rows_of(replica: Replica, k: int) -> list[bytes]:
    first = replica.finals.page(k, 0)
    assert first is not None
    pages = [replica.finals.page(k, number) for number in range(first.pages)]
    return [row for page in pages if page for row in page.rows]


def cuts_of(replica: Replica) -> Iterator[tuple[Cut, Certificate, ValidatorSet]]:
    deciders = ValidatorSet(GENESIS.validators)
    for k in range(1, replica.final.k + 1):
        stored = replica.finals.stored(k)
        assert stored is not None
        yield stored.cut, stored.certificate, deciders
        deciders = stored.deciders


def stubs_of(replica: Replica, through: int) -> list[bytes]:
    ids = [id for k in range(1, through + 1) for _, id in replica.window_of(k)]
    return [raw for id in ids if (raw := replica.stub(id))]


def replay(old: Replica, new: Replica, through: int) -> None:
    """Bring the cuts after the last one, with their blocks; beyond the last of the old chain, what is tentative."""
    for k in range(new.final.k + 1, through + 1):
        for _, id in old.window_of(k):
            new.accept(old.get(id) or b"")
        if (stored := old.finals.stored(k)) is not None:
            new.commit(stored.cut, stored.certificate)


def take_all(take: Callable[..., None], items: Iterable[Any]) -> None:
    for item in items:
        take(*item) if isinstance(item, tuple) else take(item)


def begin(old: Replica, directory: Path, k: int = 8, checkpoint: Checkpoint | None = None) -> SnapshotStart:
    start = SnapshotStart(directory, GENESIS, rows_of(old, k), checkpoint=checkpoint)
    for each in cuts_of(old):
        if each[0].k == start.next_cut:
            start.take_cut(*each)
    return start


def build(old: Replica, directory: Path, k: int = 8) -> None:
    with begin(old, directory, k) as start:
        take_all(start.take_stub, stubs_of(old, k))
        start.finish()


def faults(directory: Path) -> list[Fault]:
    return [finding for finding in verify(directory, GENESIS) if isinstance(finding, Fault)]


# What is sound


@pytest.mark.parametrize("k", [4, 8])
def test_a_chain_that_began_with_a_snapshot_goes_on_like_the_old_one(old: Replica, tmp_path: Path, k: int):
    build(old, tmp_path / "new", k)
    with Replica.open(tmp_path / "new", GENESIS) as new:
        stored = old.finals.stored(k)
        assert stored is not None
        assert (new.final.k, new.final.id, new.final.root) == (k, stored.cut.id, stored.root)
        assert [new.finals.stored(each) for each in range(1, k + 1)] == [
            old.finals.stored(each) for each in range(1, k + 1)
        ]
        assert [new.finals.anchor(each) for each in range(k + 1)] == [old.finals.anchor(each) for each in range(k + 1)]
        replay(old, new, old.final.k + 1)
        assert (new.final.root, new.heads(), new.count()) == (old.final.root, old.heads(), old.count())
        assert new.view().tentative.rows() == old.view().tentative.rows()
        Decided(new).decide()
        assert new.final.k == old.final.k + 1
    assert faults(tmp_path / "new") == []


def test_a_pruned_chain_verifies_and_keeps_what_proves_it(tmp_path: Path):
    write_chain(tmp_path / "chain", PRUNING)
    with Replica.open(tmp_path / "chain", GENESIS, retention=PRUNING) as replica:
        assert replica.finals.snapshots == [4, 6, 8]
        assert replica.finals.stripped == replica.finals.base == 6
        for k in range(1, 10):
            for _, id in replica.window_of(k):
                block = replica.block(id)
                assert block is not None
                assert block.id == id
                assert block.is_stripped == (k <= 6)
                assert (replica.get(id) is None) == (k <= 6)
                assert (block_json(BlockInfo(block, k))["records"] is None) == (k <= 6)
        cheat = next(iter(replica.final.state.slashed))
        fork = replica.fork_of(cheat)
        assert fork is not None
        assert check_evidence(of_blocks(*fork), NETWORK) == cheat
    assert faults(tmp_path / "chain") == []


def test_a_new_node_can_begin_at_a_pruned_one(tmp_path: Path):
    write_chain(tmp_path / "old", PRUNING)
    with Replica.open(tmp_path / "old", GENESIS, retention=PRUNING) as old:
        build(old, tmp_path / "new")
        with Replica.open(tmp_path / "new", GENESIS, retention=PRUNING) as new:
            assert new.final.state.rows() == rows_of(old, 8)
    assert faults(tmp_path / "new") == []


def test_adopting_takes_along_what_was_signed_and_what_is_tentative(old: Replica, tmp_path: Path):
    build(old, tmp_path / "new")
    with Replica.open(tmp_path / "mine", GENESIS) as mine:
        replay(old, mine, 7)
        validator = Decided(mine)
        block = validator.write(VALIDATORS[0], validator.record(USERS[0], Transfer(VALIDATORS[1].address, 1)))
        mine.finals.set_abstain(7)
        validator.log(validator.propose(), VALIDATORS[0])
        votes = mine.finals.vote_log()
        mine.adopt(tmp_path / "new")
        assert mine.final.k == 8
        assert (mine.finals.vote_log(), mine.finals.abstain_through()) == (votes, 7)
        assert mine.has(block.id)
        assert not (tmp_path / "new").exists()
    with Replica.open(tmp_path / "mine", GENESIS) as mine:
        assert mine.final.k == 8
        assert mine.has(block.id)


def test_a_swap_that_fails_leaves_the_replica_as_it_was(old: Replica, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(_self: Path, _target: Path) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    build(old, tmp_path / "new")
    with Replica.open(tmp_path / "mine", GENESIS) as mine:
        replay(old, mine, 2)
        heads = mine.heads()
        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", fail)
            with pytest.raises(StoreError, match="cannot put"):
                mine.adopt(tmp_path / "new")
        assert (mine.final.k, mine.heads()) == (2, heads)
        replay(old, mine, 3)
        assert mine.final.k == 3


@pytest.mark.parametrize("moved", [False, True])
def test_a_swap_that_a_crash_cut_off_is_undone_or_finished(old: Replica, tmp_path: Path, moved: bool):
    build(old, tmp_path / "new")
    Replica.open(tmp_path / "mine", GENESIS).close()
    (tmp_path / "mine").rename(tmp_path / "mine.old")
    if moved:
        (tmp_path / "new").rename(tmp_path / "mine")
    with Replica.open(tmp_path / "mine", GENESIS) as mine:
        assert mine.final.k == (8 if moved else 0)
    assert not (tmp_path / "mine.old").exists()


def test_pages_hold_all_rows_and_are_bounded():
    rows = [bytes([i]) * size for i, size in enumerate((10, PAGE, 10, PAGE // 2, PAGE // 2, 1))]
    pages = list(paged(rows))
    assert [row for page in pages for row in page.rows] == rows
    assert all(len(page.rows) == 1 or sum(map(len, page.rows)) <= PAGE for page in pages)
    assert {page.pages for page in pages} == {len(pages)}


# What is not


def test_a_stripped_block_is_no_block_for_peers(old: Replica):
    raw = old.get(old.window_of(9)[0][1]) or b""
    assert decode_stored(strip(raw)).id == decode_block(raw).id
    with pytest.raises(CodecError, match="without its body"):
        decode_block(strip(raw))


def test_rows_of_another_state_are_refused(old: Replica, tmp_path: Path):
    state = state_of_rows(rows_of(old, 8))
    one, other = state.accounts[USERS[0].address], state.accounts[USERS[1].address]
    state.accounts[USERS[0].address] = replace(one, balance=one.balance + 1)
    state.accounts[USERS[1].address] = replace(other, balance=other.balance - 1)
    with (
        SnapshotStart(tmp_path / "new", GENESIS, state.rows()) as start,
        pytest.raises(RuleError, match="rows are not"),
    ):
        take_all(start.take_cut, cuts_of(old))
    with pytest.raises(RuleError, match="begin with its head"):
        SnapshotStart(tmp_path / "newer", GENESIS, rows_of(old, 8)[::-1])


def test_cuts_that_are_not_proven_are_refused(old: Replica, tmp_path: Path):
    cuts = list(cuts_of(old))
    (one, proof, deciders), second = cuts[0], cuts[1]
    others = ValidatorSet(deciders.members[:3])
    weak = replace(proof, signatures=proof.signatures[:2])
    forged = replace(proof, signatures=(replace(proof.signatures[0], signature=bytes(65)), *proof.signatures[1:]))
    for number, (wrong, why) in enumerate(
        [
            (second, "cut 1 was due"),
            ((replace(one, prev_cut=bytes(32)), proof, deciders), "does not follow"),
            ((one, proof, others), "other validators"),
            ((one, weak, deciders), "no more than 2/3"),
            ((replace(one, heads=one.heads[:1] if len(one.heads) > 1 else (bytes(32),)), proof, None), "another cut"),
        ]
    ):
        with SnapshotStart(tmp_path / f"{number}", GENESIS, rows_of(old, 8)) as start:
            with pytest.raises(RuleError, match=why):
                start.take_cut(*wrong)
    with SnapshotStart(tmp_path / "forged", GENESIS, rows_of(old, 8)) as start, pytest.raises(SignatureError):
        start.take_cut(one, forged, deciders)


def test_blocks_that_were_not_decided_are_refused(old: Replica, tmp_path: Path):
    stubs = stubs_of(old, 8)
    tail = [raw for _, id in old.window_of(10) if (raw := old.stub(id))]
    whole = old.get(old.window_of(1)[0][1]) or b""
    unsigned = bytearray(stubs[0])
    unsigned[-20] ^= 1
    for number, (sent, why) in enumerate(
        [
            ([tail[0], *stubs], "do not lie under cut 1"),
            ([*stubs[1:]], "missing"),
            ([whole], "with its body"),
            ([*stubs, tail[0]], "does not lie under cut 8"),
            ([bytes(unsigned)], "did not sign|signature"),
        ]
    ):
        with begin(old, tmp_path / f"{number}") as start, pytest.raises(RuleError, match=why):
            take_all(start.take_stub, sent)


def test_what_is_incomplete_is_not_finished(old: Replica, tmp_path: Path):
    with begin(old, tmp_path / "new") as start:
        take_all(start.take_stub, stubs_of(old, 8)[:-1])
        with pytest.raises(RuleError, match="ended at cut 7 of 8"):
            start.finish()


def test_a_checkpoint_is_kept_by_commits_by_snapshots_and_on_opening(old: Replica, tmp_path: Path):
    right, wrong = Checkpoint(3, old.finals.anchor(3)[0]), Checkpoint(3, bytes(32))
    begin(old, tmp_path / "right", checkpoint=right).close()
    with pytest.raises(RuleError, match="where the checkpoint says"):
        begin(old, tmp_path / "wrong", checkpoint=wrong)
    with Replica.open(tmp_path / "replayed", GENESIS, checkpoint=wrong) as replica:
        for k in range(1, 4):
            assert replica.is_below_checkpoint
            if k < 3:
                replay(old, replica, k)
        with pytest.raises(RuleError, match="where the checkpoint says"):
            replay(old, replica, 3)
    old.close()
    Replica.open(old.directory, GENESIS, checkpoint=right).close()
    with pytest.raises(LocalError, match="not the one that the checkpoint names"):
        Replica.open(old.directory, GENESIS, checkpoint=wrong)


def test_a_damaged_snapshot_or_pruning_is_told(tmp_path: Path):
    write_chain(tmp_path / "chain", PRUNING)
    with Store(tmp_path / "chain") as store:
        key = Prefix.SNAPSHOT.key(6, 0)
        whole = store.get(key) or b""
        store.write([(key, whole[:-1] + bytes([whole[-1] ^ 1]))])
    assert any("snapshot of cut 6" in fault.where for fault in faults(tmp_path / "chain"))
    with Store(tmp_path / "chain") as store:
        store.write([(key, whole), (Prefix.STRIPPED.key(), (3).to_bytes(8))])
    assert {fault.what for fault in faults(tmp_path / "chain")} >= {"its body is missing"}
    with Store(tmp_path / "chain") as store:
        store.write([(Prefix.STRIPPED.key(), (9).to_bytes(8))])
    assert any("no snapshot stands for them" in fault.what for fault in faults(tmp_path / "chain"))
