"""What a delta's trainer and its judges put on the chain, and what a judge's report says. Integers only.

::

    delta  = [model, layers, blob, bond]                      its id is that of the record that carries it
    layer  = [unit, base root, result blob]                   sorted by unit: from these weights to those
    commit = [delta, H]                                       H = digest("blyan/eval/1", [member, delta, report, salt])
    reveal = [delta, report, salt]
    report = nil, where the blob could not be had
           | [version, batches of [before, after], guard before, guard after]       losses in micro-nats per token

The digest names the member, so a copied commit can be revealed by nobody.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

from blyan_node.chain.genesis import MILLION
from blyan_node.chain.keys import digest
from blyan_node.chain.records import Amount, BlobRef, Hash
from blyan_node.codec import Bound, Size, encode, to_value

EVAL_DOMAIN = b"blyan/eval/1"
VERSION_DOMAIN = b"blyan/layers/1"
MAX_LAYERS = 128
MAX_BATCHES = 256
MAX_LOSS = 100 * MILLION
"""Micro-nats: no cross-entropy of a vocabulary that a spec allows comes near."""

Loss = Annotated[int, Bound(MAX_LOSS)]


@dataclass(frozen=True)
class LayerChange:
    """One unit that a delta changes: the root of the weights that it is for, and the blob of what it makes of them."""

    unit: Annotated[int, Bound(1023)]
    base: Hash
    result: BlobRef


@dataclass(frozen=True)
class Delta:
    """A trainer offers a delta of some layers of a model: the blob ``blob``, and ``bond`` that it is what it says."""

    model: Hash
    layers: Annotated[tuple[LayerChange, ...], Size(MAX_LAYERS, 1)]
    blob: BlobRef
    bond: Amount

    @cached_property
    def units(self) -> frozenset[int]:
        """The units that it changes."""
        return frozenset(layer.unit for layer in self.layers)

    @cached_property
    def version(self) -> bytes:
        """What its layers are named together once it is applied: what every judge computes anew."""
        return version_of([(layer.unit, layer.result.root) for layer in self.layers])


@dataclass(frozen=True)
class Report:
    """What a judge measured. ``batches`` are pairs of losses on its own hidden batches, without and with the delta."""

    version: Hash
    batches: Annotated[tuple[tuple[Loss, Loss], ...], Size(MAX_BATCHES, 2)]
    guard_before: Loss
    guard_after: Loss

    @cached_property
    def improvement(self) -> int:
        """The relative drop of the mean loss in millionths, rounded down; 0 where it rose."""
        before = sum(loss for loss, _ in self.batches)
        return max(before - sum(loss for _, loss in self.batches), 0) * MILLION // before if before else 0

    def passes(self, threshold: int, guard_limit: int) -> bool:
        """Tell whether mean − 2·se of the paired drops reaches ``threshold``, and the guard set got no worse.

        Both in millionths, of the loss before and of the guard's. Exact: with n batches, drops d, S = Σd, B = Σ before
        and T = S − threshold·B, the first is T ≥ 0 and T²(n − 1) ≥ 4(nΣd² − S²).
        """
        drops = [before - after for before, after in self.batches]
        count, total, squares = len(drops), sum(drops), sum(drop * drop for drop in drops)
        over = total * MILLION - threshold * sum(before for before, _ in self.batches)
        clear = over >= 0 and over**2 * (count - 1) >= 4 * MILLION**2 * (count * squares - total**2)
        return clear and total > 0 and self.guard_after * MILLION <= self.guard_before * (MILLION + guard_limit)


@dataclass(frozen=True)
class EvalCommit:
    """A member of the committee binds itself to a report that it does not show yet."""

    delta: Hash
    commitment: Hash


@dataclass(frozen=True)
class EvalReveal:
    """The report behind a commit; None says that the delta's blob could not be had."""

    delta: Hash
    report: Report | None
    salt: Hash


def version_of(layers: list[tuple[int, bytes]]) -> bytes:
    """Name layers together: digest("blyan/layers/1", [[unit, root], …])."""
    return digest(VERSION_DOMAIN, encode([list(layer) for layer in layers]))


def commitment(member: bytes, delta: bytes, report: Report | None, salt: bytes) -> bytes:
    """Return what a commit holds: digest("blyan/eval/1", [member, delta, report, salt])."""
    return digest(EVAL_DOMAIN, encode([member, delta, to_value(report), salt]))
