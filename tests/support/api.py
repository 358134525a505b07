"""The real HTTP server on loopback, over a scripted service."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import trio

from blyan_node.api import keys
from blyan_node.api.app import create_app
from blyan_node.api.auth import Access
from blyan_node.api.keys import KeyFile
from blyan_node.api.limits import Terms
from blyan_node.api.serve import api_url, open_api_listener, serve_api
from blyan_node.api.signin import SignIn
from blyan_node.api.usage import Usage
from tests.support.service import ScriptedService

TOKEN = "test-token"
SITE = "https://node.example"


@dataclass
class Served:
    service: ScriptedService
    client: httpx.AsyncClient
    url: str
    stop: trio.Event
    access: Access
    folder: Path

    def key(self, *scopes: str, **bounds: Any) -> str:
        """A new API key, made as the operator does while the node runs."""
        _, secret = keys.create(
            self.folder / "api-keys.json", secrets.token_hex(4), scopes=scopes, now=int(time.time()), **bounds
        )
        return secret


@asynccontextmanager
async def served(service: ScriptedService | None = None, **terms: int) -> AsyncIterator[Served]:
    with TemporaryDirectory() as folder:
        async with served_in(Path(folder), service or ScriptedService(), Terms(**terms)) as api:
            yield api


@asynccontextmanager
async def served_in(folder: Path, service: ScriptedService, terms: Terms) -> AsyncIterator[Served]:
    access = Access(TOKEN, KeyFile(folder / "api-keys.json"), SignIn(SITE, 1), frozenset({"node.example"}))
    app = create_app(service, access, terms, Usage(folder / "api-usage.json"))
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
                yield Served(service, client, url, stop, access, folder)
            stop.set()
