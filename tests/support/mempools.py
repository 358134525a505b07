"""A ledger for tests of the mempool: a final state, and blocks on top of it one after the other, without a replica."""

from __future__ import annotations

from dataclasses import dataclass, field

from blyan_node.chain.keys import Key
from blyan_node.chain.ledger import Result, fold
from blyan_node.chain.order import Item, order
from blyan_node.chain.records import Record
from blyan_node.chain.state import State
from blyan_node.chain.view import View, make_view
from tests.support.chains import NETWORK
from tests.support.money import CARRIER, start


@dataclass
class Books:
    """What nodes of a test agree on. Nothing but :meth:`carry` and :meth:`close` changes it."""

    state: State = field(default_factory=start)
    items: list[Item] = field(default_factory=list)
    results: dict[bytes, Result] = field(default_factory=dict)
    blocks: int = 0

    def view(self) -> View:
        return make_view(
            self.state,
            self.items,
            network=NETWORK,
            reaches=_in_line,
            equivocators=frozenset(),
            lookup=self.results.get,
        )

    def carry(self, *records: Record, author: Key = CARRIER) -> None:
        """Put a block behind all others."""
        self.blocks += 1
        self.items.append(Item(self.blocks.to_bytes(32), self.blocks, author.address, self.blocks, records))

    def close(self) -> None:
        """Decide a cut over all blocks."""
        records = order(self.items, reaches=_in_line, stake=self.state.stake())
        folded = fold(self.state, records, network=NETWORK)
        for result in folded.results:
            if (known := self.results.get(result.id)) is None or known.void is not None:
                self.results[result.id] = result
        self.state, self.items = folded.state, []


def _in_line(one: bytes, other: bytes) -> bool:
    return other <= one
