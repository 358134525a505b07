"""What is loaded is checked against the chain before anybody is served with it, and again when somebody asks."""

from __future__ import annotations

from blyan_node.chain.catalog import ModelEntry
from blyan_node.errors import IntegrityError
from blyan_node.model.beacon import check_beacon
from blyan_node.model.shard import Shard
from blyan_node.relay.blobs import BlobExchange
from blyan_node.worker import Lane


async def check_beacons(model: ModelEntry, shard: Shard, exchange: BlobExchange, compute: Lane) -> None:
    """Compute the beacon of every unit that was loaded; raise IntegrityError where one is off.

    Then its blobs are read and checked again: what the disk changed since they were is gone and fetched anew. Blobs
    that are whole stay, since the same bytes would come back.
    """
    for unit in shard.units:
        index = shard.spec.units.index(unit)
        ref = model.layers[index]
        try:
            await compute.run(check_beacon, shard, unit, ref.root, model.beacons.get(index, b""))
        except IntegrityError:
            needed = [shard.spec.units.index(name) for name in shard.spec.blobs_for(unit)]
            await exchange.verify(*(model.layers[index] for index in needed))
            raise
