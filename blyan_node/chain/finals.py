"""What is final, in the database: the cuts with their certificates, the state after the last, and what records did.

One atomic batch per cut. The state lies there as its rows (see :mod:`blyan_node.chain.state`), of which a cut changes
few; reading them back gives the state, and their root must be the one that was written with the cut.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from typing import Annotated, TypeVar

from blyan_node.chain.cut import Certificate, Cut
from blyan_node.chain.effects import LogEntry
from blyan_node.chain.genesis import MAX_VALIDATORS, Genesis
from blyan_node.chain.height import Base
from blyan_node.chain.ledger import Folded, Movement, Result, Void
from blyan_node.chain.records import Address, Hash
from blyan_node.chain.retention import Page, Retention, paged
from blyan_node.chain.state import State, genesis_state, root_of, state_of_rows
from blyan_node.chain.store import Batch, Prefix, Store
from blyan_node.chain.validators import ValidatorSet
from blyan_node.codec import Size, pack, unpack
from blyan_node.errors import CodecError, RuleError, StoreError

MAX_ENTRY = 1 << 21
"""Bytes of the largest entry: a cut with its certificate, or a row of the state."""
CACHED = 4096

T = TypeVar("T")
VOIDS = tuple(Void)


@dataclass(frozen=True)
class FinalCut:
    """The last final cut: its number, id and heads, the state after it and that state's root."""

    k: int
    id: bytes
    heads: tuple[bytes, ...]
    state: State
    root: bytes

    def base(self) -> Base:
        """Return what the next cut stands on."""
        deciding, following = ValidatorSet(self.state.validators), ValidatorSet(self.state.next_validators)
        return Base(self.k + 1, self.id, self.heads, self.root, following.hash, deciding)


@dataclass(frozen=True)
class StoredCut:
    """A final cut as it is kept: with the root of the state after it, who decides the next cut, and who may author."""

    cut: Cut
    certificate: Certificate
    root: Hash
    deciders: ValidatorSet
    authors: Annotated[tuple[Address, ...], Size(2 * MAX_VALIDATORS)]


@dataclass(frozen=True)
class StoredResult:
    """What became of a record in the cut where it took effect; where it never did, in the last cut that had it.

    ``void`` is a place in ``VOIDS``.
    """

    k: int
    void: int | None


