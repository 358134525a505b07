"""What becomes of a block, or a cut, that a replica takes in: expected outcomes are values, faults are exceptions."""

from __future__ import annotations

from dataclasses import dataclass

from blyan_node.chain.block import Block
from blyan_node.chain.finals import FinalCut


@dataclass(frozen=True)
class Refusal:
    """A waiting block that turned out to break the rules, or to build on one that does; ``source`` sent it."""

    id: bytes
    source: str
    reason: str


@dataclass(frozen=True)
class Accepted:
    """The block is part of the DAG, and so are ``adopted``, blocks that waited for it, in order."""

    block: Block
    adopted: tuple[Block, ...] = ()
    refused: tuple[Refusal, ...] = ()


@dataclass(frozen=True)
class Known:
    """The block was part of the DAG already."""

    id: bytes


@dataclass(frozen=True)
class Orphan:
    """The block waits; ``missing`` are the ancestors to fetch, themselves neither here nor waiting.

    Nothing is missing where the block, or an ancestor, is *held*: anchored at a cut that is not final here yet.
    """

    block: Block
    missing: tuple[bytes, ...]


@dataclass(frozen=True)
class Surplus:
    """Valid, not kept, since nobody needs it: one more branch of a proven equivocator, or a block on an anchor so old
    that its author has nothing at stake any more. Fetching it again is no use until another's block builds on it.
    """  # noqa: D205

    block: Block


Outcome = Accepted | Known | Orphan | Surplus


@dataclass(frozen=True)
class Committed:
    """A cut became final. ``adopted`` are the blocks that were held for it, in order."""

    final: FinalCut
    adopted: tuple[Block, ...]
    refused: tuple[Refusal, ...]
