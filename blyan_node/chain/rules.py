"""The rules of validity of a block.

Each is a function of the block and its causal past alone: never of the order of arrival, the local clock or what else
is known here, so that all nodes judge alike.

Whether a record means anything (a layer for an unknown model, not the owner) is no rule of its block: the machines
that fold the records ignore such a record, with a reason.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from blyan_node.chain.block import BLOCK_DOMAIN, CHAINS, VERSION, Block, Header
from blyan_node.chain.dag import Dag, Node, merge
from blyan_node.chain.keys import digest, recover_address
from blyan_node.chain.records import check_record
from blyan_node.errors import CycleDetected, RuleError, SignatureError


def check_in_isolation(block: Block, network: bytes) -> None:
    """Check what a block shows by itself; encoding, types and sizes were checked by decoding it.

    Raises RuleError, or SignatureError where the author did not sign it.
    """
    if block.header.body_len != len(block.body) or block.header.body_hash != hashlib.sha256(block.body).digest():
        raise RuleError("the body is not the one that the header names")
    check_stub(block, network)
    for record in block.records:
        check_record(record, network)


def check_stub(block: Block, network: bytes) -> None:
    """Check all of a block but its body, which may have been pruned. Raises RuleError or SignatureError."""
    check_header(block.header, network)
    if recover_address(digest(BLOCK_DOMAIN, block.header_bytes), block.signature) != block.header.author:
        raise SignatureError("the block's author did not sign it")


def check_header(header: Header, network: bytes) -> None:
    """Check a header by itself: version, network, chain, parents, seq and prev. Raises RuleError."""
    if header.version != VERSION:
        raise RuleError(f"block version {header.version}; this network has {VERSION}")
    if header.network != network:
        raise RuleError("a block of another network")
    if header.chain not in CHAINS:
        raise RuleError(f"chain {header.chain!r} is none of {', '.join(CHAINS)}")
    if list(header.parents) != sorted(set(header.parents)):
        raise RuleError("the parents are not sorted, or one is named twice")
    if (header.prev is None) != (header.seq == 0):
        raise RuleError("exactly an author's first block, seq 0, has no prev")


def check_anchor(header: Header, cut: bytes, authors: frozenset[bytes]) -> None:
    """Check a block's anchor against the final cut of that number, and who may author on it. Raises RuleError."""
    if header.anchor.cut != cut:
        raise RuleError(f"the anchor is not cut {header.anchor.k}")
    if header.author not in authors:
        raise RuleError("the author is no validator: hand the record to one, which carries it")


def check_in_context(header: Header, parents: Sequence[Node], dag: Dag) -> None:
    """Check a block against its causal past, all of which is here; ``parents`` are the nodes of its parents in order.

    Raises CycleDetected where the parents are no antichain, RuleError for the rest.
    """
    for i, one in enumerate(parents):
        if any(other.reaches(one) for j, other in enumerate(parents) if i != j):
            raise CycleDetected(
                f"parent {header.parents[i].hex()} is an ancestor of another parent; name only the later one"
            )
    height = 1 + max(node.height for node in parents)
    if header.height != height:
        raise RuleError(f"height {header.height} where its parents make it {height}")
    past = merge(node.past for node in parents)
    _check_own_chain(header, past, dag)
    for node in parents:
        author = dag.author_of(node)
        if author != header.author and dag.reach(author, past)[1]:
            raise RuleError("a parent's author equivocates in the block's past: nobody builds on its blocks any more")


def _check_own_chain(header: Header, past: dict[int, int], dag: Dag) -> None:
    blocks, forked = dag.reach(header.author, past)
    if forked:
        raise RuleError("the author equivocates in the block's own past")
    if header.seq != blocks:
        raise RuleError(f"seq {header.seq} where the author has {blocks} blocks in its past")
    if header.prev is None:
        return
    prev = dag.node(header.prev)
    if prev is None or past.get(prev.branch, 0) <= prev.seq:
        raise RuleError("prev does not lie in the block's past")
    if dag.author_of(prev) != header.author or prev.seq != header.seq - 1:
        raise RuleError("prev is not the author's block before this one")
