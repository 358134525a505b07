"""Objective faults: two statements that one key may not both sign. Whoever shows them has the offender slashed.

A fault names the domain of the signatures and how a statement is read: into the *position* it speaks for, of which a
key may fill each once, and its *content*. Two statements of one signer for one position with different contents are
proof, whatever else they say. That needs no history, so a proof holds however old it is and wherever it is shown.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from blyan_node.chain.block import BLOCK_DOMAIN, MAX_HEADER, Block, Header
from blyan_node.chain.cut import VOTE_DOMAIN, DoubleVote, vote_payload
from blyan_node.chain.keys import digest, recover_address
from blyan_node.chain.records import Evidence, Hash, Signed
from blyan_node.codec import unpack
from blyan_node.errors import RuleError

MAX_VOTE = 128


@dataclass(frozen=True)
class Statement:
    """What a signed payload says. ``position`` is a tuple of plain values; ``content`` is hashed or short."""

    network: bytes
    position: tuple[Any, ...]
    content: bytes | None
    author: bytes | None = None
    """Who it says has signed; None where it does not say."""


@dataclass(frozen=True)
class Fault:
    """A kind of fault. ``read`` raises RuleError for a payload that is no such statement."""

    domain: bytes
    read: Callable[[bytes], Statement]


def read_header(payload: bytes) -> Statement:
    """Read a block's header: an author has one block of each ``seq``."""
    header = unpack(Header, payload, most=MAX_HEADER)
    return Statement(header.network, (header.seq,), hashlib.sha256(payload).digest(), header.author)


@dataclass(frozen=True)
class _Vote:
    network: Hash
    k: int
    round: int
    step: int
    cut: Hash | None


def read_vote(payload: bytes) -> Statement:
    """Read what a vote signs: a validator votes once in each step of each round."""
    vote = unpack(_Vote, payload, most=MAX_VOTE)
    return Statement(vote.network, (vote.k, vote.round, vote.step), vote.cut)


FAULTS: Mapping[str, Fault] = {
    "double-block": Fault(BLOCK_DOMAIN, read_header),
    "double-vote": Fault(VOTE_DOMAIN, read_vote),
}
"""All that is punished."""


def of_blocks(first: Block, second: Block) -> Evidence:
    """Make evidence of two blocks of one author with one ``seq``, in one order, so that one fault has one form."""
    signed = sorted((Signed(block.header_bytes, block.signature) for block in (first, second)), key=lambda s: s.payload)
    return Evidence("double-block", *signed)


def of_votes(proof: DoubleVote, network: bytes) -> Evidence:
    """Make evidence of two votes that contradict each other."""
    votes = (proof.first, proof.second)
    signed = (Signed(vote_payload(network, v.k, v.round, v.step, v.cut), v.signature) for v in votes)
    return Evidence("double-vote", *signed)


def check_evidence(evidence: Evidence, network: bytes) -> bytes:
    """Return the address of the offender. Raises RuleError where the evidence proves nothing."""
    if (fault := FAULTS.get(evidence.fault)) is None:
        raise RuleError(f"{evidence.fault!r} is no fault that is punished")
    first, second = fault.read(evidence.first.payload), fault.read(evidence.second.payload)
    signers = {_signer(fault, evidence.first), _signer(fault, evidence.second)}
    claimed = {statement.author for statement in (first, second)} - {None}
    if len(signers) != 1 or not claimed <= signers:
        raise RuleError("the two statements were not signed by one key, that of their author")
    if {first.network, second.network} != {network}:
        raise RuleError("a statement for another network")
    if first.position != second.position or first.content == second.content:
        raise RuleError("the two statements do not contradict each other")
    return signers.pop()


def _signer(fault: Fault, signed: Signed) -> bytes:
    return recover_address(digest(fault.domain, signed.payload), signed.signature)
