"""The models that this node knows from the chain: finding one by name, and what is needed to speak with it."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import trio

from blyan_node.chain.catalog import ModelEntry
from blyan_node.chain.replica import Replica
from blyan_node.errors import CheckpointError, IntegrityError, ModelUnavailable, RequestError, UnknownModel
from blyan_node.inference.messages import Stored
from blyan_node.inference.swarm import SwarmView, bits_of
from blyan_node.model.spec import ModelSpec
from blyan_node.model.tokenizer import Tokenizer
from blyan_node.p2p.transport import PeerId
from blyan_node.relay.blobs import BlobExchange
from blyan_node.worker import Lane

log = logging.getLogger(__name__)

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

    def __init__(
        self, replica: Replica, exchange: BlobExchange, view: SwarmView, disk: Lane, opted: tuple[str, ...]
    ) -> None:
        self._replica, self._exchange, self._view, self._disk, self._opted = replica, exchange, view, disk, opted
        self._known: dict[bytes, Known] = {}
        self._specs: dict[bytes, ModelSpec | None] = {}

    def models(self) -> tuple[ModelEntry, ...]:
        """The models that can be served: all their layers are on the chain, and the spec is one and fits the units."""
        return tuple(
            model
            for model in self._replica.catalog().models()
            if model.complete
            and (not self._opted or model.name in self._opted or model.id.hex() in self._opted)
            and self._spec(model) is not None
        )

    def spec(self, model: ModelEntry) -> ModelSpec:
        """The spec of a model. Raises CheckpointError where its publisher wrote none, or one of other units."""
        if (spec := self._spec(model)) is None:
            raise CheckpointError(f"the manifest of {model.name} has no usable spec")
        return spec

    def _spec(self, model: ModelEntry) -> ModelSpec | None:
        if model.id not in self._specs:
            self._specs[model.id] = _sound_spec(model)
        return self._specs[model.id]

    def select(self, name: str | None) -> ModelEntry:
        """The model of that name or id; the newest of several, those first that are served from end to end now.

        Without a name, the only one there is.

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
        now = trio.current_time()
        served = [model for model in found if not self._view.missing(model.id, model.version, len(model.units), now)]
        return (served or found)[-1]

    async def know(self, model: ModelEntry) -> Known:
        """The spec and the tokenizer of a model, fetched from peers where they are not here.

        Raises ModelUnavailable where nobody has the tokenizer, CheckpointError where it is malformed.
        """
        if (known := self._known.pop(model.id, None)) is None:
            with trio.move_on_after(TOKENIZER_PATIENCE):
                known = await self._learn(model)
            if known is None:
                raise ModelUnavailable(f"no active peer has the tokenizer of {model.name}; try again soon")
        self._known[model.id] = known  # at the end of the order: the last used is the last to go
        while len(self._known) > MAX_KNOWN:
            del self._known[next(iter(self._known))]
        return known

    async def _learn(self, model: ModelEntry) -> Known:
        """Bring the tokenizer here; one that the disk changed is fetched again."""
        while True:
            await self._exchange.fetch(model.tokenizer, lambda: self.holders(model))
            try:
                await self._exchange.verify(model.tokenizer)
            except IntegrityError as error:
                log.error("fetching the tokenizer of %s again: %s", model.name, error)
            else:
                return await self._disk.run(self._read, model)

    def _read(self, model: ModelEntry) -> Known:
        return Known(self.spec(model), Tokenizer(self._exchange.blobs.path(model.tokenizer).read_bytes()))

    def holders(self, model: ModelEntry) -> list[PeerId]:
        """The active peers that have some unit of a model on disk, hence its tokenizer too."""
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


def _sound_spec(model: ModelEntry) -> ModelSpec | None:
    try:
        spec = ModelSpec.from_json(model.spec)
    except CheckpointError:
        return None
    # the count first: the names of a hostile spec's layers need not fit in memory
    return spec if spec.layers + 2 == len(model.units) and spec.units == model.units else None
