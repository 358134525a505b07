"""What peers say to each other about blocks and blobs: one table of requests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from blyan_node.chain.cut import Certificate, Cut
from blyan_node.chain.effects import MAX_MESSAGE
from blyan_node.chain.records import MAX_ARGUMENTS, Record
from blyan_node.chain.retention import MAX_PAGES, Page
from blyan_node.chain.validators import ValidatorSet
from blyan_node.codec import Bound, Size, exactly
from blyan_node.p2p.rpc import Method

Id = Annotated[bytes, exactly(32)]

MAX_HEADS = 512
MAX_IDS = 256
MAX_BLOCK = 264 * 1024  # header 4 KiB + body 256 KiB + signature and framing
MAX_PAGE = 1024 * 1024
MAX_BLOCKS = 4096
MAX_CUTS = 256
CHUNK = 1024 * 1024
MAX_REASON = 512
MAX_PROOF = 40  # a Merkle path of 2**40 chunks


@dataclass(frozen=True)
class Status:
    """What a replica holds: all of it lies in the past of ``heads``. ``cut`` is the last final cut.

    Blocks that became final with cut ``stripped`` or before have no bodies there any more.
    """

    network: Id
    height: int
    cut: int
    cut_id: Id
    stripped: int
    heads: Annotated[tuple[Id, ...], Size(MAX_HEADS)]


@dataclass(frozen=True)
class GetBlocks:
    """Ask for blocks by id."""

    ids: Annotated[tuple[Id, ...], Size(MAX_IDS, 1)]


@dataclass(frozen=True)
class GetCuts:
    """Ask for final cuts from number ``first`` on."""

    first: Annotated[int, Bound(2**63 - 1, 1)]


@dataclass(frozen=True)
class CutItem:
    """A final cut and its proof; ``deciders`` are those who decided it where they are not those of the cut before."""

    cut: Cut
    certificate: Certificate
    deciders: ValidatorSet | None


@dataclass(frozen=True)
class Cuts:
    """Final cuts, one after the other; as many as fit in a page."""

    items: Annotated[tuple[CutItem, ...], Size(MAX_CUTS)]


@dataclass(frozen=True)
class Cursor:
    """A place in a replica's blocks as they became final: (cut, height, id)."""

    k: int
    height: int
    id: Id


@dataclass(frozen=True)
class GetSince:
    """Ask for the blocks behind a place: those of each final cut in turn, then those that are not final.

    Within a cut they stand in (height, id) order, so parents come before children.
    """

    after: Cursor


@dataclass(frozen=True)
class Since:
    """Encoded blocks in that order, as many as fit in a page, and the place of the last; None where no more follow."""

    blocks: Annotated[tuple[Annotated[bytes, Size(MAX_BLOCK)], ...], Size(MAX_BLOCKS)]
    last: Cursor | None


@dataclass(frozen=True)
class GetState:
    """Ask for a page of the snapshot of the state after cut ``k``; of the newest that can be proven, if None."""

    k: int | None
    page: Annotated[int, Bound(MAX_PAGES - 1)]


@dataclass(frozen=True)
class StatePage:
    """A page of the snapshot of cut ``k``."""

    k: int
    page: Page


@dataclass(frozen=True)
class Blocks:
    """Encoded blocks: as many of those asked for as fit in one page, in the order asked for."""

    blocks: Annotated[tuple[Annotated[bytes, Size(MAX_BLOCK)], ...], Size(MAX_BLOCKS)]


@dataclass(frozen=True)
class Tell:
    """A message of the consensus for one peer: see :func:`blyan_node.chain.effects.pack_message`."""

    message: Annotated[bytes, Size(MAX_MESSAGE)]


@dataclass(frozen=True)
class Told:
    """It was taken in."""


@dataclass(frozen=True)
class GetChunk:
    """Ask for one chunk of a blob."""

    root: Id
    size: int
    index: Annotated[int, Bound(2**31)]


@dataclass(frozen=True)
class Chunk:
    """The bytes of a chunk and its Merkle path to the blob's root."""

    data: Annotated[bytes, Size(CHUNK)]
    proof: Annotated[tuple[Id, ...], Size(MAX_PROOF)]


@dataclass(frozen=True)
class Submit:
    """Ask a validator to carry a record into a block."""

    record: Record


@dataclass(frozen=True)
class Submitted:
    """The record waits to be carried, or why it never will: ``reason`` is for whoever signed it."""

    reason: Annotated[str, Size(MAX_REASON)] | None


STATUS = Method("/blyan/status/1", Status, Status, max_request=20_000, max_response=20_000, timeout=10)
GET_BLOCKS = Method("/blyan/blocks/1", GetBlocks, Blocks, max_request=10_000, max_response=2 * MAX_PAGE, timeout=30)
GET_CUTS = Method("/blyan/cuts/1", GetCuts, Cuts, max_request=16, max_response=2 * MAX_PAGE, timeout=30)
GET_SINCE = Method("/blyan/since/1", GetSince, Since, max_request=100, max_response=2 * MAX_PAGE, timeout=30)
GET_STUBS = Method("/blyan/stubs/1", GetSince, Since, max_request=100, max_response=2 * MAX_PAGE, timeout=30)
GET_STATE = Method("/blyan/state/1", GetState, StatePage, max_request=32, max_response=MAX_PAGE, timeout=30)
TELL = Method("/blyan/consensus/1", Tell, Told, max_request=MAX_MESSAGE + 8, max_response=8, timeout=10)
GET_CHUNK = Method("/blyan/chunk/1", GetChunk, Chunk, max_request=100, max_response=CHUNK + 2048, timeout=60)
SUBMIT = Method("/blyan/submit/1", Submit, Submitted, max_request=MAX_ARGUMENTS + 1024, max_response=1024, timeout=10)
