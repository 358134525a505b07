"""Proof of learning: which deltas are taken into a model, as a fold over final cuts. Pure: the same on every node.

The life of a delta that is final at cut k:

    k + 2                   its committee is drawn by stake from the ids of cuts k + 1 and k + 2, which its trainer
                            could not know; the trainer is never in it
    … + commit_cuts         members commit to reports
    … + reveal_cuts         and reveal them; then there is a verdict
    at most 2 cuts more     a delta that passed waits for rivals (same model, a unit in common) that were final before
                            its own committee was drawn; the best median becomes the head, the others expire

An open delta makes every next cut due, so that a quiet network judges a lone one. Money is moved by the ledger, by what
:meth:`Learning.close` returns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import islice

from blyan_node.chain.deltas import Delta, EvalCommit, EvalReveal, Report, commitment
from blyan_node.chain.genesis import MILLION
from blyan_node.chain.keys import digest
from blyan_node.chain.validators import draw_by_stake
from blyan_node.codec import encode

COMMITTEE_DOMAIN = b"blyan/committee/1"
DRAWN_AFTER = 2
MAX_OPEN = 64
"""Deltas that may be judged at once in a network."""

Roots = Mapping[tuple[bytes, int], bytes]
"""(model, unit) → root of the weights that count now."""


@dataclass(frozen=True)
class Rules:
    """A network's parameters of learning; ``*_millionths`` are shares, money is nano-BLY. See docs/economics.md."""

    committee: int = 31
    commit_cuts: int = 200
    reveal_cuts: int = 100
    threshold_millionths: int = 5_000
    guard_millionths: int = 10_000
    max_blob: int = 1 << 30
    min_bond: int = 10**9
    burn_millionths: int = 100_000
    emission: int = 5 * 10**17
    emission_millionths: int = 10_000
    judges_millionths: int = 200_000


class Refusal(Enum):
    """Why a record about a delta has no effect."""

    STALE = "the delta is for other weights than the model has now"
    COPIED = "a delta with the same result is being judged"
    UNSORTED = "the layers of a delta are sorted by unit, each once"
    OVERSIZED = "the delta's blob is larger than the network allows"
    SMALL_BOND = "the bond is smaller than the network asks for"
    CROWDED = "too many deltas are being judged; try again later"
    NOT_OPEN = "no such delta is being judged"
    NOT_MEMBER = "the sender is not in the delta's committee"
    NOT_NOW = "not in the window of cuts for this"
    TWICE = "the sender has done this before"
    NO_COMMIT = "the sender has committed to nothing"
    MISMATCH = "the report is not the one that the sender committed to"


class Outcome(Enum):
    """How a delta ended."""

    ACCEPTED = "accepted"
    REJECTED = "rejected: too few judges found it better"
    EXPIRED = "expired: too few judges reported in time"
    SURPASSED = "expired: another delta changed its layers"
    UNAVAILABLE = "the judges could not get its blob: a part of the bond is burnt"
    FALSE = "it does not make the weights that it names: the bond is burnt"


@dataclass(frozen=True)
class Open:
    """A delta under judgement. ``committee`` maps its members to their stake; ``median`` is set once it has passed."""

    trainer: bytes
    delta: Delta
    k: int
    committee: Mapping[bytes, int] = field(default_factory=dict)
    commits: Mapping[bytes, bytes] = field(default_factory=dict)
    reveals: Mapping[bytes, Report | None] = field(default_factory=dict)
    median: int | None = None


@dataclass(frozen=True)
class Pay:
    """A reward of new money."""

    payee: bytes
    amount: int


@dataclass(frozen=True)
class Verdict:
    """How a delta ended, and what the ledger has to do: give ``returned`` of the bond back, burn the rest, pay."""

    id: bytes
    trainer: bytes
    delta: Delta
    outcome: Outcome
    median: int
    returned: int
    pay: tuple[Pay, ...] = ()

    @property
    def burnt(self) -> int:
        """What of the bond is destroyed."""
        return self.delta.bond - self.returned


