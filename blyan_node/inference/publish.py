"""A model's way onto the chain: a checkpoint becomes a blob per unit, a manifest, and a signed record per unit."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from functools import partial
from pathlib import Path

import trio

from blyan_node.chain.blobs import BlobStore
from blyan_node.chain.catalog import ModelEntry
from blyan_node.chain.keys import Key
from blyan_node.chain.records import BlobRef, Layer, Manifest, make_record
from blyan_node.chain.replica import Replica
from blyan_node.errors import RequestError
from blyan_node.inference.generation import Progress
from blyan_node.model.hub import PREFIX, fetch_hub
from blyan_node.model.importing import Checkpoint, open_checkpoint, write_unit
from blyan_node.relay.blocks import Relay
from blyan_node.worker import Lane, run_apart

MAX_NAME = 64


async def publish_model(
    source: str, name: str | None, *, relay: Relay, blobs: BlobStore, key: Key, disk: Lane
) -> AsyncGenerator[Progress, None]:
    """Import a GGUF file, a Hugging Face directory or ``hf:REPO`` and publish it; yield progress, a step per unit.

    The blobs are on disk before the first record leaves, so a reader of the chain never waits for what nobody has.
    Importing the same file under the same name again publishes only what is missing: after an interruption the rest,
    else nothing. Of one that fails or is abandoned, only what the chain names stays. Raises CheckpointError, DiskFull,
    ConfigError where this node may not write blocks.
    """
    relay.check_bonded()
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
    async with relay.writing:  # imports take turns, so what one throws away is not what another means to publish
        try:
            added.append(await disk.run(blobs.add, [checkpoint.tokenizer]))
            for index, unit in enumerate(units):
                yield Progress(f"storing {unit}", index, len(units))
                added.append(await disk.run(_store, checkpoint, unit, blobs))
            yield Progress("publishing", len(units), len(units))
            tokenizer, *refs = added
            manifest = Manifest(name, checkpoint.spec.to_json(), units, tokenizer)
            known = _published(relay.replica, key, manifest, refs)
            model = known.id if known else await _publish(relay, key, manifest, chain="A", type="manifest")
            for index, ref in enumerate(refs):
                if known is None or index not in known.layers:
                    await _publish(relay, key, Layer(model, index, ref), chain="B", type="layer")
        finally:
            unnamed = set(added) - relay.replica.catalog().blobs()
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


async def _publish(relay: Relay, key: Key, arguments: Manifest | Layer, *, chain: str, type: str) -> bytes:
    """Sign a record with the next nonce, put it into a block of its own, and return its id."""
    nonce = relay.replica.next_nonce(key.address)
    record = make_record(key, relay.replica.genesis.network, arguments, nonce=nonce)
    await relay.publish([record], chain=chain, type=type)
    return record.id


def _store(checkpoint: Checkpoint, unit: str, blobs: BlobStore) -> BlobRef:
    file = blobs.directory / "importing.tmp"  # the store sweeps away what a crash leaves of it
    try:
        write_unit(checkpoint.unit(unit), file)
        return blobs.add(file)
    finally:
        file.unlink(missing_ok=True)
