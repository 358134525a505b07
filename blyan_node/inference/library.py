"""The models that this node knows from the chain: finding one by name, and what is needed to speak with it."""

from __future__ import annotations

from dataclasses import dataclass

import trio

from blyan_node.chain.catalog import ModelEntry
from blyan_node.chain.replica import Replica
from blyan_node.errors import ModelUnavailable, RequestError, UnknownModel
from blyan_node.inference.messages import Stored
from blyan_node.inference.placement import Demand
from blyan_node.inference.swarm import SwarmView, bits_of
from blyan_node.model.spec import ModelSpec
from blyan_node.model.tokenizer import Tokenizer
from blyan_node.p2p.transport import PeerId
from blyan_node.relay.blobs import BlobExchange

MAX_KNOWN = 8
TOKENIZER_PATIENCE = 20.0


@dataclass(frozen=True)
class Known:
    """What an entry needs of a model; it needs no weights."""

    spec: ModelSpec
    tokenizer: Tokenizer


class Library:
    """The complete models of the catalog that this node's operator opted into.

    ``opted`` holds names or ids in hex; empty means all. Keeps the tokenizers of the MAX_KNOWN models last used.
    """

    def __init__(self, replica: Replica, exchange: BlobExchange, view: SwarmView, opted: tuple[str, ...]) -> None:
        self._replica, self._exchange, self._view, self._opted = replica, exchange, view, opted
        self._known: dict[bytes, Known] = {}

    def models(self) -> tuple[ModelEntry, ...]:
        """The models that can be served: all their layers are on the chain."""
        return tuple(
            model
            for model in self._replica.catalog().models()
            if model.complete and (not self._opted or model.name in self._opted or model.id.hex() in self._opted)
        )

    def select(self, name: str | None) -> ModelEntry:
        """The model of that name or id; the newest of several. Without a name, the only one there is.

        Raises UnknownModel, naming those that exist, and ModelUnavailable where the network has none.
        """
        models = self.models()
        found = [model for model in models if name in (None, model.name, model.id.hex())]
        names = sorted({model.name for model in models})
        if not names:
            raise ModelUnavailable("this network has no complete model yet: publish one with `blyan-node model import`")
        if not found:
            raise UnknownModel(f"there is no model {name!r} here; there is: {', '.join(names)}", param="model")
        if name is None and len(names) > 1:
            raise RequestError(f"name one of the models: {', '.join(names)}", param="model")
        return found[-1]

    async def know(self, model: ModelEntry) -> Known:
        """The spec and the tokenizer of a model, fetched from peers where they are not here.

        Raises ModelUnavailable where nobody has the tokenizer, CheckpointError where it is malformed.
        """
        if (known := self._known.pop(model.id, None)) is None:
            with trio.move_on_after(TOKENIZER_PATIENCE) as waited:
                await self._exchange.fetch(model.tokenizer, lambda: self.holders(model))
            if waited.cancelled_caught:
                raise ModelUnavailable(f"no active peer has the tokenizer of {model.name}; try again soon")
            raw = self._exchange.blobs.path(model.tokenizer).read_bytes()
            known = Known(ModelSpec.from_json(model.spec), Tokenizer(raw))
        self._known[model.id] = known  # at the end of the order: the last used is the last to go
        while len(self._known) > MAX_KNOWN:
            del self._known[next(iter(self._known))]
        return known

    def holders(self, model: ModelEntry) -> list[PeerId]:
        """The active peers, others than this node, that have some unit of a model on disk, hence its tokenizer too."""
        return [
            seen.peer
            for seen in self._view.active(trio.current_time()).values()
            if any(stored.model == model.id for stored in seen.heartbeat.stored)
        ]

    def stored(self, model: ModelEntry) -> frozenset[int]:
        """The units of a model that are on this node's disk; none before its tokenizer is."""
        if not self._exchange.blobs.has(model.tokenizer):
            return frozenset()
        return frozenset(unit for unit, ref in model.layers.items() if self._exchange.blobs.has(ref))

    def stored_on_disk(self) -> tuple[Stored, ...]:
        """The same for all models, as a heartbeat says it."""
        models = [(model, self.stored(model)) for model in self.models()]
        return tuple(Stored(model.id, bits_of(units)) for model, units in models if units)[-16:]


def demand(model: ModelEntry, dtype: str) -> Demand:
    """What placement needs to know of a model computed in ``dtype``."""
    spec = ModelSpec.from_json(model.spec)
    sizes = tuple(spec.unit_bytes(unit, dtype) for unit in spec.units)
    shared = sizes[0] if spec.tied_head else 0
    return Demand(model.id, model.version, sizes, shared)
