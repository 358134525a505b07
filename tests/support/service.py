"""A node that says what a test tells it to say."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field

import trio

from blyan_node.api.service import ModelInfo, ModelLayers, ModelStatus, PeerStatus, Status, UnitHolders
from blyan_node.errors import BlyanError, UnknownModel
from blyan_node.inference.generation import Event, Finished, Generate, Hop, Piece, Progress, Started
from tests.support.chain_service import ScriptedChain, scripted_chain

ROUTE = (
    Hop("16Uiu2alice", "embed", "layer.1", 2, 1.5, 0.25),
    Hop("16Uiu2bob", "layer.2", "head", 2, 2.0, 0.5),
)


@dataclass
class ScriptedService:
    """Answers every prompt with ``words``, then ends as ``end`` says, or hangs if ``hang``.

    ``before`` is raised on entering, ``after`` after the words. Requests are kept in ``asked``; ``open`` counts
    generations now running, and ``left`` is set when one has been left.
    """

    words: tuple[str, ...] = ("Hello", " wörld", "!")
    reason: str = "stop"
    before: BlyanError | None = None
    after: BlyanError | None = None
    hang: bool = False
    why_not_ready: str | None = None
    asked: list[Generate] = field(default_factory=list)
    open: int = 0
    left: trio.Event = field(default_factory=trio.Event)
    steps: tuple[Progress, ...] = (Progress("read", 1, 2), Progress("read", 2, 2))
    import_error: BlyanError | None = None
    on_generate: Callable[[], None] = lambda: None
    chain: ScriptedChain = field(default_factory=scripted_chain)

    @asynccontextmanager
    async def generate(self, request: Generate) -> AsyncIterator[AsyncIterator[Event]]:
        self.asked.append(request)
        self.on_generate()
        if request.model not in (None, "tiny"):
            raise UnknownModel(f"there is no model {request.model!r} here; there is: tiny", param="model")
        if self.before:
            raise self.before
        self.open += 1
        try:
            async with aclosing(self._events()) as events:
                yield events
        finally:
            self.open -= 1
            self.left.set()

    async def _events(self) -> AsyncGenerator[Event, None]:
        yield Started("tiny", 7, ROUTE)
        for tokens, word in enumerate(self.words, start=1):
            await trio.lowlevel.checkpoint()
            yield Piece(word, tokens)
        if self.hang:
            await trio.sleep_forever()
        if self.after:
            raise self.after
        yield Finished(self.reason, "".join(self.words), 7, len(self.words), 12.5, 30.0, ROUTE)

    def models(self) -> tuple[ModelInfo, ...]:
        return (ModelInfo("tiny", 1_700_000_000, "0xabc", 512, ()),)

    def status(self) -> Status:
        return Status(
            version="0.1.0",
            peer_id="16Uiu2alice",
            address="0xabc",
            network="00" * 32,
            network_name="test",
            addresses=("/ip4/127.0.0.1/tcp/1/p2p/16Uiu2alice",),
            state="serving",
            uptime_s=12.0,
            sessions=self.open,
            peers=(PeerStatus("16Uiu2bob", (), "serving", "tiny", 3, 5, 0.5),),
            models=(ModelStatus("tiny", "11" * 32, ("embed", "layer.0", "head"), (0, 1, 2), (0,), (1, 1, 1), True),),
            heads=("22" * 32,),
            blocks=5,
            cut=2,
            missing_validators=(),
            memory_used=1000,
            memory_limit=None,
            resident=3000,
            disk_used=2000,
            disk_limit=None,
        )

    def layers(self) -> tuple[ModelLayers, ...]:
        return (ModelLayers("tiny", "11" * 32, True, (UnitHolders("embed", ("16Uiu2alice",), ("16Uiu2bob",)),)),)

    def ready(self) -> str | None:
        return self.why_not_ready

    async def verify(self) -> tuple[str, ...]:
        if self.before:
            raise self.before
        return ("embed", "layer.0", "head")

    @asynccontextmanager
    async def import_model(self, path: str, name: str | None) -> AsyncIterator[AsyncIterator[Progress]]:
        if self.before:
            raise self.before
        async with aclosing(self._import()) as steps:
            yield steps

    async def _import(self) -> AsyncGenerator[Progress, None]:
        for step in self.steps:
            await trio.lowlevel.checkpoint()
            yield step
        if self.import_error:
            raise self.import_error
