"""What the HTTP API needs of a node's chain. The node implements :class:`ChainService`; tests script one.

Amounts are in nano-BLY, addresses have 20 bytes, ids 32. Pages run from the newest to the oldest: ``before`` is the
place of the last entry of the page before, which is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from blyan_node.chain.block import Block
from blyan_node.chain.cut import Certificate, Cut
from blyan_node.chain.genesis import Genesis
from blyan_node.chain.ledger import Movement
from blyan_node.chain.records import Record
from blyan_node.chain.validators import ValidatorSet
from blyan_node.chain.view import Holding, Standing, Word


@dataclass(frozen=True)
class BlockInfo:
    """A block, and the number of the cut that made it final; None while it is tentative."""

    block: Block
    cut: int | None


@dataclass(frozen=True)
class CutInfo:
    """A final cut, what proves it, and the validators that decided it."""

    cut: Cut
    certificate: Certificate
    validators: ValidatorSet


@dataclass(frozen=True)
class Holdings:
    """What an address owns, finally and tentatively, and what it has bonded (tentatively), by validator.

    ``next_nonce`` is that of its next record, behind those in the DAG and those that wait here to be carried.
    """

    final: Holding
    tentative: Holding
    bonds: dict[bytes, int]
    next_nonce: int


@dataclass(frozen=True)
class Entry:
    """An entry of an address's history."""

    word: Word
    movement: Movement


@dataclass(frozen=True)
class Seat:
    """A key that validates now (``stake`` is not 0) or from the next cut on (``next_stake`` is not 0).

    ``final`` is the last cut that is final there, as far as we have heard; None where it is not connected.
    """

    address: bytes
    stake: int
    next_stake: int
    here: bool
    """Whether it is this node."""
    final: int | None


@dataclass(frozen=True)
class Validators:
    """Who decides the cut after ``k``, the last final one here. ``slashed`` are the keys that were proven to cheat."""

    k: int
    deciding: ValidatorSet
    seats: tuple[Seat, ...]
    slashed: tuple[bytes, ...]


@dataclass(frozen=True)
class NetworkInfo:
    """The network, its last final cut here, and how many records wait in the mempool."""

    genesis: Genesis
    k: int
    cut: bytes
    state_root: bytes
    supply: int
    pending: int


class ChainService(Protocol):
    """The chain, as the API sees it."""

    def blocks(self, chain: str, *, before: tuple[int, bytes] | None, limit: int) -> list[BlockInfo]:
        """Blocks of chain A, B or T, highest first; ``before`` is (height, id)."""
        ...

    def block(self, id: bytes) -> BlockInfo | None:
        """A block; None where it is not here."""
        ...

    def cuts(self, *, before: int | None, limit: int) -> list[CutInfo]:
        """Final cuts, the last first, without the genesis; ``before`` is a cut's number."""
        ...

    def holdings(self, address: bytes) -> Holdings:
        """What an address owns."""
        ...

    def movements(self, address: bytes, *, before: tuple[int, int] | None, limit: int) -> list[Entry]:
        """The history of an address, tentative entries first; ``before`` is (k, index).

        Tentative entries change places as blocks arrive, final ones never.
        """
        ...

    def standing(self, record: bytes) -> Standing | None:
        """Where a record stands that is in the DAG, by id."""
        ...

    def is_pending(self, record: bytes) -> bool:
        """Whether a record waits here for a carrier, by id."""
        ...

    async def submit(self, record: Record) -> None:
        """Check a record and see it on its way into the DAG.

        Raises RuleError where it breaks a rule, would be void or pays too little; Overloaded, PeerError.
        """
        ...

    def validators(self) -> Validators:
        """Who decides, and what is heard of them."""
        ...

    def network(self) -> NetworkInfo:
        """The network and its last final cut."""
        ...
