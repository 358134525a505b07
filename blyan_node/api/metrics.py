"""What a node counts and measures, for Prometheus. All names begin with ``blyan_``; nothing in them tells a prompt."""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, make_asgi_app
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from blyan_node.api.service import Service
from blyan_node.inference.generation import Finished

_METHODS = frozenset({"GET", "HEAD", "POST"})


class Metrics:
    """The counts of one API, and the state of its node at the time of asking."""

    def __init__(self, service: Service) -> None:
        registry = CollectorRegistry()
        registry.register(_State(service))
        self.app: ASGIApp = make_asgi_app(registry)
        self._requests = Counter(
            "blyan_http_requests", "Requests that were answered.", ["method", "path", "status"], registry=registry
        )
        self._seconds = Histogram(
            "blyan_http_request_seconds", "Time to the end of an answer.", ["method", "path"], registry=registry
        )
        self._generations = Counter(
            "blyan_generations", "Generations that were begun here, by how they ended.", ["outcome"], registry=registry
        )
        self._prompt_tokens = Counter("blyan_prompt_tokens", "Tokens of prompts that ran.", registry=registry)
        self._generated_tokens = Counter("blyan_generated_tokens", "Tokens generated.", registry=registry)
        self._first_token = Histogram("blyan_first_token_seconds", "Time to the first token.", registry=registry)

    def request(self, method: str, path: str, status: int, seconds: float) -> None:
        """Count an answered request. ``path`` is that of the endpoint, so that there are few."""
        method = method if method in _METHODS else "other"
        self._requests.labels(method, path, str(status)).inc()
        self._seconds.labels(method, path).observe(seconds)

    def tokens(self, *, prompt: int = 0, generated: int = 0) -> None:
        """Count tokens."""
        self._prompt_tokens.inc(prompt)
        self._generated_tokens.inc(generated)

    def finished(self, finished: Finished) -> None:
        """Note how soon the first token came."""
        self._first_token.observe(finished.first_token_ms / 1000)

    def ended(self, outcome: str) -> None:
        """Count a generation: ``finished``, ``failed`` or ``cancelled``."""
        self._generations.labels(outcome).inc()


class Measured:
    """ASGI middleware: counts every request, and the time until the end of its answer."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 0

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            if status:
                path = scope.get("blyan.path", "other")
                self._metrics.request(scope["method"], path, status, time.perf_counter() - began)


class _State(Collector):
    """Gauges that are read from the node when somebody asks."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def describe(self) -> Iterator[Metric]:
        """Promise nothing, so that registering asks nothing."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Read the node's state."""
        state = self._service.status()
        facts: list[tuple[str, str, float | None]] = [
            ("ready", "1 if prompts can be answered now.", self._service.ready() is None),
            ("uptime_seconds", "Time since the node started.", state.uptime_s),
            ("peers", "Peers that are connected or heard from.", len(state.peers)),
            ("sessions", "Sessions that this node computes for.", state.sessions),
            ("blocks", "Blocks of the DAG here.", state.blocks),
            ("heads", "Blocks without children.", len(state.heads)),
            ("final_cut", "Number of the last final cut.", state.cut),
            ("missing_validators", "Validators without whom no cut becomes final.", len(state.missing_validators)),
            ("memory_used_bytes", "Weights and caches that are loaded.", state.memory_used),
            ("memory_limit_bytes", "Most that they may take.", state.memory_limit),
            ("resident_bytes", "Memory of the whole process.", state.resident),
            ("disk_used_bytes", "Weights on the disk.", state.disk_used),
            ("disk_limit_bytes", "Most that they may take.", state.disk_limit),
        ]
        for name, meaning, value in facts:
            if value is not None:
                yield GaugeMetricFamily(f"blyan_{name}", meaning, value=float(value))
        units = GaugeMetricFamily(
            "blyan_model_units", "Units of a model, by how they stand.", labels=["model", "state"]
        )
        for model in state.models:
            covered = sum(count > 0 for count in model.coverage)
            units.add_metric([model.name, "served_by_somebody"], covered)
            units.add_metric([model.name, "served_by_nobody"], len(model.units) - covered)
            units.add_metric([model.name, "served_here"], len(model.served))
            units.add_metric([model.name, "stored_here"], len(model.stored))
        yield units
