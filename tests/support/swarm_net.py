"""A swarm of whole nodes in one process, on the memory network and the virtual clock: all that runs is real but the
wire and the worker threads.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import trio

from blyan_node.chain.genesis import Genesis
from blyan_node.chain.keys import Key
from blyan_node.chain.replica import Replica
from blyan_node.config import NodeConfig
from blyan_node.datadir import DataDir
from blyan_node.inference.generation import Event, Finished, Generate
from blyan_node.node import assemble, run_parts
from blyan_node.p2p.memory import MemoryHub
from blyan_node.service import NodeService
from blyan_node.worker import Inline, Workers


@dataclass
class Member:
    """A running node of the swarm, and how to kill it."""

    service: NodeService
    scope: trio.CancelScope
    closed: trio.Event

    async def kill(self) -> None:
        """End it at once, without a word to anybody."""
        self.scope.cancel()
        await self.closed.wait()


class Swarm:
    """Nodes that share a hub and a genesis that bonds ``bonded`` of them."""

    def __init__(self, nursery: trio.Nursery, folder: Path, bonded: int) -> None:
        self.hub = MemoryHub()
        self.keys = [Key(bytes([7] * 31 + [index + 1])) for index in range(16)]
        self.genesis = Genesis.make("test", {key.address: 1 for key in self.keys[:bonded]}, created_ms=1)
        self._nursery, self._folder = nursery, folder

    async def start(self, index: int, *, bootstrap: Member | None = None, **settings: object) -> Member:
        """Start node ``index`` in its own directory, which outlives it."""
        member: Member = await self._nursery.start(self._run, index, bootstrap, settings)
        return member

    async def _run(
        self, index: int, bootstrap: Member | None, settings: dict[str, object], *, task_status: trio.TaskStatus[Member]
    ) -> None:
        root = self._folder / f"node{index}"
        root.mkdir(exist_ok=True)
        addresses = bootstrap.service.network.addresses()[:1] if bootstrap else ()
        config = replace(NodeConfig(data_dir=root, bootstrap=addresses, dtype="float32"), **settings)  # type: ignore[arg-type]
        closed = trio.Event()
        try:
            with trio.CancelScope() as scope:
                async with self.hub.open(self.keys[index].secret) as network:
                    with Replica.open(root / "chain", self.genesis) as replica:
                        workers = Workers(Inline(), Inline())
                        service = assemble(config, DataDir(root), self.keys[index], replica, network, workers)
                        async with trio.open_nursery() as nursery:
                            await nursery.start(run_parts, service)
                            task_status.started(Member(service, scope, closed))
        finally:
            closed.set()


@asynccontextmanager
async def open_swarm(folder: Path, *, bonded: int = 4) -> AsyncIterator[Swarm]:
    """A swarm whose nodes all end with the context."""
    async with AsyncExitStack() as stack:
        nursery = await stack.enter_async_context(trio.open_nursery())
        yield Swarm(nursery, folder, bonded)
        nursery.cancel_scope.cancel()


async def until(condition: Callable[[], object], *, within: float = 120.0) -> None:
    """Wait, on the virtual clock, for a condition; fail with its name where it does not come true."""
    with trio.fail_after(within):
        while not condition():
            await trio.sleep(0.05)


async def publish(member: Member, checkpoint: Path, name: str = "tiny") -> None:
    """Import a checkpoint on a node."""
    async with member.service.import_model(str(checkpoint), name) as progress:
        async for _ in progress:
            pass


async def ask(member: Member, request: Generate) -> tuple[Finished, list[Event]]:
    """Run one generation to its end; return its last event and all of them."""
    events: list[Event] = []
    async with member.service.generate(request) as stream:
        events.extend([event async for event in stream])
    assert isinstance(events[-1], Finished)
    return events[-1], events
