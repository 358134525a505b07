"""The set of validators that decides one cut: its stake, its quorums, and who proposes in which round. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

from blyan_node.chain.genesis import MAX_VALIDATORS, Validator
from blyan_node.chain.keys import digest
from blyan_node.codec import Size, encode, pack

VALIDATORS_DOMAIN = b"blyan/validators/1"
PROPOSER_DOMAIN = b"blyan/proposer/1"


@dataclass(frozen=True)
class ValidatorSet:
    """Validators sorted by address, each once. ``f`` below stands for the Byzantine, less than 1/3 of stake."""

    members: Annotated[tuple[Validator, ...], Size(MAX_VALIDATORS, 1)]

    @classmethod
    def of(cls, members: Iterable[Validator]) -> ValidatorSet:
        """Make a set from validators in any order."""
        return cls(tuple(sorted(members, key=lambda member: member.address)))

    @cached_property
    def hash(self) -> bytes:
        """digest("blyan/validators/1", canonical encoding): what a cut names as ``next_validators_hash``."""
        return digest(VALIDATORS_DOMAIN, pack(self))

    @cached_property
    def stakes(self) -> dict[bytes, int]:
        """Stake in nano-BLY by address, in the order of addresses."""
        return {member.address: member.stake for member in self.members}

    @cached_property
    def total(self) -> int:
        """The stake of all, in nano-BLY."""
        return sum(self.stakes.values())

    def stake_of(self, addresses: Iterable[bytes]) -> int:
        """Return the stake of those addresses, each once, that are validators."""
        return sum(self.stakes.get(address, 0) for address in set(addresses))

    def is_quorum(self, stake: int) -> bool:
        """Tell whether a stake is more than 2/3 of all: two such groups share an honest validator."""
        return 3 * stake > 2 * self.total

    def has_honest(self, stake: int) -> bool:
        """Tell whether a stake is more than 1/3 of all, so that not all of it can be Byzantine (at least f + 1)."""
        return 3 * stake > self.total

    def proposers(self, network: bytes, k: int) -> tuple[bytes, ...]:
        """Return the order in which validators propose at height ``k``: round ``r`` is the turn of ``r`` mod length.

        A draw without replacement, weighted by stake: the first proposals go by stake, and each round of as many as
        there are validators is another one's turn. The draws depend on the height only, so no proposer can choose
        among cuts for the sake of its next turn.
        """
        return tuple(draw_by_stake(self.stakes, lambda i: digest(PROPOSER_DOMAIN, encode([network, k, i]))))


def draw_by_stake(stakes: Mapping[bytes, int], seed: Callable[[int], bytes]) -> Iterator[bytes]:
    """Draw all addresses without replacement, each time in proportion to stake; ``seed`` gives draw i its hash."""
    left = dict(stakes)
    for draw in range(len(left)):
        drawn = _at(left, int.from_bytes(seed(draw)) % sum(left.values()))
        yield drawn
        del left[drawn]


def _at(stakes: dict[bytes, int], place: int) -> bytes:
    """Return whose stake covers a place, when all stakes are laid end to end."""
    end = 0
    for address, stake in stakes.items():
        end += stake
        if place < end:
            return address
    raise ValueError("the place lies behind all stakes")
