"""A model's way onto the chain: a checkpoint becomes a blob per unit, a manifest, and a signed record per unit."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from functools import partial
from pathlib import Path

import trio

from blyan_node.chain.blobs import BlobStore
from blyan_node.chain.catalog import ModelEntry
from blyan_node.chain.keys import Key
from blyan_node.chain.records import BlobRef, Layer, Manifest
from blyan_node.chain.replica import Replica
from blyan_node.errors import RequestError
from blyan_node.inference.generation import Progress
from blyan_node.model.beacon import beacon_of
from blyan_node.model.hub import PREFIX, fetch_hub
from blyan_node.model.importing import Checkpoint, open_checkpoint, write_unit
from blyan_node.relay.records import Submissions
from blyan_node.worker import Lane, run_apart

MAX_NAME = 64
AT_ONCE = 32  # records that wait for a validator at once: fewer than a mempool takes of one sender


async def publish_model(
    source: str, name: str | None, *, replica: Replica, submissions: Submissions, blobs: BlobStore, key: Key, disk: Lane
) -> AsyncGenerator[Progress, None]:
    """Import a GGUF file, a Hugging Face directory or ``hf:REPO`` and publish it; yield progress, a step per unit.

    The blobs are on disk before the first record leaves, so a reader of the chain never waits for what nobody has.
    Importing the same file under the same name again publishes only what is missing: after an interruption the rest,
    else nothing. Of one that fails or is abandoned, only what the chain names stays. Raises CheckpointError, DiskFull,
    RequestError where the records are refused, and Unreachable where no validator carries them.
    """
    name = name or Path(source.removeprefix(PREFIX)).stem
    if not 0 < len(name.encode()) <= MAX_NAME:
        raise RequestError(f"a model's name has 1 to {MAX_NAME} bytes: give another with --name", param="name")
    if source.startswith(PREFIX):
        yield Progress("downloading", 0, 1)
        path = await run_apart(partial(fetch_hub, source.removeprefix(PREFIX)))
    else:
        path = Path(source)
    yield Progress("reading the checkpoint", 0, 1)
    checkpoint = await disk.run(open_checkpoint, path)
    units = checkpoint.spec.units
    added: list[BlobRef] = []
    beacons: list[bytes] = []
    named: set[BlobRef] = set()  # by records on their way to the chain
    async with (
        submissions.publishing
    ):  # imports take turns, so what one throws away is not what another means to publish
        try:
            added.append(await disk.run(blobs.add, [checkpoint.tokenizer]))
            for index, unit in enumerate(units):
                yield Progress(f"storing {unit}", index, len(units))
                added.append(await disk.run(_store, checkpoint, unit, blobs))
                beacons.append(await disk.run(_beacon, checkpoint, unit, added[-1]))
            yield Progress("publishing", len(units), len(units))
            tokenizer, *refs = added
            manifest = Manifest(name, checkpoint.spec.to_json(), units, tokenizer)
            known = _published(replica, key, manifest, refs)
            named.add(tokenizer)
            model = known.id if known else (await submissions.originate(manifest)).id
            missing = [
                Layer(model, unit, ref, beacons[unit])
                for unit, ref in enumerate(refs)
                if not known or unit not in known.layers
            ]
            for start in range(0, len(missing), AT_ONCE):
                batch = missing[start : start + AT_ONCE]
                named.update(layer.blob for layer in batch)
                await submissions.carried([(await submissions.originate(layer)).id for layer in batch])
        finally:
            unnamed = set(added) - named - replica.catalog().blobs()
            with trio.CancelScope(shield=True):
                for ref in unnamed:
                    await disk.run(blobs.remove, ref)
    yield Progress("published", len(units), len(units))


def _published(replica: Replica, key: Key, manifest: Manifest, refs: list[BlobRef]) -> ModelEntry | None:
    """The same model, whole or in part, as this key published it before."""
    for model in reversed(replica.catalog().models()):
        same = Manifest(model.name, model.spec, model.units, model.tokenizer) == manifest
        if same and model.owner == key.address and all(refs[unit] == ref for unit, ref in model.layers.items()):
            return model
    return None


def _store(checkpoint: Checkpoint, unit: str, blobs: BlobStore) -> BlobRef:
    file = blobs.directory / "importing.tmp"  # the store sweeps away what a crash leaves of it
    try:
        write_unit(checkpoint.unit(unit), file)
        return blobs.add(file)
    finally:
        file.unlink(missing_ok=True)


def _beacon(checkpoint: Checkpoint, unit: str, ref: BlobRef) -> bytes:
    tensors = {name: checkpoint.unit(name) for name in checkpoint.spec.blobs_for(unit)}
    return beacon_of(checkpoint.spec, unit, tensors, ref.root)
