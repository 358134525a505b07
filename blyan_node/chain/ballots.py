"""The votes of one step of one round, counted per value. Pure.

A Byzantine validator may vote for several values. Dropping its second vote would lose liveness for good: where those
that locked on a cut counted a vote that others refuse to hear of, the others can never be convinced. So each value's
votes are kept, of one validator for at most ``KEPT`` values; beyond that only as part of a proven quorum.
"""

from __future__ import annotations

from blyan_node.chain.cut import Signed
from blyan_node.chain.validators import ValidatorSet

KEPT = 3
"""Values per validator, step and round whose votes are kept unasked."""


class Ballots:
    """See the module. A value is a cut's id, or None for nil. Bounded by ``KEPT`` votes per validator, and quorums."""

    def __init__(self, validators: ValidatorSet) -> None:
        self._validators = validators
        self._signatures: dict[bytes | None, dict[bytes, bytes]] = {}
        self._values_of: dict[bytes, list[bytes | None]] = {}
        self._stakes: dict[bytes | None, int] = {}
        self.stake = 0
        """The stake of those who voted for anything, each counted once."""

    def has(self, value: bytes | None, validator: bytes) -> bool:
        """Tell whether a validator's vote for a value is here."""
        return validator in self._signatures.get(value, {})

    def add(self, value: bytes | None, signed: Signed, *, of_quorum: bool = False) -> bool:
        """Count a vote, whose signature was checked; tell whether it is new and was kept."""
        values = self._values_of.setdefault(signed.validator, [])
        if value in values or (len(values) >= KEPT and not of_quorum):
            return False
        stake = self._validators.stakes[signed.validator]
        if not values:
            self.stake += stake
        values.append(value)
        self._signatures.setdefault(value, {})[signed.validator] = signed.signature
        self._stakes[value] = self._stakes.get(value, 0) + stake
        return True

    def rival(self, value: bytes | None, validator: bytes) -> tuple[bytes | None, bytes] | None:
        """Return another value that the validator voted for, with its signature."""
        for other in self._values_of.get(validator, ()):
            if other != value:
                return other, self._signatures[other][validator]
        return None

    def has_quorum(self, value: bytes | None) -> bool:
        """Tell whether more than 2/3 of stake voted for a value."""
        return self._validators.is_quorum(self._stakes.get(value, 0))

    def majorities(self) -> list[bytes | None]:
        """Return the values with a quorum, nil first: one at most while less than 1/3 of stake is Byzantine."""
        return sorted((value for value in self._stakes if self.has_quorum(value)), key=lambda value: value or b"")

    def signatures(self, value: bytes | None) -> tuple[Signed, ...]:
        """Return the votes for a value, sorted by validator."""
        return tuple(Signed(*item) for item in sorted(self._signatures.get(value, {}).items()))
