"""What the API asks of a node, answered from its parts. Reads only; the work is done in the corridors."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass, field
from pathlib import Path

import trio

from blyan_node import __version__
from blyan_node.api.service import ModelInfo, ModelLayers, ModelStatus, PeerStatus, Status, UnitHolders
from blyan_node.chain.catalog import ModelEntry
from blyan_node.chain.keys import Key, show_address
from blyan_node.chain_service import NodeChainService
from blyan_node.inference.challenge import Challenger
from blyan_node.inference.generation import Event, Generate, Progress
from blyan_node.inference.heart import Heart
from blyan_node.inference.holder import Holder
from blyan_node.inference.library import Library
from blyan_node.inference.messages import DRAINING, LOADING, SERVING, Heartbeat
from blyan_node.inference.pipeline import Pipeline
from blyan_node.inference.publish import publish_model
from blyan_node.inference.session import Entry
from blyan_node.inference.stage import Stage
from blyan_node.inference.swarm import Seen, SwarmView
from blyan_node.p2p.blocklist import Blocklist
from blyan_node.p2p.peers import Peers
from blyan_node.p2p.transport import Network
from blyan_node.relay.accuser import Accuser
from blyan_node.relay.author import Author
from blyan_node.relay.blobs import BlobExchange
from blyan_node.relay.blocks import Relay
from blyan_node.relay.finality import Finality
from blyan_node.relay.records import Submissions
from blyan_node.worker import Workers

STATES = {LOADING: "loading", SERVING: "serving", DRAINING: "draining"}


@dataclass(frozen=True)
class NodeService:
    """A node, as its API sees it."""

    key: Key
    network: Network
    peers: Peers
    blocklist: Blocklist
    relay: Relay
    finality: Finality
    submissions: Submissions
    author: Author
    accuser: Accuser
    exchange: BlobExchange
    view: SwarmView
    library: Library
    pipeline: Pipeline
    stage: Stage
    entry: Entry
    heart: Heart
    holder: Holder
    challenger: Challenger
    workers: Workers
    chain: NodeChainService
    memory_limit: int
    disk_limit: int | None
    started: float = field(default_factory=trio.current_time)

    def generate(self, request: Generate) -> AbstractAsyncContextManager[AsyncIterator[Event]]:
        """Run a generation through the swarm."""
        return self.entry.generate(request)

    def import_model(self, path: str, name: str | None) -> AbstractAsyncContextManager[AsyncIterator[Progress]]:
        """Read a checkpoint and publish it."""
        return aclosing(
            publish_model(
                path,
                name,
                replica=self.relay.replica,
                submissions=self.submissions,
                blobs=self.exchange.blobs,
                key=self.key,
                disk=self.workers.disk,
            )
        )

    async def verify(self) -> tuple[str, ...]:
        """Hash the weights on the disk and in memory."""
        return await self.holder.verify()

    def models(self) -> tuple[ModelInfo, ...]:
        """The models on the chain that are complete, those first that can run now."""
        infos = []
        for model in self.library.models():
            missing = self.view.missing(model.id, model.version, len(model.units), trio.current_time())
            infos.append(
                ModelInfo(
                    name=model.name,
                    created=self.relay.replica.genesis.created_ms // 1000,
                    owner=show_address(model.owner),
                    context_length=self.library.spec(model).context_length,
                    missing=tuple(model.units[unit] for unit in missing),
                )
            )
        return tuple(sorted(infos, key=lambda info: bool(info.missing)))

    def ready(self) -> str | None:
        """None where some model can run from end to end."""
        models = self.models()
        if not models:
            return "no model has been published yet"
        if models[0].missing:
            return f"nobody serves {len(models[0].missing)} units of {models[0].name} yet: {models[0].missing[0]}…"
        return None

    def status(self) -> Status:
        """The state of this node now."""
        now = trio.current_time()
        active = self.view.active(now)
        return Status(
            version=__version__,
            peer_id=self.network.peer_id,
            address=show_address(self.key.address),
            network=self.relay.replica.genesis.network.hex(),
            network_name=self.relay.replica.genesis.name,
            addresses=self.network.addresses(),
            state=STATES[self.holder.plan.state] if self.holder.plan else "joining",
            uptime_s=now - self.started,
            sessions=len(self.stage.seats),
            peers=tuple(self._peer(seen) for peer, seen in active.items() if peer != self.network.peer_id),
            models=tuple(self._model(model) for model in self.relay.replica.catalog().models()),
            heads=tuple(sorted(head.hex() for head in self.relay.replica.heads())),
            blocks=self.relay.replica.count(),
            cut=self.relay.replica.final.k,
            missing_validators=self._missing_validators(),
            memory_used=self.stage.memory_used(),
            memory_limit=self.memory_limit,
            resident=_resident_bytes(),
            disk_used=self.exchange.blobs.used(),
            disk_limit=self.disk_limit,
        )

    def _missing_validators(self) -> tuple[str, ...]:
        told = self.chain.validators()
        here = [seat.address for seat in told.seats if seat.here or seat.final is not None]
        if told.deciding.is_quorum(told.deciding.stake_of(here)):
            return ()
        return tuple(show_address(address) for address in told.deciding.stakes if address not in here)

    def _peer(self, seen: Seen) -> PeerStatus:
        held = seen.heartbeat.held[0] if seen.heartbeat.held else None
        names = {model.id: model.name for model in self.library.models()}
        round_trip = self.pipeline.round_trip(seen.peer)
        return PeerStatus(
            peer=seen.peer,
            addresses=seen.heartbeat.addresses,
            state=STATES[held.state] if held else "joining",
            model=names.get(held.model) if held else None,
            first=held.first if held else None,
            last=held.last if held else None,
            round_trip_ms=1000 * round_trip if round_trip else None,
        )

    def _model(self, model: ModelEntry) -> ModelStatus:
        now, units = trio.current_time(), len(model.units)
        coverage = [0] * units
        for _, held in self.view.serving(model.id, model.version, units, now):
            for unit in range(held.first, held.last + 1):
                coverage[unit] += 1
        loaded = self.stage.loaded
        served = range(loaded.first, loaded.last + 1) if loaded and loaded.model == model.id else range(0)
        return ModelStatus(
            name=model.name,
            id=model.id.hex(),
            units=model.units,
            stored=tuple(sorted(self.library.stored(model))),
            served=tuple(served),
            coverage=tuple(coverage),
            complete=model.complete,
        )

    def layers(self) -> tuple[ModelLayers, ...]:
        """Who holds what of each model, as far as this node hears."""
        return tuple(self._layers(model) for model in self.relay.replica.catalog().models())

    def _layers(self, model: ModelEntry) -> ModelLayers:
        now = trio.current_time()
        serving = self.view.serving(model.id, model.version, len(model.units), now)
        return ModelLayers(
            model=model.name,
            id=model.id.hex(),
            complete=model.complete,
            units=tuple(
                UnitHolders(
                    name=name,
                    served_by=tuple(seen.peer for seen, held in serving if held.first <= unit <= held.last),
                    stored_by=tuple(self.view.storing(model.id, unit, now)),
                )
                for unit, name in enumerate(model.units)
            ),
        )

    def heartbeat(self, sequence: int) -> Heartbeat:
        """What this node says about itself."""
        loaded = self.stage.loaded
        return Heartbeat(
            network=self.relay.replica.genesis.network,
            peer=self.network.peer_id,
            sequence=sequence,
            addresses=self.network.addresses()[:8],
            held=self.holder.held(),
            stored=self.library.stored_on_disk(),
            layer_us=self.stage.layer_us,
            free_tokens=loaded.shard.free_tokens() if loaded else 0,
            queue=sum(len(seat.inputs) for seat in self.stage.seats.values()),
            price=0,
            cut=self.relay.replica.final.k,
            height=self.relay.replica.height(),
        )


def _resident_bytes() -> int:
    """Resident memory of this process, in bytes (Linux; 0 elsewhere)."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
