"""A small client of a node's HTTP API, for the CLI, the test net and tests. Synchronous; one thread at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import httpx

from blyan_node.datadir import DataDir
from blyan_node.errors import LocalError


class CannotReach(LocalError):
    """There is no node to talk to, or it went away."""


class NodeRefused(LocalError):
    """The node answered with an error; ``status`` is the HTTP status, ``code`` its short name, ``partial`` the text."""

    def __init__(self, message: str, *, status: int, code: str, partial: str = "") -> None:
        super().__init__(message)
        self.status, self.code, self.partial = status, code, partial


class Client:
    """Speaks to one node. ``timeout`` (seconds) bounds connecting and each wait for the next bytes."""

    def __init__(self, url: str, token: str, *, timeout: float = 300) -> None:
        self.url = url
        headers = {"Authorization": f"Bearer {token}"}
        limits = httpx.Timeout(timeout, connect=5)
        # Our own node is reached directly, whatever proxy the environment names.
        self._http = httpx.Client(base_url=url, headers=headers, timeout=limits, trust_env=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def health(self) -> dict[str, Any]:
        """Return ``GET /health``; limited to 100 a minute, so not for polling."""
        return self._ask("GET", "/health")

    def status(self) -> dict[str, Any]:
        """Return ``GET /status``."""
        return self._ask("GET", "/status")

    def models(self) -> list[dict[str, Any]]:
        """Return the models that the node knows."""
        return list(self._ask("GET", "/v1/models")["data"])

    def chat(self, prompt: str, **parameters: Any) -> dict[str, Any]:
        """Ask one question and wait for the whole answer (``POST /chat``)."""
        return self._ask("POST", "/chat", {"prompt": prompt} | parameters)

    @contextmanager
    def stream(self, messages: Sequence[dict[str, str]], **parameters: Any) -> Iterator[Iterator[dict[str, Any]]]:
        """Stream a chat: an iterator over OpenAI's chunks. Leaving the context cancels the generation."""
        body = {"messages": list(messages), "stream": True} | parameters
        with self._open("/v1/chat/completions", body) as lines:
            yield _chunks(lines)

    @contextmanager
    def import_model(self, path: str, name: str | None) -> Iterator[Iterator[dict[str, Any]]]:
        """Let the node publish a checkpoint: an iterator over its progress. Leaving the context abandons it."""
        with self._open("/models", {"path": path, "name": name}) as lines:
            yield _checked(json.loads(line) for line in lines if line)

    def verify_models(self) -> list[str]:
        """Have the node hash its weights; return the units that it serves. What is wrong comes as an error."""
        return list(self._ask("POST", "/models/verify", {})["verified"])

    def blocks(self, chain: str, limit: int | None = None, after: str | None = None) -> dict[str, Any]:
        """Return a page of the blocks of a chain, newest first: ``data``, and ``next``, None on the last page."""
        return self._ask("GET", f"/chain/{_quoted(chain)}/blocks", limit=limit, after=after)

    def block(self, id: str) -> dict[str, Any]:
        """Return a block by id (64 hex digits), with its records."""
        return self._ask("GET", f"/blocks/{_quoted(id)}")

    def cuts(self, limit: int | None = None, after: str | None = None) -> dict[str, Any]:
        """Return a page of the final cuts, newest first."""
        return self._ask("GET", "/cuts", limit=limit, after=after)

    def balance(self, address: str) -> dict[str, Any]:
        """Return what an address owns, finally and tentatively, in nano-BLY as decimal strings."""
        return self._ask("GET", f"/balance/{_quoted(address)}")

    def transactions(self, address: str, limit: int | None = None, after: str | None = None) -> dict[str, Any]:
        """Return a page of an address's movements, newest first."""
        return self._ask("GET", "/transactions", address=address, limit=limit, after=after)

    def transaction(self, id: str) -> dict[str, Any]:
        """Return where a record stands, by id (64 hex digits)."""
        return self._ask("GET", f"/transactions/{_quoted(id)}")

    def submit(self, record_hex: str) -> dict[str, Any]:
        """Hand in a signed record, packed, in hex; NodeRefused tells why it would have no effect."""
        return self._ask("POST", "/transactions", {"record": record_hex})

    def validators(self) -> dict[str, Any]:
        """Return the validators and their stakes."""
        return self._ask("GET", "/validators")

    def network(self) -> dict[str, Any]:
        """Return the network's name, parameters, genesis and final state."""
        return self._ask("GET", "/network")

    def _ask(
        self, method: str, path: str, body: dict[str, Any] | None = None, **query: str | int | None
    ) -> dict[str, Any]:
        given = {name: value for name, value in query.items() if value is not None}
        with _reaching(self.url):
            response = self._http.request(method, path, json=body, params=given)
        if response.is_error:
            raise _refusal(response)
        answer: dict[str, Any] = response.json()
        return answer

    @contextmanager
    def _open(self, path: str, body: dict[str, Any]) -> Iterator[Iterator[str]]:
        with _reaching(self.url), self._http.stream("POST", path, json=body) as response:
            if response.is_error:
                response.read()
                raise _refusal(response)
            yield response.iter_lines()


def connect(data_dir: Path) -> Client:
    """Return a client of the node that runs in a data directory; CannotReach if none does."""
    directory = DataDir(data_dir)
    running = directory.running()
    if running is None:
        raise CannotReach(f"no node is running in {data_dir}; start it with: blyan-node start --data-dir {data_dir}")
    return Client(running.api, directory.read_token())


def _quoted(part: str) -> str:
    """A part of a path, whatever a user may have typed."""
    return quote(part, safe="") or "-"


@contextmanager
def _reaching(url: str) -> Iterator[None]:
    try:
        yield
    except httpx.TransportError as error:
        raise CannotReach(f"the node at {url} does not answer ({type(error).__name__}); see its log") from error


def _chunks(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    data = (line.removeprefix("data: ") for line in lines if line.startswith("data: "))
    return _checked(json.loads(item) for item in data if item != "[DONE]")


def _checked(values: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for value in values:
        if "error" in value:
            raise _told(value["error"], 500)
        yield value


def _refusal(response: httpx.Response) -> NodeRefused:
    try:
        return _told(response.json()["error"], response.status_code)
    except (ValueError, KeyError, TypeError):
        return NodeRefused(
            f"HTTP {response.status_code}: {response.text[:200]}", status=response.status_code, code="unknown"
        )


def _told(error: dict[str, Any], status: int) -> NodeRefused:
    return NodeRefused(error["message"], status=status, code=error["code"], partial=error.get("partial", ""))
