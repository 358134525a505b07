"""Heartbeats for tests of the view and of what is decided from it."""

from __future__ import annotations

from blyan_node.inference.messages import Heartbeat, Held


def heartbeat(peer: str, sequence: int, *held: Held, layer_us: int = 1000, queue: int = 0, price: int = 0) -> Heartbeat:
    """A heartbeat of a peer that holds what is given."""
    return Heartbeat(
        network=bytes(32),
        peer=peer,
        sequence=sequence,
        addresses=(f"/ip4/127.0.0.1/tcp/4001/p2p/{peer}",),
        held=held,
        stored=(),
        layer_us=layer_us,
        free_tokens=10_000,
        queue=queue,
        price=price,
        cut=0,
        height=0,
    )
