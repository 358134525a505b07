"""``hf:REPO``, against a stand-in for the hub on loopback: the same requests, a small checkpoint."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from blyan_node.errors import CheckpointError, LocalError
from blyan_node.model.hub import fetch_hub
from blyan_node.model.importing import open_checkpoint
from tests.support.models import tiny_checkpoint

COMMIT = "c" * 40


class Hub:
    """A stand-in: one repository, ``someone/tiny``, and what was asked of it."""

    def __init__(self, files: Path) -> None:
        self.asked: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, *, body: bool) -> None:
                path = self.path.partition("?")[0]
                hub.asked.append(path)
                if path.startswith("/api/models/someone/tiny/tree/"):
                    entries = [
                        {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "0" * 40}
                        for file in sorted(files.iterdir())
                    ]
                    return self.give(json.dumps(entries).encode(), body=body)
                if path.startswith("/api/models/someone/tiny"):
                    siblings = [{"rfilename": file.name} for file in sorted(files.iterdir())]
                    answer = {"id": "someone/tiny", "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
                    return self.give(json.dumps(answer).encode(), body=body)
                if path.startswith(f"/someone/tiny/resolve/{COMMIT}/"):
                    return self.give((files / Path(path).name).read_bytes(), body=body)
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return None

            def give(self, content: bytes, *, body: bool) -> None:
                self.send_response(200)
                self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if body:
                    self.wfile.write(content)

            def log_message(self, *_args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    checkpoint = tiny_checkpoint(tmp_path)
    (checkpoint / "pytorch_model.bin").write_bytes(b"a pickle that nobody should fetch")
    stand_in = Hub(checkpoint)
    thread = threading.Thread(target=stand_in.server.serve_forever)
    thread.start()
    yield stand_in
    stand_in.server.shutdown()
    thread.join()
    stand_in.server.server_close()


def test_a_repository_is_fetched_and_imports(hub: Hub, tmp_path: Path) -> None:
    found = fetch_hub("someone/tiny", endpoint=hub.url, cache_dir=tmp_path / "cache")
    checkpoint = open_checkpoint(found)
    assert checkpoint.spec.layers == 4
    assert checkpoint.unit("layer.3")
    assert not any("pytorch_model.bin" in path for path in hub.asked)


def test_what_is_here_is_not_fetched_again(hub: Hub, tmp_path: Path) -> None:
    fetch_hub("someone/tiny", endpoint=hub.url, cache_dir=tmp_path / "cache")
    before = len([path for path in hub.asked if path.endswith(".safetensors")])
    fetch_hub("someone/tiny", endpoint=hub.url, cache_dir=tmp_path / "cache")
    assert len([path for path in hub.asked if path.endswith(".safetensors")]) == before


def test_a_missing_repository_and_a_dead_hub_are_told_apart(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no public repository someone/else"):
        fetch_hub("someone/else", endpoint=hub.url, cache_dir=tmp_path / "cache")
    with pytest.raises(LocalError, match="check the network"):
        fetch_hub("someone/tiny", endpoint="http://127.0.0.1:9", cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("name", ["", "tiny", "../../etc/passwd", "a/b/c", "a b/c", "x" * 200 + "/y"])
def test_a_name_that_is_none_is_refused_before_anything_is_asked(name: str) -> None:
    with pytest.raises(CheckpointError, match="hf:ORGANISATION/NAME"):
        fetch_hub(name, endpoint="http://127.0.0.1:9")
