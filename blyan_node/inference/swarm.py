"""Each node's own view of the swarm, folded from signed heartbeats: who is active, who stores and serves what.

There is no registry: every node folds the same gossip, for itself. Pure: the time is an argument.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from blyan_node import codec
from blyan_node.chain.keys import Key, digest, recover
from blyan_node.errors import RuleError, SignatureError
from blyan_node.inference.messages import LOADING, SERVING, Heartbeat, Held, Signed
from blyan_node.p2p.identity import peer_id_of
from blyan_node.p2p.transport import PeerId

INTERVAL = 5.0
LIFETIME = 3 * INTERVAL
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

    @property
    def peer(self) -> PeerId:
        """Whose it is."""
        return PeerId(self.heartbeat.peer)


class SwarmView:
    """The fold of heartbeats. Bounded to MAX_PEERS: when full, a newcomer takes the place of one that has expired."""

    def __init__(self) -> None:
        self._seen: dict[PeerId, Seen] = {}

    def observe(self, heartbeat: Heartbeat, now: float) -> bool:
        """Take in a verified heartbeat; False where it is older than what is known or there is no room."""
        peer = PeerId(heartbeat.peer)
        known = self._seen.get(peer)
        if known is not None and known.heartbeat.sequence >= heartbeat.sequence:
            return False
        if known is None and len(self._seen) >= MAX_PEERS:
            expired = next((old for old, seen in self._seen.items() if now - seen.at > LIFETIME), None)
            if expired is None:
                return False
            del self._seen[expired]
        self._seen[peer] = Seen(heartbeat, now)
        return True

    def forget(self, peer: PeerId) -> None:
        """Drop a peer that is known to be gone; its next heartbeat brings it back."""
        if (seen := self._seen.get(peer)) is not None:
            # The sequence stays, so a delayed copy of an old heartbeat cannot revive it.
            self._seen[peer] = Seen(seen.heartbeat, -LIFETIME * 2)

    def active(self, now: float) -> dict[PeerId, Seen]:
        """The peers heard within LIFETIME, in the order of their ids."""
        return {peer: seen for peer, seen in sorted(self._seen.items()) if now - seen.at <= LIFETIME}

    def is_active(self, peer: PeerId, now: float) -> bool:
        """Was this peer heard within LIFETIME?"""
        seen = self._seen.get(peer)
        return seen is not None and now - seen.at <= LIFETIME

    def addresses(self, peer: PeerId) -> tuple[str, ...]:
        """Where the peer says that it can be dialled."""
        seen = self._seen.get(peer)
        return seen.heartbeat.addresses if seen else ()

    def holding(self, model: bytes, version: bytes, now: float) -> Iterator[tuple[Seen, Held]]:
        """What active peers hold of one version of a model, loading or served."""
        for seen in self.active(now).values():
            for held in seen.heartbeat.held:
                if held.model == model and held.version == version:
                    yield seen, held

    def serving(self, model: bytes, version: bytes, now: float) -> list[tuple[Seen, Held]]:
        """What active peers serve of one version of a model."""
        return [(seen, held) for seen, held in self.holding(model, version, now) if held.state == SERVING]

    def storing(self, model: bytes, unit: int, now: float) -> list[PeerId]:
        """The active peers that have a unit on disk."""
        return [
            seen.peer
            for seen in self.active(now).values()
            for stored in seen.heartbeat.stored
            if stored.model == model and unit in units_of(stored.units)
        ]

    def missing(self, model: bytes, version: bytes, units: int, now: float) -> list[int]:
        """The units that nobody serves."""
        served = {unit for _, held in self.serving(model, version, now) for unit in range(held.first, held.last + 1)}
        return [unit for unit in range(units) if unit not in served]

    def intending(self, model: bytes, version: bytes, now: float) -> list[tuple[Seen, Held]]:
        """What active peers are loading of one version of a model."""
        return [(seen, held) for seen, held in self.holding(model, version, now) if held.state == LOADING]


def units_of(bits: bytes) -> frozenset[int]:
    """The units whose bit is set."""
    return frozenset(8 * byte + bit for byte, value in enumerate(bits) for bit in range(8) if value >> bit & 1)


def bits_of(units: frozenset[int]) -> bytes:
    """The bit set of units, without trailing zero bytes."""
    return sum(1 << unit for unit in units).to_bytes((max(units, default=-1) + 8) // 8, "little")
