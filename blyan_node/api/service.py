"""What the HTTP API needs of a node. The node implements :class:`Service`; tests script one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from blyan_node.api.chain_service import ChainService
from blyan_node.inference.generation import Event, Generate, Progress


@dataclass(frozen=True)
class ModelInfo:
    """A model that this node knows of. ``missing`` names the units that nobody serves now; empty: it can run."""

    name: str
    created: int
    """When it was published, in seconds since 1970."""
    owner: str
    context_length: int
    missing: tuple[str, ...]


@dataclass(frozen=True)
class PeerStatus:
    """A peer that this node is connected to or hears from. ``round_trip_ms`` None: not measured."""

    peer: str
    addresses: tuple[str, ...]
    state: str
    model: str | None
    first: int | None
    last: int | None
    """Units served, inclusive indexes; None where it serves nothing."""
    round_trip_ms: float | None


@dataclass(frozen=True)
class ModelStatus:
    """A model as this node sees it. Unit 0 is the embedding; the last is the head."""

    name: str
    id: str
    units: tuple[str, ...]
    stored: tuple[int, ...]
    """Units whose weights lie on this node's disk."""
    served: tuple[int, ...]
    """Units that this node has loaded and serves."""
    coverage: tuple[int, ...]
    """For each unit, how many active peers serve it, this node included."""
    complete: bool
    """Whether all layers have been published."""


@dataclass(frozen=True)
class UnitHolders:
    """Which active peers, this node included, serve and store a unit of a model."""

    name: str
    served_by: tuple[str, ...]
    stored_by: tuple[str, ...]


@dataclass(frozen=True)
class ModelLayers:
    """Who holds what of a model."""

    model: str
    id: str
    complete: bool
    """Whether all layers have been published."""
    units: tuple[UnitHolders, ...]


@dataclass(frozen=True)
class Status:
    """The state of a node. Sizes are bytes."""

    version: str
    peer_id: str
    address: str
    network: str
    network_name: str
    addresses: tuple[str, ...]
    state: str
    """joining, loading, serving or draining."""
    uptime_s: float
    sessions: int
    peers: tuple[PeerStatus, ...]
    models: tuple[ModelStatus, ...]
    heads: tuple[str, ...]
    """Ids of the newest blocks, sorted."""
    blocks: int
    cut: int
    """The number of the last final cut."""
    missing_validators: tuple[str, ...]
    """Addresses of the validators without whom no cut can become final now; empty while a quorum is connected."""
    memory_used: int
    """Weights and caches that are loaded, which is what ``memory_limit`` bounds."""
    memory_limit: int | None
    resident: int
    """Memory of the whole process, its libraries included; 0 where the system does not tell."""
    disk_used: int
    disk_limit: int | None


class Service(Protocol):
    """The node, as the API sees it."""

    @property
    def chain(self) -> ChainService:
        """Its chain."""
        ...

    def generate(self, request: Generate) -> AbstractAsyncContextManager[AsyncIterator[Event]]:
        """Open a generation; leaving the context cancels it, on every stage.

        Entering, or iterating, raises RequestError, ModelUnavailable, Overloaded or GenerationFailed.
        """
        ...

    def models(self) -> tuple[ModelInfo, ...]:
        """Models known here, those first that can run."""
        ...

    def status(self) -> Status:
        """The state of this node now."""
        ...

    def layers(self) -> tuple[ModelLayers, ...]:
        """Who holds what of each model, as far as this node hears."""
        ...

    def ready(self) -> str | None:
        """None if prompts can be answered now, else why not."""
        ...

    def import_model(self, path: str, name: str | None) -> AbstractAsyncContextManager[AsyncIterator[Progress]]:
        """Read a checkpoint on this machine and publish it; leaving the context abandons what is not yet published.

        Raises CheckpointError, DiskFull, RequestError.
        """
        ...

    async def verify(self) -> tuple[str, ...]:
        """Check the weights on the disk against the chain and those in memory against what was loaded.

        Returns the names of the units served. Raises IntegrityError, naming what is wrong and is not served any more.
        """
        ...
