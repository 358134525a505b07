"""Each node's own view of the swarm, folded from signed heartbeats: who is active, who stores and serves what.

There is no registry: every node folds the same gossip, for itself. Pure: the time is an argument.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from blyan_node import codec
from blyan_node.chain.keys import Key, digest, recover
from blyan_node.errors import RuleError, SignatureError
from blyan_node.inference.messages import DRAINING, SERVING, Heartbeat, Held, Signed
from blyan_node.p2p.identity import peer_id_of
from blyan_node.p2p.transport import PeerId

INTERVAL = 5.0
LIFETIME = 3 * INTERVAL
MEMORY = 600.0  # seconds for which older words of a silent peer are known as such: its clock may have gone back
MAX_PEERS = 4096
DOMAIN = b"blyan/heartbeat/1"
MAX_SIGNED = 8400


def sign(heartbeat: Heartbeat, key: Key) -> bytes:
    """Encode and sign a heartbeat with the node's key."""
    body = codec.pack(heartbeat)
    return codec.pack(Signed(body, key.sign(digest(DOMAIN, body))))


def verify(data: bytes, network: bytes) -> Heartbeat:
    """Decode a signed heartbeat. Raises RuleError where it is malformed, foreign or not its peer's own."""
    signed = codec.unpack(Signed, data, most=MAX_SIGNED)
    heartbeat = codec.unpack(Heartbeat, signed.body, most=8192)
    if heartbeat.network != network:
        raise RuleError("a heartbeat of another network")
    if peer_id_of(recover(digest(DOMAIN, signed.body), signed.signature)) != heartbeat.peer:
        raise SignatureError("a heartbeat that its peer did not sign")
    for held in heartbeat.held:
        if held.first > held.last:
            raise RuleError("a heartbeat that claims an empty range")
    return heartbeat


@dataclass(frozen=True)
class Seen:
    """The newest heartbeat of a peer and when it was heard, in seconds of the local monotonic clock."""

    heartbeat: Heartbeat
    at: float
    gone: bool = False  # known to have left since

    @property
    def peer(self) -> PeerId:
        """Whose it is."""
        return PeerId(self.heartbeat.peer)

    def is_active(self, now: float) -> bool:
        """Tell whether it still holds."""
        return not self.gone and now - self.at <= LIFETIME


class SwarmView:
    """The fold of heartbeats. Bounded to MAX_PEERS: when full, a newcomer takes the place of one that has expired."""

    def __init__(self) -> None:
        self._seen: dict[PeerId, Seen] = {}

    def observe(self, heartbeat: Heartbeat, now: float) -> bool:
        """Take in a verified heartbeat; False where it is older than what is known or there is no room."""
        peer = PeerId(heartbeat.peer)
        known = self._seen.get(peer)
        if known is not None and known.heartbeat.sequence >= heartbeat.sequence and now - known.at <= MEMORY:
            return False
        if known is None and len(self._seen) >= MAX_PEERS:
            expired = next((old for old, seen in self._seen.items() if not seen.is_active(now)), None)
            if expired is None:
                return False
            del self._seen[expired]
        self._seen[peer] = Seen(heartbeat, now)
        return True

    def forget(self, peer: PeerId) -> None:
        """Drop a peer that is known to be gone; its next heartbeat brings it back."""
        if (seen := self._seen.get(peer)) is not None:
            # The sequence stays, so a delayed copy of an old heartbeat cannot revive it.
            self._seen[peer] = replace(seen, gone=True)

    def active(self, now: float) -> dict[PeerId, Seen]:
        """The peers heard within LIFETIME, in the order of their ids."""
        return {peer: seen for peer, seen in sorted(self._seen.items()) if seen.is_active(now)}

    def is_active(self, peer: PeerId, now: float) -> bool:
        """Tell whether this peer was heard within LIFETIME."""
        seen = self._seen.get(peer)
        return seen is not None and seen.is_active(now)

    def holding(self, model: bytes, version: bytes, units: int, now: float) -> Iterator[tuple[Seen, Held]]:
        """What active peers hold of one version of a model of so many units, loading or served.

        A claim to more units than there are is none.
        """
        for seen in self.active(now).values():
            for held in seen.heartbeat.held:
                if held.model == model and held.version == version and held.last < units:
                    yield seen, held

    def serving(self, model: bytes, version: bytes, units: int, now: float) -> list[tuple[Seen, Held]]:
        """What active peers serve of one version of a model of so many units."""
        return [(seen, held) for seen, held in self.holding(model, version, units, now) if held.state == SERVING]

    def leaving(self, now: float) -> set[PeerId]:
        """The active peers that are about to go."""
        return {
            peer
            for peer, seen in self.active(now).items()
            if any(held.state == DRAINING for held in seen.heartbeat.held)
        }

    def storing(self, model: bytes, unit: int, now: float) -> list[PeerId]:
        """The active peers that have a unit on disk."""
        return [
            seen.peer
            for seen in self.active(now).values()
            for stored in seen.heartbeat.stored
            if stored.model == model and _has_bit(stored.units, unit)
        ]

    def stored(self, model: bytes, units: int, now: float, *, but: PeerId) -> frozenset[int]:
        """Those of a model's units that some active peer other than ``but`` has on disk."""
        bits = 0
        for seen in self.active(now).values():
            for stored in seen.heartbeat.stored:
                if stored.model == model and seen.peer != but:
                    bits |= int.from_bytes(stored.units, "little")
        return frozenset(unit for unit in range(units) if bits >> unit & 1)

    def missing(self, model: bytes, version: bytes, units: int, now: float) -> list[int]:
        """The units that nobody serves."""
        claims = self.serving(model, version, units, now)
        served = {unit for _, held in claims for unit in range(held.first, held.last + 1)}
        return [unit for unit in range(units) if unit not in served]


def _has_bit(bits: bytes, index: int) -> bool:
    return index < 8 * len(bits) and bool(bits[index // 8] >> index % 8 & 1)


def bits_of(units: frozenset[int]) -> bytes:
    """The bit set of units, without trailing zero bytes."""
    return sum(1 << unit for unit in units).to_bytes((max(units, default=-1) + 8) // 8, "little")
