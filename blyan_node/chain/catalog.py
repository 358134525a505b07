"""The catalog: which models there are, of what layers, by whom. A pure fold of manifests and layers in order.

The order is (height, id of the block, place in the block): tentative, since a block that arrives later may stand
earlier. Records are judged here, not in the rules of blocks: one that means nothing is ignored, with a reason.

- Only the sender of a model's manifest, its owner, publishes layers of it.
- Of several layers for one unit the one with the highest nonce counts, so an owner replaces a layer by a later record,
  and carrying an old record in again changes nothing.
- Of different records of one sender with one nonce the first in order counts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from blyan_node.chain.block import Block
from blyan_node.chain.records import BlobRef, Layer, Manifest, Record
from blyan_node.errors import RuleError

KINDS = ("manifest", "layer")
"""The kinds of records that the catalog folds; of all others it knows nothing."""


@dataclass(frozen=True, order=True)
class Entry:
    """A record and its place in the order."""

    height: int
    block: bytes
    index: int
    record: Record = field(compare=False)


@dataclass(frozen=True)
class ModelEntry:
    """A model on the chain. ``id`` is that of the manifest's record; ``layers`` maps indexes into ``units`` to blobs.

    ``version`` is a hash over the id and the roots of the layers; it means something once the model is complete.
    """

    id: bytes
    name: str
    owner: bytes
    spec: bytes
    units: tuple[str, ...]
    tokenizer: BlobRef
    layers: dict[int, BlobRef]

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
    """The models that a set of records amounts to."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        """Fold entries, sorted into their order first."""
        self._models: dict[bytes, ModelEntry] = {}
        self._nonces: dict[tuple[bytes, int], bytes] = {}
        self._layer_nonces: dict[tuple[bytes, int], int] = {}
        self._reasons: dict[bytes, str] = {}
        self._next: dict[bytes, int] = {}
        for entry in sorted(entries):
            self._take(entry.record)

    def models(self) -> tuple[ModelEntry, ...]:
        """Return all models, complete or not, in the order of their manifests."""
        return tuple(self._models.values())

    def model(self, id: bytes) -> ModelEntry | None:
        """Return one model."""
        return self._models.get(id)

    def blobs(self) -> set[BlobRef]:
        """Return the blobs that the models name, complete or not."""
        models = self._models.values()
        return {blob for model in models for blob in (model.tokenizer, *model.layers.values())}

    def reason(self, record: bytes) -> str | None:
        """Tell why a record (by id) is ignored; None where it counts or is not known here."""
        return self._reasons.get(record)

    def next_nonce(self, sender: bytes) -> int:
        """Return a nonce above all that the sender has used in records of the catalog."""
        return self._next.get(sender, 0)

    def _take(self, record: Record) -> None:
        if self._nonces.get((record.sender, record.nonce)) == record.id:
            return  # the same record, carried in a second time
        self._next[record.sender] = max(record.nonce + 1, self.next_nonce(record.sender))
        try:
            if record.kind not in KINDS:
                raise RuleError(f"unknown kind {record.kind!r}")
            arguments = record.parsed()
            if (record.sender, record.nonce) in self._nonces:
                raise RuleError(f"the sender used nonce {record.nonce} before, for another record")
            if isinstance(arguments, Manifest):
                self._publish(record, arguments)
            elif isinstance(arguments, Layer):
                self._add_layer(record, arguments)
        except RuleError as error:
            self._reasons[record.id] = str(error)
        else:
            self._nonces[record.sender, record.nonce] = record.id

    def _publish(self, record: Record, manifest: Manifest) -> None:
        if len(set(manifest.units)) != len(manifest.units):
            raise RuleError("two units of the manifest have the same name")
        self._models[record.id] = ModelEntry(
            id=record.id,
            name=manifest.name,
            owner=record.sender,
            spec=manifest.spec,
            units=manifest.units,
            tokenizer=manifest.tokenizer,
            layers={},
        )

    def _add_layer(self, record: Record, layer: Layer) -> None:
        if (model := self._models.get(layer.model)) is None:
            raise RuleError("no manifest of this model stands before the layer")
        if record.sender != model.owner:
            raise RuleError("only the owner of a model, the sender of its manifest, publishes its layers")
        if layer.unit >= len(model.units):
            raise RuleError(f"unit {layer.unit} of a model of {len(model.units)} units")
        slot = (model.id, layer.unit)
        if record.nonce < self._layer_nonces.get(slot, 0):
            raise RuleError("a later record of the owner publishes this unit")
        self._layer_nonces[slot] = record.nonce
        self._models[model.id] = replace(model, layers={**model.layers, layer.unit: layer.blob})


def entries_of(block: Block) -> list[Entry]:
    """Return the records of a block that the catalog folds: those of its kinds."""
    return [
        Entry(block.height, block.id, index, record)
        for index, record in enumerate(block.records)
        if record.kind in KINDS
    ]
