"""What this node has found out, by challenges, about whether its peers compute what they should. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from blyan_node.p2p.transport import PeerId

RECENT = 900.0  # seconds for which a challenge that was passed counts
DISTRUST_FIRST = 60.0  # seconds that a peer is not used after it failed a challenge; doubles with each further one
DISTRUST_MOST = 86_400.0
AGAIN = 15.0  # seconds before its time is up that a peer may be challenged again: what fails then never comes back
MAX_PEERS = 4096

Unit = tuple[bytes, int]
"""The version of a model and the index of a unit."""


@dataclass
class Standing:
    """Who passed which challenges, and when; who failed how often, and until when it is not to be used.

    Bounded to MAX_PEERS each: of those that passed the one least lately heard of goes first, of those that failed the
    one whose time is up first.
    """

    _passed: dict[PeerId, dict[Unit, float]] = field(default_factory=dict)
    _failed: dict[PeerId, tuple[int, float]] = field(default_factory=dict)

    def passed(self, peer: PeerId, version: bytes, first: int, last: int, now: float) -> None:
        """A peer computed units ``first`` to ``last`` as they are; once its time is up, that makes up for a failure."""
        kept = {unit: at for unit, at in self._passed.pop(peer, {}).items() if now - at <= RECENT}
        self._passed[peer] = kept | {(version, unit): now for unit in range(first, last + 1)}
        if len(self._passed) > MAX_PEERS:
            del self._passed[next(iter(self._passed))]
        count, until = self._failed.get(peer, (0, 0.0))
        if count > 1 and until <= now:
            self._failed[peer] = (count - 1, until)
        elif until <= now:
            self._failed.pop(peer, None)

    def failed(self, peer: PeerId, now: float) -> None:
        """A peer computed something else: what it passed before counts no more, and it is not used for a while."""
        self._passed.pop(peer, None)
        count = self._failed.pop(peer, (0, 0.0))[0] + 1
        if len(self._failed) >= MAX_PEERS:
            del self._failed[min(self._failed, key=lambda other: self._failed[other][1])]
        self._failed[peer] = (count, now + min(DISTRUST_FIRST * 2 ** (count - 1), DISTRUST_MOST))

    def is_distrusted(self, peer: PeerId, now: float) -> bool:
        """Tell whether a peer failed a challenge and its time is not up."""
        return self._failed.get(peer, (0, 0.0))[1] > now

    def may_be_challenged(self, peer: PeerId, now: float) -> bool:
        """Tell whether another challenge could change anything yet."""
        return self._failed.get(peer, (0, 0.0))[1] <= now + AGAIN

    def proven(self, peer: PeerId, version: bytes, unit: int, now: float) -> float | None:
        """When a peer last passed a challenge on a unit, if lately."""
        at = self._passed.get(peer, {}).get((version, unit))
        return at if at is not None and now - at <= RECENT else None
