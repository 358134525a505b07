"""The second half of :mod:`blyan_node.chain.verify`: the cuts, the ledger that follows from them, and the vote log."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import TypeVar

from blyan_node.chain.block import decode_stored
from blyan_node.chain.candidates import Candidates
from blyan_node.chain.cut import (
    PRECOMMIT,
    PREVOTE,
    Vote,
    Votes,
    check_certificate,
    check_proposal,
    check_vote,
    check_votes,
)
from blyan_node.chain.dag import Past, lies_in
from blyan_node.chain.effects import LogEntry
from blyan_node.chain.finals import (
    MAX_ENTRY,
    FinalCut,
    StoredCut,
    StoredResult,
    final_entry,
    movement_entry,
    result_entry,
    row_key,
)
from blyan_node.chain.genesis import Genesis
from blyan_node.chain.ledger import Result, fold
from blyan_node.chain.order import Item, item_of, order, window
from blyan_node.chain.retention import Page
from blyan_node.chain.rules import check_anchor
from blyan_node.chain.state import authors_between, genesis_state, root_of, state_of_rows
from blyan_node.chain.store import Prefix
from blyan_node.chain.tables import Tables
from blyan_node.chain.validators import ValidatorSet
from blyan_node.chain.verify_blocks import BlockChecks, Entries, Fault, Finding, Progress
from blyan_node.codec import unpack
from blyan_node.errors import CodecError, RuleError

STATE = "the state"
VOTES = "the vote log"

T = TypeVar("T")


class _ByCut:
    """A table whose entries were each written by one cut. Knows how many are of each, so that a surplus is noticed."""

    def __init__(
        self, entries: Entries, prefix: Prefix, name: str, cut_of: Callable[[bytes, bytes], int | None]
    ) -> None:
        self._entries, self._prefix, self._name, self._cut_of = entries, prefix, name, cut_of
        self._told: set[bytes] = set()

    @cached_property
    def _counts(self) -> Counter[int | None]:
        return Counter(map(self._cut_at, self._entries.keys(self._prefix)))

    def _cut_at(self, key: bytes) -> int | None:
        value = self._entries.store.get(key)
        return None if value is None else self._cut_of(key, value)

    def compare(self, k: int, expected: Mapping[bytes, bytes]) -> Iterator[Fault]:
        """Compare what is stored of cut ``k`` with the entries that follow from it."""
        found = 0
        for key, value in sorted(expected.items()):
            if (stored := self._entries.store.get(key)) is None:
                yield from self._tell(key, f"is missing, though it follows from cut {k}")
                continue
            found += self._cut_of(key, stored) == k
            if stored != value:
                yield from self._tell(key, f"is not what follows from cut {k}")
        if self._counts[k] > found:
            for key in self._entries.keys(self._prefix):
                if key not in expected and self._cut_at(key) == k:
                    yield from self._tell(key, f"does not follow from cut {k}, to which it is put")

    def beyond(self, last: int) -> Iterator[Fault]:
        """Tell of entries that are unreadable, or of no cut that there is."""
        if any(k is None or not 1 <= k <= last for k in self._counts):
            for key in self._entries.keys(self._prefix):
                if (k := self._cut_at(key)) is None:
                    yield from self._tell(key, "is unreadable")
                elif not 1 <= k <= last:
                    yield from self._tell(key, f"is of cut {k}, which is not final here")

    def _tell(self, key: bytes, what: str) -> Iterator[Fault]:
        if key not in self._told:
            self._told.add(key)
            kind = {Prefix.FINAL: "block", Prefix.RESULT: "record", Prefix.MOVEMENT: "address"}[self._prefix]
            yield Fault(f"{kind} {key[1:21].hex() if kind == 'address' else key[1:].hex()}", f"{self._name} {what}")


class CutChecks:
    """Verifies what is final in one database, on the DAG that :class:`BlockChecks` has verified.

    While ``follows`` holds, ``final.state`` is the state after the last cut that was checked. Where it does not, cuts
    are checked as a light client would: by their certificates, of validators that the cut before names. That is so up
    to the snapshot that stands for blocks whose bodies were pruned, and from a cut on that cannot be folded, its blocks
    being damaged.
    """

    def __init__(self, entries: Entries, tables: Tables, genesis: Genesis, blocks: BlockChecks) -> None:
        self.dag = blocks.dag
        state = genesis_state(genesis)
        self.final = FinalCut(0, genesis.network, (genesis.network,), state, state.root())
        self._network, self._damaged = genesis.network, blocks.damaged
        self._entries, self._tables, self._store = entries, tables, entries.store
        self._snapshots = sorted({int.from_bytes(key[1:9]) for key in entries.keys(Prefix.SNAPSHOT)})
        self._base: FinalCut | None = None  # where the ledger begins, if not with the genesis
        self.follows = not blocks.stripped
        self._stripped = blocks.stripped
        self._settled: Past = self.dag.past_of(self.final.heads)
        self._anchors = [(genesis.network, frozenset(state.authors()))]
        self._deciders: dict[int, ValidatorSet | None] = {1: ValidatorSet(state.validators)}
        self._last: StoredCut | None = None
        self._finals = _ByCut(entries, Prefix.FINAL, "its place among what is final", _cut_of_final)
        self._results = _ByCut(entries, Prefix.RESULT, "its final result", _cut_of_result)
        self._movements = _ByCut(
            entries, Prefix.MOVEMENT, "a movement of its money", lambda key, _: int.from_bytes(key[21:29])
        )

    def window(self, heads: Iterable[bytes], above: Past | None = None) -> set[bytes]:
        """Return the ids of the blocks under ``heads`` that do not lie in a past (of the last cut, if None)."""
        return {id for id in self._window(heads, above) if self.dag.node(id) is not None}

    def _window(self, heads: Iterable[bytes], above: Past | None = None) -> set[bytes]:
        """Return the same with those that are named as parents, but are not here."""
        settled, node = self._settled if above is None else above, self.dag.node
        return window(
            heads,
            parents=lambda id: found.parents if (found := node(id)) else (),
            settled=lambda id: (found := node(id)) is not None and lies_in(found, settled),
        )

    # Cuts

    def each_cut(self) -> Iterator[Finding]:
        """Check every cut and what it made final, then the anchors of what lies beyond the last one."""
        total = self._entries.counts[Prefix.CUT]
        last = max((int.from_bytes(key[1:]) for key in self._entries.keys(Prefix.CUT)), default=0)
        for table in (self._finals, self._results, self._movements):
            yield from table.beyond(last)
        for each in self._snapshots:
            if each > last:
                yield Fault(f"the snapshot of cut {each}", "that cut is not final here")
        if self._stripped:
            yield from self._read_base()
        for key in self._entries.keys(Prefix.CUT):
            k = self.final.k + 1
            yield Progress("cuts", k - 1, total)
            try:
                stored = self._read_cut(key, k)
            except RuleError as error:
                self.follows = False
                yield Fault(f"cut {k}", f"{error}; what is final from there on was not checked")
                return
            yield from self._check(k, stored)
        yield Progress("cuts", total, total)
        yield from self._read_blocks(self.window(self.dag.heads()))

    def _read_base(self) -> Iterator[Fault]:
        """Read the state that the ledger begins with, where the blocks before it have lost their bodies."""
        k = next((each for each in self._snapshots if each >= self._stripped), None)
        if k is None:
            yield Fault(
                "the database", f"bodies are pruned through cut {self._stripped}, and no snapshot stands for them"
            )
            return
        try:
            state = state_of_rows(self._rows_of(k))
        except RuleError as error:
            yield Fault(f"the snapshot of cut {k}", f"it is no state: {error}; the ledger was not checked")
            return
        self._base = replace(self.final, k=k, state=state, root=state.root())

    def _rows_of(self, k: int) -> list[bytes]:
        """Return the rows of a snapshot. Raises CodecError."""
        keys = self._entries.keys(Prefix.SNAPSHOT, k)
        return [row for key in keys for row in unpack(Page, self._store.get(key) or b"", most=MAX_ENTRY).rows]

    def _read_cut(self, key: bytes, k: int) -> StoredCut:
        if key != Prefix.CUT.key(k):
            raise RuleError("it is missing")
        try:
            stored = unpack(StoredCut, self._store.get(key) or b"", most=MAX_ENTRY)
        except CodecError as error:
            raise RuleError(f"it is unreadable: {error}") from error
        if absent := [head for head in stored.cut.heads if self.dag.node(head) is None]:
            raise RuleError(f"its head {absent[0].hex()} is not here")
        return stored

    def _check(self, k: int, stored: StoredCut) -> Iterator[Finding]:
        where, ids = f"cut {k}", self._window(stored.cut.heads)
        for what in self._faults_of(k, stored):
            yield Fault(where, what)
        yield from self._finals.compare(k, dict(final_entry(id, k) for id in ids))
        items = yield from self._read_blocks(ids)
        if self.follows and items is None:
            self.follows = False
            yield Fault(
                where, "it cannot be folded, its blocks being damaged: the ledger was not checked from there on"
            )
        final = replace(self.final, k=k, id=stored.cut.id, heads=stored.cut.heads)
        if self.follows and items is not None:
            final = yield from self._fold(final, stored, items)
            self._anchors.append((final.id, self._interned(frozenset(final.state.authors()))))
            deciders: ValidatorSet | None = ValidatorSet(final.state.validators)
        else:
            named = stored.deciders.hash == stored.cut.next_validators_hash
            deciders = stored.deciders if named else None
            if self._base is not None and k <= self._base.k:
                final = yield from self._pass_over(final, stored, self._base)
        yield from self._check_snapshot(k, stored)
        if stored.deciders != deciders:
            yield Fault(where, "the validators that are stored with it are not those that decide the next cut")
        self._deciders = {k: self._deciders[k], k + 1: deciders}
        self._settled = self.dag.past_of(final.heads)
        self.final, self._last = final, stored

    def _pass_over(self, final: FinalCut, stored: StoredCut, base: FinalCut) -> Generator[Fault, None, FinalCut]:
        """Take a cut whose blocks have no bodies any more, up to ``base``, with whose state the ledger begins."""
        k = final.k
        if k == base.k:
            final, self.follows = replace(final, state=base.state, root=base.root), True
            authors = base.state.authors()
        else:
            following = _read(StoredCut, self._store.get(Prefix.CUT.key(k + 1)) or b"")
            later = stored.deciders if following is None else following.deciders
            authors = authors_between(stored.deciders, later, k, base.state)
        if stored.authors != authors:
            yield Fault(f"cut {k}", "the authors that are stored with it are not those that follow from it")
        self._anchors.append((final.id, self._interned(frozenset(authors))))
        return final

    def _check_snapshot(self, k: int, stored: StoredCut) -> Iterator[Fault]:
        if k in self._snapshots:
            try:
                if root_of(self._rows_of(k)) != stored.root:
                    yield Fault(f"the snapshot of cut {k}", "it is not the state after that cut")
            except CodecError as error:
                yield Fault(f"the snapshot of cut {k}", f"it is unreadable: {error}")

    def _faults_of(self, k: int, stored: StoredCut) -> Iterator[str]:
        """Tell what breaks the rules of a cut: see :mod:`blyan_node.chain.height`."""
        cut, base, deciders = stored.cut, self.final.base(), self._deciders[k]
        seen = Candidates(self).window(base, cut.heads)
        if cut.k != k:
            yield f"it says that it is cut {cut.k}"
        if cut.prev_cut != base.prev_cut:
            yield "it was decided on another cut than the one before it"
        if not seen.ordered:
            yield "its heads are ancestors of one another, or leave out what the cut before has"
        if self.follows:
            if not seen.content:
                yield "nothing in it was to be decided: no block carries records, and nothing was due"
            if cut.prev_state_root != base.state_root:
                yield "its prev_state_root is not the root of the state after the cut before it"
            if cut.next_validators_hash != base.next_validators_hash:
                yield "its next_validators_hash is not that of the validators after it"
        elif self._last is not None and cut.prev_state_root != self._last.root:
            yield "its prev_state_root is not the root that is stored with the cut before it"
        if deciders is None:
            return
        if not deciders.is_quorum(stake := deciders.stake_of(seen.anchored)):
            yield f"only {stake} of {deciders.total} of stake wrote under it since the cut before"
        try:
            check_certificate(stored.certificate, cut, deciders, self._network)
        except RuleError as error:
            yield f"its certificate does not prove it: {error}"

    def _read_blocks(self, ids: Iterable[bytes]) -> Generator[Fault, None, list[Item] | None]:
        """Check the anchors of blocks, and return them as the order takes them; None where one is damaged."""
        items: list[Item] = []
        whole = True
        for id in sorted(ids):
            raw = self._tables.raw(id)
            if raw is None or id in self._damaged or self.dag.node(id) is None:
                whole = False
                continue
            block = decode_stored(raw)
            items.append(item_of(block))
            try:
                if (k := block.header.anchor.k) < len(self._anchors):
                    check_anchor(block.header, *self._anchors[k])
                elif self.follows:
                    raise RuleError(f"it is anchored at cut {k}, of which its past knows nothing")
            except RuleError as error:
                yield Fault(f"block {id.hex()}", f"it breaks a rule: {error}")
        return items if whole else None

    # The ledger

    def _fold(self, final: FinalCut, stored: StoredCut, items: list[Item]) -> Generator[Fault, None, FinalCut]:
        """Fold a cut, compare all that it had written, and return it with the state that follows."""
        where, state, past = f"cut {final.k}", self.final.state, self.dag.past_of(final.heads)
        equivocators = frozenset(a for a in {item.author for item in items} if self.dag.reach(a, past)[1])
        carried = order(items, reaches=self._reaches, stake=state.stake(), equivocators=equivocators)
        folded = fold(state, carried, network=self._network)
        state, root = folded.state, folded.state.root()
        if stored.root != root:
            yield Fault(where, "the root that is stored with it is not that of the state after it")
        if stored.authors != state.authors():
            yield Fault(where, "the authors that are stored with it are not those that follow from it")
        if state.total() != state.supply or state.supply > state.parameters.cap:
            yield Fault(where, "the money after it does not add up to the supply, or is more than the cap")
        results = dict(result_entry(final.k, each) for each in folded.results if not self._is_outdated(final.k, each))
        yield from self._results.compare(final.k, results)
        yield from self._movements.compare(final.k, dict(map(movement_entry, folded.movements)))
        return replace(final, state=state, root=root)

    def _reaches(self, later: bytes, earlier: bytes) -> bool:
        return self.dag.known(later).reaches(self.dag.known(earlier))

    def _is_outdated(self, k: int, result: Result) -> bool:
        """Tell whether another cut's result stands for a record: it took effect before, or came again later."""
        raw = self._store.get(Prefix.RESULT.key(result.id))
        other = None if raw is None else _read(StoredResult, raw)
        if other is None or result.void is None:
            return False
        return other.k > k or (other.k < k and other.void is None)

    def _interned(self, authors: frozenset[bytes]) -> frozenset[bytes]:
        """Return a set of authors: the one of the cut before where it is the same, for there are many cuts."""
        last = self._anchors[-1][1]
        return last if authors == last else authors

    def state(self) -> Iterator[Fault]:
        """Compare the rows of the final state with the state that follows from all cuts."""
        keys = set(self._entries.keys(Prefix.ROW))
        if not self.follows:
            last = self._last_root()
            if last is not None and root_of(sorted(self._store.get(key) or b"" for key in keys)) != last:
                yield Fault(STATE, "its rows are not those of the root that is stored with the last cut")
            return
        expected = {row_key(row): row for row in self.final.state.rows()} if self.final.k else {}
        for key in sorted(expected.keys() | keys):
            name = f"row {key[1:].hex()}"
            if key not in keys:
                yield Fault(STATE, f"{name} is missing")
            elif key not in expected:
                yield Fault(STATE, f"{name} does not follow from the cuts")
            elif self._store.get(key) != expected[key]:
                yield Fault(STATE, f"{name} is not what follows from the cuts")

    def _last_root(self) -> bytes | None:
        for key in self._store.keys(Prefix.CUT.key(), reverse=True):
            stored = _read(StoredCut, self._store.get(key) or b"")
            return None if stored is None else stored.root
        return None

    # The vote log

    def votes(self) -> Iterator[Fault]:
        """Check that this validator signed what it says, and nothing that contradicts it."""
        abstain = self._store.get(Prefix.ABSTAIN.key())
        if abstain is not None and len(abstain) not in (0, 8):
            yield Fault(VOTES, "through which cut this validator signs nothing is unreadable")
            abstain = None
        for key in self._entries.keys(Prefix.VOTE):
            k, round, step = (int.from_bytes(key[at : at + 8]) for at in (1, 9, 17))
            try:
                entry = unpack(LogEntry, self._store.get(key) or b"", most=MAX_ENTRY)
                if entry.place != (k, round, step):
                    raise RuleError("it is of another place")
                if abstain is not None and (not abstain or k <= int.from_bytes(abstain)):
                    raise RuleError("this validator has lost its votes and may not have signed here")
                self._check_entry(entry, k)
            except RuleError as error:
                yield Fault(VOTES, f"its entry of cut {k}, round {round}, step {step}: {error}")

    def _check_entry(self, entry: LogEntry, k: int) -> None:
        if (entry.proposal is None) == (entry.vote is None):
            raise RuleError("it holds not one vote or proposal")
        if self.follows and k not in self._deciders:
            raise RuleError(f"it is too old or too new: the last final cut is {self.final.k}")
        deciders = self._deciders.get(k)
        signer = entry.vote.validator if entry.vote else entry.proposal.proposer if entry.proposal else b""
        if deciders is not None and signer not in deciders.stakes:
            raise RuleError("its signer was no validator of this cut")
        if entry.proposal is not None:
            check_proposal(entry.proposal, self._network)
        if entry.vote is not None:
            check_vote(entry.vote, self._network)
            self._check_grounds(entry.vote, entry.polka, deciders)

    def _check_grounds(self, vote: Vote, polka: Votes | None, deciders: ValidatorSet | None) -> None:
        """Check what a precommit rests on, and that it is not against the certificate that has the same vote."""
        needed = (vote.k, vote.round, PREVOTE, vote.cut) if vote.step == PRECOMMIT and vote.cut is not None else None
        found = None if polka is None else (polka.k, polka.round, polka.step, polka.value)
        if needed != found:
            raise RuleError("a precommit for a cut rests on prevotes for it, and nothing else does")
        if polka is not None and deciders is not None:
            check_votes(polka, deciders, self._network)
        if self._last is not None and (certificate := self._last.certificate).k == vote.k:
            signed = vote.validator in {each.validator for each in certificate.signatures}
            if signed and (vote.round, vote.step) == (certificate.round, PRECOMMIT) and vote.cut != certificate.cut_id:
                raise RuleError(f"it contradicts the same validator's vote in the certificate of cut {vote.k}")


def _cut_of_final(_key: bytes, value: bytes) -> int | None:
    return int.from_bytes(value) if len(value) == 8 else None


def _cut_of_result(_key: bytes, value: bytes) -> int | None:
    stored = _read(StoredResult, value)
    return None if stored is None else stored.k


def _read(cls: type[T], value: bytes) -> T | None:
    try:
        return unpack(cls, value, most=MAX_ENTRY)
    except CodecError:
        return None
