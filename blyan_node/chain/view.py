"""What a node answers about money: the final state, and on top of it what is in the DAG but not yet final.

Every answer carries one of two words. *Final*: decided by more than 2/3 of stake, never reverted while less than 1/3
cheats. *Tentative*: folded from the blocks that are here in the order that a cut over them would have; other blocks
may still come before them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from blyan_node.chain.ledger import Folded, Movement, Result, Void, fold
from blyan_node.chain.order import Item, Reaches, order
from blyan_node.chain.state import Account, State

Word = Literal["final", "tentative"]


@dataclass(frozen=True)
class Holding:
    """What an address owns by one state. ``bonded`` and ``unbonding`` are sums, in nano-BLY like ``balance``."""

    word: Word
    k: int
    balance: int
    nonce: int
    bonded: int
    unbonding: int


@dataclass(frozen=True)
class Standing:
    """Where a record stands; ``void`` is None where it takes effect."""

    word: Word
    void: Void | None


@dataclass(frozen=True)
class View:
    """The ledger as of now. ``pending`` is the effect of what is not final, ``lookup`` finds final results by id."""

    final: State
    pending: Folded
    lookup: Callable[[bytes], Result | None]

    @property
    def tentative(self) -> State:
        """The state that a cut over everything here would have."""
        return self.pending.state

    @cached_property
    def _results(self) -> dict[bytes, Void | None]:
        return {result.id: result.void for result in self.pending.results}

    def holdings(self, address: bytes) -> tuple[Holding, Holding]:
        """Return what an address owns: finally, and tentatively."""
        return _holding("final", self.final, address), _holding("tentative", self.tentative, address)

    def next_nonce(self, address: bytes) -> int:
        """Return the nonce of an address's next record, behind all that are here."""
        return self.tentative.account(address).nonce

    def standing(self, record: bytes) -> Standing | None:
        """Tell where a record stands, by id; None where it is not here.

        A final effect outranks what becomes of later copies. A record that was void may be in the DAG again, and then
        stands where its copy stands, unless that only finds the nonce used.
        """
        settled = self.lookup(record)
        if record in self._results and (settled is None or settled.void is not None):
            void = self._results[record]
            if settled is None or void is not Void.NONCE_USED:
                return Standing("tentative", void)
        return None if settled is None else Standing("final", settled.void)

    def is_pending(self, record: bytes) -> bool:
        """Tell whether a block that is not final carries a record, whether or not it takes effect."""
        return record in self._results

    def movements(self, address: bytes) -> list[Movement]:
        """Return the tentative entries of an address's history, which follow the final ones."""
        return [movement for movement in self.pending.movements if movement.address == address]


def make_view(
    final: State,
    items: Iterable[Item],
    *,
    network: bytes,
    reaches: Reaches,
    equivocators: frozenset[bytes],
    lookup: Callable[[bytes], Result | None],
) -> View:
    """Fold the blocks that are not final (the window under all heads) on top of the final state."""
    records = order(items, reaches=reaches, stake=final.stake(), equivocators=equivocators)
    return View(final, fold(final, records, network=network), lookup)


def _holding(word: Word, state: State, address: bytes) -> Holding:
    account: Account = state.account(address)
    unbonding = sum(each.amount for each in state.unbonding if each.owner == address)
    bonded = sum(state.bonded_by(address).values())
    return Holding(word, state.k, account.balance, account.nonce, bonded, unbonding)
