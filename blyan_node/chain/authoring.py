"""When a validator writes a block. Pure.

Payload is a block that carries records. A block without records is an acknowledgement: it says "I have all this".
Acknowledgements are written for payload alone; if they acknowledged one another, a net would never come to rest.
"""

from __future__ import annotations

from dataclasses import dataclass

from blyan_node.chain.block import Block


@dataclass(frozen=True)
class Pending:
    """What a validator sees before it decides whether to write.

    ``records``: its mempool holds records to carry. ``unacknowledged``: a block with records, by another author, lies
    in the past of what it would build on now, but not in that of its own last block. (Not: is here. What an
    equivocator alone wrote is never built on, and would call for acknowledgements for ever.) ``content``: the cut of
    what is here has content, so a cut is wanted. ``anchored``: it wrote a block anchored at the last final cut
    already, which is what the coverage of the next cut counts.
    """

    records: bool
    unacknowledged: bool
    content: bool
    anchored: bool


def is_acknowledgement(block: Block) -> bool:
    """Tell whether a block carries no records."""
    return not block.records


def wants_to_write(pending: Pending) -> bool:
    """Tell whether to write a block: for payload, to acknowledge payload, or once per height while a cut is wanted.

    At rest once all payload is final: then nothing is unacknowledged, and no cut is wanted.
    """
    return pending.records or pending.unacknowledged or (pending.content and not pending.anchored)
