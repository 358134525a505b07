"""A final cut that somebody trusted told: the history of this network must go through it (weak subjectivity).

Validators who have long taken their stake away lose nothing by signing another past. Who was away for longer than
unbonding takes, or is new, cannot tell the two apart; a checkpoint can.
"""

from __future__ import annotations

from dataclasses import dataclass

from blyan_node.chain.cut import Cut
from blyan_node.chain.records import Hash
from blyan_node.errors import RuleError


@dataclass(frozen=True)
class Checkpoint:
    """The number and the id of a final cut."""

    k: int
    cut: Hash

    def check(self, cut: Cut) -> None:
        """Raise RuleError for another cut of that number."""
        if cut.k == self.k and cut.id != self.cut:
            raise RuleError(f"cut {cut.k} is {cut.id.hex()}, where the checkpoint says {self.cut.hex()}")


def parse_checkpoint(text: str) -> Checkpoint:
    """Read a checkpoint as the configuration has it: ``1200:9f3c…``, a number and 64 hex digits."""
    number, _, id = text.partition(":")
    return Checkpoint(int(number), bytes.fromhex(id))