class Finals:
    """See the module."""

    def __init__(self, store: Store, genesis: Genesis, retention: Retention | None = None) -> None:
        """Read the last cut and the state after it. Raises StoreError where these do not fit together."""
        self._store, self._genesis, self._retention = store, genesis, retention or Retention()
        self.stripped = int.from_bytes(store.get(Prefix.STRIPPED.key()) or b"")
        """The cut through which the bodies of blocks were pruned; 0 where all are here."""
        self.snapshots = sorted({int.from_bytes(key[1:9]) for key in store.keys(Prefix.SNAPSHOT.key())})
        """The cuts whose state is kept whole, in order."""
        self._anchors: OrderedDict[int, tuple[bytes, frozenset[bytes]]] = OrderedDict()
        state = genesis_state(genesis)
        self._rows: frozenset[bytes] = frozenset()  # in the database, which begins with the first cut
        self.last = FinalCut(0, genesis.network, (genesis.network,), state, state.root())
        for key in islice(store.keys(Prefix.CUT.key(), reverse=True), 1):
            self.last = self._read_last(int.from_bytes(key[1:]))

    def _read_last(self, k: int) -> FinalCut:
        stored = self.stored(k)
        rows = [row for key in self._store.keys(Prefix.ROW.key()) if (row := self._store.get(key)) is not None]
        self._rows = frozenset(rows)
        if stored is None or root_of(sorted(rows)) != stored.root:
            raise StoreError(self._store.damaged(f"the state is not the one after cut {k}"))
        try:
            state = state_of_rows(sorted(rows))
        except RuleError as error:
            raise StoreError(self._store.damaged(f"the state after cut {k}: {error}")) from error
        return FinalCut(k, stored.cut.id, stored.cut.heads, state, stored.root)

    # What is here

    def stored(self, k: int) -> StoredCut | None:
        """Return a final cut; None for cut 0, which is the genesis, and for what is not final here."""
        return self._read(StoredCut, Prefix.CUT.key(k))

    def cuts(self, *, before: int | None = None) -> Iterator[StoredCut]:
        """Iterate over the final cuts from the last, or from below ``before``, down to cut 1."""
        last = self.last.k if before is None else min(self.last.k, before - 1)
        for k in range(last, 0, -1):
            if (stored := self.stored(k)) is not None:
                yield stored

    def anchor(self, k: int) -> tuple[bytes, frozenset[bytes]]:
        """Return the id of a final cut and who may author on it. Raises StoreError where that cut is not here."""
        if (known := self._anchors.get(k)) is None:
            if k == 0:
                known = self._genesis.network, frozenset(genesis_state(self._genesis).authors())
            elif (stored := self.stored(k)) is not None:
                known = stored.cut.id, frozenset(stored.authors)
            else:
                raise StoreError(self._store.damaged(f"cut {k} is not in it"))
            self._anchors[k] = known
            if len(self._anchors) > CACHED:
                self._anchors.popitem(last=False)
        return known

    def cut_of(self, block: bytes) -> int | None:
        """Return the number of the cut that made a block final; None where none did yet."""
        raw = self._store.get(Prefix.FINAL.key(block))
        return None if raw is None else int.from_bytes(raw)

    def result(self, record: bytes) -> Result | None:
        """Return what finally became of a record or receipt, by id."""
        stored = self._read(StoredResult, Prefix.RESULT.key(record))
        if stored is None:
            return None
        return Result(record, None if stored.void is None else VOIDS[stored.void])

    def history(self, address: bytes, *, before: tuple[int, int] | None = None) -> Iterator[Movement]:
        """Iterate over an address's movements, the latest first, from before the place (k, index)."""
        prefix = Prefix.MOVEMENT.key(address)
        end = None if before is None else Prefix.MOVEMENT.key(address, *before)
        for key in self._store.keys(prefix, before=end, reverse=True):
            if (movement := self._read(Movement, key)) is not None:
                yield movement

    def page(self, k: int, number: int) -> Page | None:
        """Return a page of the snapshot of cut ``k``; None where it is not here."""
        return self._read(Page, Prefix.SNAPSHOT.key(k, number))

    # What becomes final

    def commit(self, cut: Cut, certificate: Certificate, blocks: Iterable[bytes], folded: Folded) -> FinalCut:
        """Write a cut that was decided on the last one, with its effect. Not synced: see :meth:`Store.flush`."""
        rows = frozenset(folded.state.rows())
        root = root_of(sorted(rows))
        deciders = ValidatorSet(folded.state.validators)
        stored = StoredCut(cut, certificate, root, deciders, folded.state.authors())
        batch: Batch = [(Prefix.CUT.key(cut.k), pack(stored))]
        batch += [final_entry(id, cut.k) for id in sorted(blocks)]
        for result in folded.results:
            if (before := self.result(result.id)) is None or before.void is not None:
                batch.append(result_entry(cut.k, result))
        batch += map(movement_entry, folded.movements)
        batch += [(row_key(row), None) for row in sorted(self._rows - rows)]
        batch += [(row_key(row), row) for row in sorted(rows - self._rows)]
        batch += [(key, None) for key in self._store.keys(Prefix.VOTE.key()) if int.from_bytes(key[1:9]) < cut.k]
        snapshots, changes = self._keep(cut.k, rows)
        self._store.write(batch + changes)
        self._rows, self.snapshots = rows, snapshots
        self.last = FinalCut(cut.k, cut.id, cut.heads, folded.state, root)
        return self.last

    def _keep(self, k: int, rows: frozenset[bytes]) -> tuple[list[int], Batch]:
        """Return the snapshots that there are with cut ``k``, and what makes them so."""
        if k % self._retention.every:
            return self.snapshots, []
        snapshots = [*self.snapshots, k]
        outdated = self._retention.outdated(k, snapshots, self._retention.base(k, snapshots))
        batch = snapshot_entries(k, sorted(rows))
        for old in outdated:
            batch += [(key, None) for key in self._store.keys(Prefix.SNAPSHOT.key(old))]
        return [each for each in snapshots if each not in outdated], batch

    @property
    def base(self) -> int:
        """The cut from which the ledger can be verified: that of a snapshot, 0 for the genesis."""
        return min(k for k in self.snapshots if k >= self.stripped) if self.stripped else 0

    def to_strip(self) -> int | None:
        """Return the cut whose blocks should lose their bodies next, None where none should."""
        following = self.stripped + 1
        return following if following <= self._retention.base(self.last.k, self.snapshots) else None

    def strip(self, k: int, blocks: Batch) -> None:
        """Write the blocks of cut ``k`` without their bodies."""
        self._store.write([*blocks, stripped_entry(k)])
        self.stripped = k

    # The vote log

    def log_vote(self, entry: LogEntry) -> None:
        """Write what this validator signs. It may leave only after a flush."""
        self._store.write([(Prefix.VOTE.key(*entry.place), pack(entry))])

    def vote_log(self) -> list[LogEntry]:
        """Return what this validator signed at heights that are not long final."""
        entries = (self._read(LogEntry, key) for key in self._store.keys(Prefix.VOTE.key()))
        return [entry for entry in entries if entry is not None]

    def signed(self) -> Batch:
        """Return what this validator may not forget: its votes, and through which height it signs nothing."""
        keys = [*self._store.keys(Prefix.VOTE.key()), *self._store.keys(Prefix.ABSTAIN.key())]
        return [(key, self._store.get(key)) for key in keys]

    def abstain_through(self) -> int | None:
        """Return through which height nothing may be signed; None while that is not known (a lost disk)."""
        raw = self._store.get(Prefix.ABSTAIN.key())
        return 0 if raw is None else int.from_bytes(raw) if raw else None

    def set_abstain(self, through: int | None) -> None:
        """Remember it."""
        self._store.write([(Prefix.ABSTAIN.key(), b"" if through is None else through.to_bytes(8))])

    def _read(self, cls: type[T], key: bytes) -> T | None:
        if (raw := self._store.get(key)) is None:
            return None
        try:
            return unpack(cls, raw, most=MAX_ENTRY)
        except CodecError as error:
            raise StoreError(self._store.damaged(f"an entry {key[:1]!r} is unreadable")) from error


