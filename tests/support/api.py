"""The real HTTP server on loopback, over a scripted service."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx
import trio

from blyan_node.api.app import create_app
from blyan_node.api.auth import Access
from blyan_node.api.serve import api_url, open_api_listener, serve_api
from tests.support.service import ScriptedService

TOKEN = "test-token"


@dataclass
class Served:
    service: ScriptedService
    client: httpx.AsyncClient
    url: str
    stop: trio.Event


@asynccontextmanager
async def served(
    service: ScriptedService | None = None, *, requests_per_minute: int = 100, price_nano: int = 0
) -> AsyncIterator[Served]:
    service = service or ScriptedService()
    app = create_app(
        service,
        Access(TOKEN, frozenset({"node.example"})),
        requests_per_minute=requests_per_minute,
        price_nano=price_nano,
    )
    listener = await open_api_listener("127.0.0.1", 0)
    url = api_url(listener)
    stop = trio.Event()
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:

            async def serve(task_status: trio.TaskStatus[None]) -> None:
                await serve_api(app, listener, stop=stop, grace=0.2, task_status=task_status)

            await nursery.start(serve)
            headers = {"Authorization": f"Bearer {TOKEN}"}
            async with httpx.AsyncClient(base_url=url, headers=headers, timeout=20) as client:
                yield Served(service, client, url, stop)
            stop.set()
