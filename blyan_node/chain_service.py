"""What the API asks of a node's chain, answered from the replica, the mempool and what neighbours have told."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from blyan_node.api.chain_service import BlockInfo, CutInfo, Entry, Holdings, NetworkInfo, Seat, Validators
from blyan_node.chain.block import Block
from blyan_node.chain.finals import StoredCut
from blyan_node.chain.mempool import Mempool
from blyan_node.chain.records import Record
from blyan_node.chain.replica import Replica
from blyan_node.chain.validators import ValidatorSet
from blyan_node.chain.view import Standing
from blyan_node.relay.blocks import Relay


class Submitting(Protocol):
    """What sees a record on its way into the DAG."""

    @property
    def mempool(self) -> Mempool:
        """What waits here."""
        ...

    async def submit(self, record: Record) -> None:
        """See :meth:`blyan_node.api.chain_service.ChainService.submit`."""
        ...


@dataclass(frozen=True)
class NodeChainService:
    """A node's chain, as its API sees it. ``address`` is the node's own."""

    address: bytes
    relay: Relay
    submissions: Submitting

    @property
    def _replica(self) -> Replica:
        return self.relay.replica

    def blocks(self, chain: str, *, before: tuple[int, bytes] | None, limit: int) -> list[BlockInfo]:
        """Blocks of a chain, highest first."""
        return [self._info(block) for block in self._replica.blocks(chain, after=before, limit=limit, reverse=True)]

    def block(self, id: bytes) -> BlockInfo | None:
        """A block."""
        block = self._replica.block(id)
        return None if block is None else self._info(block)

    def _info(self, block: Block) -> BlockInfo:
        return BlockInfo(block, self._replica.finals.cut_of(block.id))

    def cuts(self, *, before: int | None, limit: int) -> list[CutInfo]:
        """Final cuts, the last first."""
        return [self._cut(stored) for stored in islice(self._replica.finals.cuts(before=before), limit)]

    def _cut(self, stored: StoredCut) -> CutInfo:
        previous = self._replica.finals.stored(stored.cut.k - 1)
        deciders = ValidatorSet(self._replica.genesis.validators) if previous is None else previous.deciders
        return CutInfo(stored.cut, stored.certificate, deciders)

    def holdings(self, address: bytes) -> Holdings:
        """What an address owns."""
        view = self._replica.view()
        nonce = self.submissions.mempool.next_nonce(address, view)
        return Holdings(*view.holdings(address), view.tentative.bonded_by(address), nonce)

    def movements(self, address: bytes, *, before: tuple[int, int] | None, limit: int) -> list[Entry]:
        """The history of an address, the latest first: tentative entries belong to the cut after the last final one."""
        tentative = reversed(self._replica.view().movements(address))
        entries = [Entry("tentative", each) for each in tentative if before is None or (each.k, each.index) < before]
        final = self._replica.finals.history(address, before=before)
        entries += [Entry("final", each) for each in islice(final, max(0, limit - len(entries)))]
        return entries[:limit]

    def standing(self, record: bytes) -> Standing | None:
        """Where a record stands that is in the DAG."""
        return self._replica.view().standing(record)

    def is_pending(self, record: bytes) -> bool:
        """Whether a record is in the mempool."""
        return record in self.submissions.mempool

    async def submit(self, record: Record) -> None:
        """Take in a record."""
        await self.submissions.submit(record)

    def validators(self) -> Validators:
        """Who decides the next cut, and what is heard of them."""
        final = self._replica.final
        now = final.state.stake()
        coming = {validator.address: validator.stake for validator in final.state.next_validators}
        seats = tuple(
            Seat(
                address,
                now.get(address, 0),
                coming.get(address, 0),
                here=address == self.address,
                final=final.k if address == self.address else self.relay.final_of(address),
            )
            for address in sorted({*now, *coming})
        )
        return Validators(final.k, ValidatorSet(final.state.validators), seats, tuple(sorted(final.state.slashed)))

    def network(self) -> NetworkInfo:
        """The network and its last final cut."""
        final, genesis = self._replica.final, self._replica.genesis
        return NetworkInfo(genesis, final.k, final.id, final.root, final.state.supply, len(self.submissions.mempool))
