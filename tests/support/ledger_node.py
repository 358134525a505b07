"""A node with a ledger of its own: what is handed in is carried at once and, where it says so, final at once."""

from __future__ import annotations

from dataclasses import replace

from blyan_node.api.chain_service import Holdings, NetworkInfo
from blyan_node.chain.genesis import DEVNET, Genesis
from blyan_node.chain.keys import Key
from blyan_node.chain.ledger import Result, fold
from blyan_node.chain.money import NANO
from blyan_node.chain.order import Carried
from blyan_node.chain.records import Record, check_record
from blyan_node.chain.state import genesis_state
from blyan_node.chain.view import View
from blyan_node.errors import RequestError
from tests.support.chain_service import ScriptedChain
from tests.support.chains import KEYS
from tests.support.money import carry

VALIDATOR = KEYS[0]


class LedgerNode(ScriptedChain):
    """``carries``: whether records get into blocks; ``decides``: whether cuts follow; ``lets_void``: void ones too."""

    def __init__(self, owner: Key, bly: int = 100, *, carries=True, decides=False, lets_void=False, **parameters: int):
        self.genesis = Genesis.make(
            "money",
            {VALIDATOR.address: 10 * NANO},
            created_ms=0,
            parameters=replace(DEVNET, **parameters),
            balances={owner.address: bly * NANO} if bly else {},
        )
        state = genesis_state(self.genesis)
        self.results: dict[bytes, Result] = {}
        super().__init__(View(state, fold(state, (), network=self.genesis.network), self.results.get))
        self.carries, self.decides, self.lets_void = carries, decides, lets_void
        self.carried: list[Carried] = []

    async def submit(self, record: Record) -> None:
        check_record(record, self.genesis.network)
        pending = fold(self.view.final, [*self.carried, carry(record)], network=self.genesis.network)
        void = next(result.void for result in pending.results if result.id == record.id)
        if void is not None and not self.lets_void:
            raise RequestError(f"the record would be void: {void.value}")
        self.submitted.append(record)
        if not self.carries:
            return
        self.carried.append(carry(record))
        self.view = View(self.view.final, pending, self.results.get)
        if self.decides:
            self.decide()

    def holdings(self, address: bytes) -> Holdings:
        """What waits, where nothing is carried, counts for the next nonce."""
        holdings = super().holdings(address)
        waiting = [] if self.carries else [record for record in self.submitted if record.sender == address]
        return replace(holdings, next_nonce=holdings.next_nonce + len(waiting))

    def decide(self) -> None:
        """Make all that is carried final."""
        pending = self.view.pending
        self.history += pending.movements
        self.results |= {result.id: result for result in pending.results}
        self.carried = []
        self.view = View(pending.state, fold(pending.state, (), network=self.genesis.network), self.results.get)

    def network(self) -> NetworkInfo:
        state = self.view.final
        return NetworkInfo(self.genesis, state.k, self.genesis.network, state.root(), state.supply, len(self.submitted))