def final_entry(block: bytes, k: int) -> tuple[bytes, bytes]:
    """Return the entry of a block that cut ``k`` made final."""
    return Prefix.FINAL.key(block), k.to_bytes(8)


def result_entry(k: int, result: Result) -> tuple[bytes, bytes]:
    """Return the entry of what became of a record in cut ``k``."""
    void = None if result.void is None else VOIDS.index(result.void)
    return Prefix.RESULT.key(result.id), pack(StoredResult(k, void))


def movement_entry(movement: Movement) -> tuple[bytes, bytes]:
    """Return the entry of a movement of money."""
    return Prefix.MOVEMENT.key(movement.address, movement.k, movement.index), pack(movement)


def snapshot_entries(k: int, rows: Sequence[bytes]) -> Batch:
    """Return the entries of the snapshot of cut ``k``, whose sorted rows are given."""
    return [(Prefix.SNAPSHOT.key(k, number), pack(page)) for number, page in enumerate(paged(rows))]


def stripped_entry(k: int) -> tuple[bytes, bytes]:
    """Return the entry that says through which cut blocks have lost their bodies."""
    return Prefix.STRIPPED.key(), k.to_bytes(8)


def row_key(row: bytes) -> bytes:
    """Return where a row of the state lies."""
    return Prefix.ROW.key(sha256(row).digest())
