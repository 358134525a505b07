"""The catalog: which models there are, of what layers, by whom. A view of a state of the ledger, which judges them."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from dataclasses import dataclass

from blyan_node.chain.records import BlobRef, Layer
from blyan_node.chain.state import State


@dataclass(frozen=True)
class ModelEntry:
    """A model on the chain. ``id`` is that of the manifest's record.

    ``layers`` maps indexes into ``units`` to blobs, ``beacons`` to the sums of what each unit is to compute.
    ``version`` is a hash over the id and the roots of the layers; it means something once the model is complete.
    """

    id: bytes
    name: str
    owner: bytes
    spec: bytes
    units: tuple[str, ...]
    tokenizer: BlobRef
    layers: dict[int, BlobRef]
    beacons: dict[int, bytes]

    @property
    def complete(self) -> bool:
        """Whether every unit has a layer."""
        return len(self.layers) == len(self.units)

    @property
    def version(self) -> bytes:
        """sha256(id | root of each unit's layer in order, 32 zero bytes where there is none)."""
        roots = (self.layers[unit].root if unit in self.layers else bytes(32) for unit in range(len(self.units)))
        return hashlib.sha256(self.id + b"".join(roots)).digest()


class Catalog:
    """The models of a state, as they were when the catalog was made."""

    def __init__(self, state: State) -> None:
        """Gather every model's layers; a new state takes a new catalog."""
        layers: defaultdict[bytes, dict[int, Layer]] = defaultdict(dict)
        for model, unit in sorted(state.layers):
            layers[model][unit] = state.layers[model, unit]
        self._models = {
            id: ModelEntry(
                id=id,
                name=model.manifest.name,
                owner=model.owner,
                spec=model.manifest.spec,
                units=model.manifest.units,
                tokenizer=model.manifest.tokenizer,
                layers={unit: layer.blob for unit, layer in layers[id].items()},
                beacons={unit: layer.beacon for unit, layer in layers[id].items()},
            )
            for id, model in state.models.items()
        }

    def models(self) -> tuple[ModelEntry, ...]:
        """Return all models, complete or not, in the order in which their manifests took effect."""
        return tuple(self._models.values())

    def model(self, id: bytes) -> ModelEntry | None:
        """Return one model."""
        return self._models.get(id)

    def blobs(self) -> set[BlobRef]:
        """Return the blobs that the models name, complete or not."""
        models = self._models.values()
        return {blob for model in models for blob in (model.tokenizer, *model.layers.values())}
