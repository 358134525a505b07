"""Weights that are not what the chain says, on the disk or in memory, are found; nobody is served with them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch
import trio
from trio.testing import MockClock

from blyan_node.chain.blobs import BlobStore
from blyan_node.chain.catalog import ModelEntry
from blyan_node.chain.merkle import Tree, leaf_hash
from blyan_node.errors import IntegrityError
from blyan_node.inference import publish as publishing
from blyan_node.model.beacon import TOLERANCE, difference, probe
from blyan_node.model.integrity import verify_layer_integrity
from blyan_node.model.shard import Shard
from blyan_node.model.spec import ModelSpec
from tests.support.models import tiny_checkpoint
from tests.support.swarm_net import Member, open_swarm, publish, until


@asynccontextmanager
async def published(folder: Path) -> AsyncIterator[tuple[Member, ModelEntry]]:
    """A node that published a model, and the model as its chain has it."""
    checkpoint = tiny_checkpoint(folder / "checkpoint")
    async with open_swarm(folder) as swarm:
        node = await swarm.start(0)
        await publish(node, checkpoint)
        await until(lambda: node.service.ready() is None)
        yield node, node.service.library.models()[0]


def load_layer_from_blockchain(model: ModelEntry, blobs: BlobStore, unit: int, dtype: str = "float32") -> Shard:
    """One unit, from the blobs that the chain names."""
    spec = ModelSpec.from_json(model.spec)
    needed = spec.blobs_for(spec.units[unit])
    paths = {name: blobs.path(model.layers[spec.units.index(name)]) for name in needed}
    return Shard.load(spec, unit, unit, paths, dtype=dtype)


async def test_weight_verification(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with published(tmp_path) as (node, model):
        blobs = node.service.exchange.blobs
        for unit, ref in model.layers.items():
            data = blobs.path(ref).read_bytes()
            chunks = [data[start : start + (1 << 20)] for start in range(0, len(data), 1 << 20)]
            assert Tree([leaf_hash(chunk) for chunk in chunks]).root == ref.root
            layer = load_layer_from_blockchain(model, blobs, unit)
            output = probe(layer, unit, unit, ref.root)
            assert difference(model.beacons[unit], output) < TOLERANCE["float32"] / 100
            verify_layer_integrity(layer)


TAMPERINGS: dict[str, tuple[int, Callable[[Shard], torch.Tensor]]] = {
    "embedding": (0, lambda shard: shard._embedding),  # type: ignore[dict-item, return-value]
    "norm": (2, lambda shard: shard._layers[0]._mlp_norm._weight),
    "packed": (2, lambda shard: shard._layers[0]._down._weight),
    "rotation": (2, lambda shard: shard._rotary._frequencies),
    "head": (5, lambda shard: shard._projection._weight),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("what", TAMPERINGS)
async def test_tamper_detection(tmp_path: Path, autojump_clock: MockClock, what: str, dtype: str) -> None:
    unit, weight_of = TAMPERINGS[what]
    async with published(tmp_path) as (node, model):
        layer = load_layer_from_blockchain(model, node.service.exchange.blobs, unit, dtype)
        verify_layer_integrity(layer)
        weight = weight_of(layer)
        if weight.is_mkldnn:  # oneDNN's layout has no elements to set: the whole is scaled, by less than 1 %
            weight.mul_(1.0079)
        else:
            weight.data.view(-1)[0] += 0.1
        with pytest.raises(IntegrityError, match=model.units[unit]):
            verify_layer_integrity(layer)


async def test_a_blob_that_the_disk_changed_is_fetched_again_and_then_served(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint")
    async with open_swarm(tmp_path) as swarm:
        first = await swarm.start(0)
        second = await swarm.start(1, bootstrap=first)
        await publish(first, checkpoint)
        await until(lambda: first.service.stage.loaded and second.service.stage.loaded)
        (model,) = second.service.library.models()
        path = second.service.exchange.blobs.path(model.layers[2])
        await second.kill()
        data = bytearray(path.read_bytes())
        data[-5] ^= 1
        path.write_bytes(data)
        again = await swarm.start(1, bootstrap=first)
        await until(lambda: again.service.stage.loaded is not None)
        assert path.read_bytes() != bytes(data)
        assert again.service.stage.loaded is not None
        again.service.stage.loaded.shard.verify()


async def test_a_unit_whose_beacon_is_off_is_never_served(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = publishing._beacon
    monkeypatch.setattr(
        publishing,
        "_beacon",
        lambda checkpoint, unit, ref: bytes(256) if unit == "layer.1" else real(checkpoint, unit, ref),
    )
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint")
    async with open_swarm(tmp_path) as swarm:
        node = await swarm.start(0)
        await publish(node, checkpoint)
        await trio.sleep(60)
        assert node.service.stage.loaded is None
        assert "nobody serves" in (node.service.ready() or "")
        assert any("layer.1 computes something else" in record.message for record in caplog.records)
        (model,) = node.service.library.models()
        assert node.service.library.stored(model) == frozenset(range(6)), "the bytes are right: they stay"


async def test_a_running_node_that_verifies_itself_finds_tampering_and_loads_again(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with published(tmp_path) as (node, model):
        assert await node.service.verify() == model.units
        assert node.service.stage.loaded is not None
        tampered = node.service.stage.loaded.shard
        tampered._layers[1]._attention_norm._weight.data[3] += 0.1
        with pytest.raises(IntegrityError, match=r"layer\.1"):
            await node.service.verify()
        assert node.service.stage.loaded is None
        await until(lambda: node.service.stage.loaded is not None)
        assert await node.service.verify() == model.units


async def test_a_node_that_verifies_itself_finds_a_blob_that_the_disk_changed(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with published(tmp_path) as (node, model):
        path = node.service.exchange.blobs.path(model.layers[3])
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
        with pytest.raises(IntegrityError):
            await node.service.verify()
        assert not node.service.exchange.blobs.has(model.layers[3])
