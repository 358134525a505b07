"""A network that only judges deltas: cuts go by, members commit and reveal as they are told."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from random import Random

from blyan_node.chain.deltas import Delta, EvalCommit, EvalReveal, LayerChange, Report, commitment
from blyan_node.chain.learning_state import Learning, Refusal, Rules, Verdict
from blyan_node.chain.records import BlobRef

MODEL = bytes([7]) * 32
RULES = Rules(
    committee=31,
    commit_cuts=3,
    reveal_cuts=2,
    max_blob=1000,
    min_bond=100,
    emission=10**15,
)
TRAINER = b"trainer".ljust(20, b"\0")
SALT = bytes(32)

Judge = Callable[[bytes, bytes, Delta], Report | None]
"""(member, id, delta) → what it reports."""


def named(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def member(index: int) -> bytes:
    return named(f"member {index}")[:20]


def offer(name: str = "delta", units: tuple[int, ...] = (3, 4), *, size: int = 500, bond: int = 100) -> Delta:
    """A delta of some layers as they are at the beginning."""
    layers = tuple(LayerChange(unit, named(f"base {unit}"), BlobRef(named(f"{name} {unit}"), 9)) for unit in units)
    return Delta(MODEL, layers, BlobRef(named(name), size), bond)


def measured(
    delta: Delta,
    effect: float,
    source: Random,
    *,
    batches: int = 16,
    noise: float = 0.002,
    guard: float = 0.0,
    version: bytes | None = None,
) -> Report:
    """What a judge of a delta with this relative effect comes to measure."""
    pairs = []
    for _ in range(batches):
        before = source.gauss(3_500_000, 300_000)
        pairs.append((round(before), round(before * (1 - effect + source.gauss(0, noise)))))
    return Report(version or delta.version, tuple(pairs), 3_000_000, round(3_000_000 * (1 + guard)))


@dataclass
class Court:
    """The state, and the cuts so far."""

    stakes: Mapping[bytes, int]
    rules: Rules = RULES
    k: int = 10
    salt: str = ""

    def __post_init__(self) -> None:
        self.learning = Learning(self.rules)
        self.roots = {(MODEL, unit): named(f"base {unit}") for unit in range(10)}
        self.verdicts: list[Verdict] = []
        self.refused: list[Refusal] = []

    def submit(self, delta: Delta, trainer: bytes = TRAINER, id: bytes | None = None) -> bytes:
        """Carry a delta in the next cut; return its id."""
        id = id or named(f"record {len(self.learning.open)} {self.k} {delta.blob.root.hex()}")
        self.carry(id, trainer, delta)
        return id

    def carry(self, id: bytes, sender: bytes, record: Delta | EvalCommit | EvalReveal) -> None:
        """Carry a record in the cut that is being made, ``k + 1``."""
        if (refusal := self.learning.refusal(sender, record, self.k + 1, self.roots)) is not None:
            self.refused.append(refusal)
        else:
            self.learning.take(id, sender, record, self.k + 1)

    def cut(self, count: int = 1) -> list[Verdict]:
        """End the cut, and so many in all; apply what was accepted."""
        fresh: list[Verdict] = []
        for _ in range(count):
            self.k += 1
            ids = (named(f"{self.salt} cut {self.k - 1}"), named(f"{self.salt} cut {self.k}"))
            fresh += self.learning.close(self.k, *ids, self.stakes, self.roots)
            for verdict in fresh:
                if verdict.outcome.name == "ACCEPTED":
                    for layer in verdict.delta.layers:
                        self.roots[MODEL, layer.unit] = layer.result.root
        self.verdicts += fresh
        return fresh

    def committee(self, id: bytes) -> Mapping[bytes, int]:
        return self.learning.open[id].committee

    def commit(self, id: bytes, judge: Judge) -> dict[bytes, Report | None]:
        """Let every member of a committee commit; return their reports."""
        reports = {member: judge(member, id, self.learning.open[id].delta) for member in self.committee(id)}
        for sender, report in reports.items():
            self.carry(b"", sender, EvalCommit(id, commitment(sender, id, report, SALT)))
        return reports

    def reveal(self, id: bytes, reports: Mapping[bytes, Report | None]) -> None:
        for sender, report in reports.items():
            self.carry(b"", sender, EvalReveal(id, report, SALT))

    def judge(self, judges: Mapping[bytes, Judge]) -> list[Verdict]:
        """Judge deltas that were just submitted together, to the end."""
        self.cut(3)
        reports = {id: self.commit(id, judge) for id, judge in judges.items()}
        self.cut(self.rules.commit_cuts)
        for id, said in reports.items():
            self.reveal(id, said)
        return self.cut(self.rules.reveal_cuts)


def court(count: int = 4, *, salt: str = "", **rules: int) -> Court:
    """Validators with 100 each."""
    return Court({member(index): 100 for index in range(count)}, replace(RULES, **rules), salt=salt)