@dataclass
class Learning:
    """All deltas under judgement, in the order in which they became final, and all that was ever paid for learning.

    ``refusal`` changes nothing; ``take`` is called only where it returned None.
    """

    rules: Rules
    open: dict[bytes, Open] = field(default_factory=dict)
    emitted: int = 0

    def copy(self) -> Learning:
        """Return one that can be changed without changing this one."""
        return replace(self, open=dict(self.open))

    def is_due(self) -> bool:
        """Tell whether the next cut has something to do even without records."""
        return bool(self.open)

    def refusal(self, sender: bytes, record: Delta | EvalCommit | EvalReveal, k: int, roots: Roots) -> Refusal | None:
        """Tell why a record in cut k would be void, None where it would not."""
        if isinstance(record, Delta):
            return self._refuse_delta(record, roots)
        if (judged := self.open.get(record.delta)) is None:
            return Refusal.NOT_OPEN
        if sender not in judged.committee:
            return Refusal.NOT_MEMBER
        first, last = self._commits(judged) if isinstance(record, EvalCommit) else self._reveals(judged)
        if not first <= k <= last:
            return Refusal.NOT_NOW
        if sender in (judged.commits if isinstance(record, EvalCommit) else judged.reveals):
            return Refusal.TWICE
        if isinstance(record, EvalReveal):
            if sender not in judged.commits:
                return Refusal.NO_COMMIT
            if commitment(sender, record.delta, record.report, record.salt) != judged.commits[sender]:
                return Refusal.MISMATCH
        return None

    def take(self, id: bytes, sender: bytes, record: Delta | EvalCommit | EvalReveal, k: int) -> None:
        """Let a record of cut k have its effect; ``id`` is the record's."""
        match record:
            case Delta():
                self.open[id] = Open(sender, record, k)
            case EvalCommit(delta, committed):
                judged = self.open[delta]
                self.open[delta] = replace(judged, commits={**judged.commits, sender: committed})
            case EvalReveal(delta, report, _):
                judged = self.open[delta]
                self.open[delta] = replace(judged, reveals={**judged.reveals, sender: report})

    def close(
        self, k: int, previous_cut: bytes, cut: bytes, stakes: Mapping[bytes, int], roots: Roots
    ) -> list[Verdict]:
        """End cut k: draw committees, and return the deltas whose judgement is over.

        ``cut`` is the id of cut k, ``previous_cut`` that of the one before; ``stakes`` are of those who validate,
        ``roots`` those of the weights after the records of this cut: the owner may have replaced some.
        """
        verdicts = []
        for id, judged in list(self.open.items()):
            if _is_stale(judged.delta, roots):
                verdicts.append(self._end(id, Outcome.SURPASSED, judged.median or 0))
            elif k == judged.k + DRAWN_AFTER:
                self.open[id] = replace(judged, committee=self._draw(id, judged.trainer, previous_cut + cut, stakes))
            elif judged.median is None and k == self._reveals(judged)[1]:
                outcome, median = self._weigh(judged)
                if outcome is Outcome.ACCEPTED:
                    self.open[id] = replace(judged, median=median)
                else:
                    verdicts.append(self._end(id, outcome, median))
        while (best := self._next_head()) is not None:
            rivals = self._rivals(best)
            verdicts.append(self._accept(best))
            verdicts += [self._end(rival, Outcome.SURPASSED, self.open[rival].median or 0) for rival in rivals]
        return verdicts

    def _refuse_delta(self, delta: Delta, roots: Roots) -> Refusal | None:
        if [layer.unit for layer in delta.layers] != sorted(delta.units):
            return Refusal.UNSORTED
        if _is_stale(delta, roots):
            return Refusal.STALE
        if delta.blob.size > self.rules.max_blob:
            return Refusal.OVERSIZED
        if delta.bond < self.rules.min_bond:
            return Refusal.SMALL_BOND
        if any((other.delta.model, other.delta.version) == (delta.model, delta.version) for other in self._deltas()):
            return Refusal.COPIED
        return Refusal.CROWDED if len(self.open) >= MAX_OPEN else None

    def _deltas(self) -> Iterable[Open]:
        return self.open.values()

    def _commits(self, judged: Open) -> tuple[int, int]:
        """The first and the last cut for commits."""
        drawn = judged.k + DRAWN_AFTER
        return drawn + 1, drawn + self.rules.commit_cuts

    def _reveals(self, judged: Open) -> tuple[int, int]:
        """The first and the last cut for reveals."""
        last = self._commits(judged)[1]
        return last + 1, last + self.rules.reveal_cuts

    def _draw(self, id: bytes, trainer: bytes, cuts: bytes, stakes: Mapping[bytes, int]) -> dict[bytes, int]:
        """Draw at most ``committee`` judges by stake, without the trainer."""
        able = {address: stakes[address] for address in sorted(stakes) if address != trainer}
        drawn = draw_by_stake(able, lambda draw: digest(COMMITTEE_DOMAIN, encode([cuts, id, draw])))
        return {address: able[address] for address in sorted(islice(drawn, self.rules.committee))}

    def _weigh(self, judged: Open) -> tuple[Outcome, int]:
        """Weigh the reports of a delta whose time is up: the outcome, and the median improvement in millionths.

        Every outcome that costs or gives something takes more than 2/3 of the committee's stake.
        """
        rules, total = self.rules, sum(judged.committee.values())

        def most(members: Iterable[bytes]) -> bool:
            return 3 * sum(judged.committee[member] for member in members) > 2 * total

        reports = {member: report for member, report in judged.reveals.items() if report is not None}
        right = {member for member, report in reports.items() if report.version == judged.delta.version}
        yes = {member for member in right if reports[member].passes(rules.threshold_millionths, rules.guard_millionths)}
        median = _weighted_median([(reports[member].improvement, judged.committee[member]) for member in right])
        others: dict[bytes, set[bytes]] = {}
        for member in reports.keys() - right:
            others.setdefault(reports[member].version, set()).add(member)
        if not most(judged.reveals):
            return Outcome.EXPIRED, median
        if most(judged.reveals.keys() - reports.keys()):
            return Outcome.UNAVAILABLE, median
        if any(map(most, others.values())):
            return Outcome.FALSE, median
        passed = most(yes) and median >= rules.threshold_millionths
        return Outcome.ACCEPTED if passed else Outcome.REJECTED, median

    def _rivals(self, id: bytes) -> list[bytes]:
        """The other deltas that change a layer which this one changes."""
        delta = self.open[id].delta
        return [
            other
            for other, judged in self.open.items()
            if other != id and judged.delta.model == delta.model and judged.delta.units & delta.units
        ]

    def _next_head(self) -> bytes | None:
        """The best of the first group of rivals that nobody has to wait for any more; of equals, the earlier."""
        for id, judged in self.open.items():
            group = [id, *self._rivals(id)]
            waits = any(
                self.open[rival].median is None and self.open[rival].k <= judged.k + DRAWN_AFTER for rival in group
            )
            if judged.median is not None and not waits:
                order = list(self.open)
                passed = [rival for rival in group if self.open[rival].median is not None]
                return min(passed, key=lambda rival: (-(self.open[rival].median or 0), order.index(rival)))
        return None

    def _accept(self, id: bytes) -> Verdict:
        judged = self.open[id]
        median = judged.median or 0
        left = self.rules.emission - self.emitted
        reward = left * self.rules.emission_millionths * median // MILLION**2
        judges = sorted(
            member
            for member, report in judged.reveals.items()
            if report is not None
            and report.version == judged.delta.version
            and 2 * abs(report.improvement - median) <= median
        )
        each = reward * self.rules.judges_millionths // MILLION // len(judges)
        pays = [Pay(judged.trainer, reward - each * len(judges)), *(Pay(judge, each) for judge in judges)]
        self.emitted += reward
        return self._end(id, Outcome.ACCEPTED, median, tuple(pay for pay in pays if pay.amount))

    def _end(self, id: bytes, outcome: Outcome, median: int, pay: tuple[Pay, ...] = ()) -> Verdict:
        judged = self.open.pop(id)
        burnt = {Outcome.FALSE: MILLION, Outcome.UNAVAILABLE: self.rules.burn_millionths}.get(outcome, 0)
        returned = judged.delta.bond - judged.delta.bond * burnt // MILLION
        return Verdict(id, judged.trainer, judged.delta, outcome, median, returned, pay)


def _is_stale(delta: Delta, roots: Roots) -> bool:
    return any(roots.get((delta.model, layer.unit)) != layer.base for layer in delta.layers)


def _weighted_median(values: list[tuple[int, int]]) -> int:
    """The least value that, with all below it, has at least half of the weight; 0 of nothing."""
    reached, total = 0, sum(weight for _, weight in values)
    for value, weight in sorted(values):
        reached += weight
        if 2 * reached >= total:
            return value
    return 0
