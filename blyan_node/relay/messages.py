"""What peers say to each other about blocks and blobs: one table of requests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from blyan_node.chain.records import MAX_ARGUMENTS, Record
from blyan_node.codec import Bound, Size, exactly
from blyan_node.p2p.rpc import Method

Id = Annotated[bytes, exactly(32)]

MAX_HEADS = 512
MAX_IDS = 256
MAX_BLOCK = 264 * 1024  # header 4 KiB + body 256 KiB + signature and framing
MAX_PAGE = 1024 * 1024
CHUNK = 1024 * 1024
MAX_REASON = 512
MAX_PROOF = 40  # a Merkle path of 2**40 chunks


@dataclass(frozen=True)
class Status:
    """What a replica holds: all of it lies in the past of ``heads``. ``cut`` is the last final cut."""

    network: Id
    height: int
    cut: int
    cut_id: Id
    heads: Annotated[tuple[Id, ...], Size(MAX_HEADS)]


@dataclass(frozen=True)
class GetBlocks:
    """Ask for blocks by id."""

    ids: Annotated[tuple[Id, ...], Size(MAX_IDS, 1)]


@dataclass(frozen=True)
class GetAfter:
    """Ask for the blocks that follow (height, id) in (height, id) order, which puts parents before children."""

    height: int
    id: Id


@dataclass(frozen=True)
class Blocks:
    """Encoded blocks: as many of those asked for as fit in one page, in the order asked for."""

    blocks: Annotated[tuple[Annotated[bytes, Size(MAX_BLOCK)], ...], Size(4096)]


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
GET_AFTER = Method("/blyan/after/1", GetAfter, Blocks, max_request=100, max_response=2 * MAX_PAGE, timeout=30)
GET_CHUNK = Method("/blyan/chunk/1", GetChunk, Chunk, max_request=100, max_response=CHUNK + 2048, timeout=60)
SUBMIT = Method("/blyan/submit/1", Submit, Submitted, max_request=MAX_ARGUMENTS + 1024, max_response=1024, timeout=10)
