"""A hostile neighbour of a relay, beside a victim and an honest peer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from blyan_node.p2p import rpc
from blyan_node.p2p.memory import MemoryHub
from blyan_node.p2p.transport import Network
from blyan_node.relay.messages import (
    GET_BLOCKS,
    GET_CUTS,
    GET_SINCE,
    MAX_HEADS,
    STATUS,
    Blocks,
    Cuts,
    GetBlocks,
    GetCuts,
    GetSince,
    Since,
    Status,
)
from tests.integration.test_relay import Peer, peers
from tests.support.chains import NETWORK
from tests.support.network import eventually, secret
from tests.support.validators import Node


@dataclass
class Villain:
    """A neighbour that answers as a test says, and counts what it is asked."""

    network: Network
    victim: Peer | Node
    status: Status = field(default_factory=lambda: Status(NETWORK, 0, 0, NETWORK, 0, (NETWORK,)))
    asked: dict[str, int] = field(default_factory=dict)

    def serve(
        self,
        blocks: Callable[[GetBlocks], Blocks] = lambda _request: Blocks(()),
        since: Callable[[GetSince], Since] = lambda _request: Since((), None),
        cuts: Callable[[GetCuts], Cuts] = lambda _request: Cuts(()),
    ) -> None:
        def counted(name: str, answer: Callable[[Any], Any]) -> Callable[[Any, Any], Awaitable[Any]]:
            async def handler(_peer: Any, request: Any) -> Any:
                await trio.lowlevel.checkpoint()
                self.asked[name] = self.asked.get(name, 0) + 1
                return answer(request)

            return handler

        rpc.serve(self.network, STATUS, counted("status", lambda _request: self.status), concurrency=8)
        rpc.serve(self.network, GET_BLOCKS, counted("blocks", blocks), concurrency=8)
        rpc.serve(self.network, GET_SINCE, counted("since", since), concurrency=8)
        rpc.serve(self.network, GET_CUTS, counted("cuts", cuts), concurrency=8)

    async def connect(self) -> None:
        await self.network.connect(self.victim.network.addresses()[0])

    async def tell(self, status: Status | None = None) -> Status:
        return await rpc.call(self.network, self.victim.network.peer_id, STATUS, status or self.status)

    def is_out(self) -> bool:
        return self.victim.network.peer_id not in self.network.neighbours()

    def points(self) -> float:
        """What the victim holds against it."""
        return self.victim.network._scores.points(self.network.peer_id)  # type: ignore[attr-defined]


@asynccontextmanager
async def victim_and_villain(folder: Path) -> AsyncIterator[tuple[Peer, Villain, Peer]]:
    """A victim, a villain that is not connected yet, and an honest peer; at the end both honest ones still agree."""
    hub = MemoryHub(latency=0.01)
    async with peers(folder, 2, hub=hub) as (victim, honest), AsyncExitStack() as stack:
        network = await stack.enter_async_context(hub.open(secret(14)))
        await victim.meet(honest)
        yield victim, Villain(network, victim), honest
        await honest.write()
        await eventually(lambda: victim.replica.heads() == honest.replica.heads(), within=20)


def foreign_heads() -> tuple[bytes, ...]:
    return tuple(sorted(number.to_bytes(32) for number in range(MAX_HEADS)))
