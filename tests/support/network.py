"""Networks for tests: in memory under any clock, or real libp2p hosts on loopback, behind the same seam."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Literal

import coincurve
import trio

from blyan_node.p2p.identity import peer_id_of
from blyan_node.p2p.memory import MemoryHub
from blyan_node.p2p.transport import Network, PeerId

Kind = Literal["memory", "libp2p"]
Shape = Literal["full", "star", "line", "none"]
KINDS: tuple[Kind, ...] = ("memory", "libp2p")
LOOPBACK = "/ip4/127.0.0.1/tcp/0"


def secret(number: int) -> bytes:
    """The private key of the node with this number."""
    return hashlib.sha256(b"test node %d" % number).digest()


def peer_number(number: int) -> PeerId:
    """The peer id of the node with this number."""
    return peer_id_of(coincurve.PublicKey.from_secret(secret(number)).format())


@dataclass
class Ground:
    """Opens networks of one kind; ``hub`` is where those in memory meet."""

    kind: Kind
    hub: MemoryHub = field(default_factory=MemoryHub)

    def open(self, number: int, *, listen: str = LOOPBACK) -> AbstractAsyncContextManager[Network]:
        """Open the network of the node with this number."""
        if self.kind == "memory":
            return self.hub.open(secret(number), listen=listen)
        from blyan_node.p2p.host import open_host  # libp2p takes a second to import

        return open_host(secret(number), listen=listen)


@asynccontextmanager
async def network_group(
    count: int, kind: Kind = "memory", *, shape: Shape = "full", hub: MemoryHub | None = None
) -> AsyncIterator[list[Network]]:
    """Open ``count`` networks and connect them: all with all, all with the first, or each with the next."""
    ground = Ground(kind, hub or MemoryHub())
    async with AsyncExitStack() as stack:
        group = [await stack.enter_async_context(ground.open(number)) for number in range(count)]
        for here in range(count):
            for there in range(here):
                if shape == "full" or (shape == "star" and there == 0) or (shape == "line" and there == here - 1):
                    await meet(group[here], group[there])
        yield group


async def meet(one: Network, other: Network) -> None:
    """Connect two networks, and wait until both know."""
    await one.connect(other.addresses()[0])
    await eventually(lambda: one.peer_id in other.neighbours())


async def eventually(condition: Callable[[], bool], *, within: float = 10, every: float = 0.01) -> None:
    """Wait until a condition holds; raise trio.TooSlowError if it does not within so many seconds."""
    with trio.fail_after(within):
        while not condition():
            await trio.sleep(every)
