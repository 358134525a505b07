"""What a daemon is given that it cannot use: each a clear error, and the daemon lives on."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from safetensors.torch import load_file, save_file

from blyan_node.api.client import NodeRefused
from blyan_node.chain.blobs import BlobStore
from blyan_node.chain.genesis import Genesis
from blyan_node.chain.invite import Invite
from blyan_node.chain.keys import Key
from blyan_node.chain.records import BlobRef
from blyan_node.errors import IntegrityError
from blyan_node.p2p.identity import peer_id_of
from blyan_node.testnet.local import Testnet, wait_until
from tests.support.daemons import (
    EXACT,
    LOOPBACK,
    PART,
    WITHIN,
    Daemon,
    command,
    daemon,
    greedy,
    publish,
    serves,
    start_that_fails,
)
from tests.support.models import tiny_checkpoint

pytestmark = pytest.mark.e2e

CAP = 9_000_000
"""Bytes of disk that the daemon may fill: the tiny model of four layers takes ten million, one of one layer seven."""


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    data_dir = tmp_path_factory.mktemp("node") / "data"
    with daemon(data_dir, BLYAN_DISK_LIMIT=str(CAP)) as node:
        yield node
        assert node.process.poll() is None
        assert node.client.health()["live"]
        assert node.stop() == 0
        assert not node.said("Traceback")


def corrupt_gguf(folder: Path) -> Path:
    path = folder / "corrupt.gguf"
    path.write_bytes(b"GGUF\x03\0\0\0" + b"\xff" * 16 + os.urandom(4096))
    return path


def not_gguf(folder: Path) -> Path:
    path = folder / "notes.gguf"
    path.write_text("These are not weights.")
    return path


def missing_tensor(folder: Path) -> Path:
    path = tiny_checkpoint(folder, layers=1, seed=1)
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, path / "model.safetensors")
    return path


def wrong_shape(folder: Path) -> Path:
    path = tiny_checkpoint(folder, layers=1, seed=2)
    tensors = load_file(path / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:7].clone()
    save_file(tensors, path / "model.safetensors")
    return path


def unknown_architecture(folder: Path) -> Path:
    path = tiny_checkpoint(folder, layers=1, seed=3)
    config = json.loads((path / "config.json").read_text())
    config |= {"architectures": ["GrapevineForCausalLM"], "model_type": "grapevine"}
    (path / "config.json").write_text(json.dumps(config))
    return path


def truncated_weights(folder: Path) -> Path:
    path = tiny_checkpoint(folder, layers=1, seed=4)
    weights = path / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    return path


def empty_folder(folder: Path) -> Path:
    path = folder / "nothing"
    path.mkdir()
    return path


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (corrupt_gguf, "corrupt.gguf"),
        (not_gguf, "notes.gguf"),
        (missing_tensor, "mlp.up_proj.weight"),
        (wrong_shape, "norm.weight"),
        (unknown_architecture, "[Gg]rapevine"),
        (truncated_weights, "model.safetensors"),
        (empty_folder, "nothing"),
    ],
)
def test_a_checkpoint_that_cannot_be_used(node: Daemon, tmp_path: Path, make, said: str) -> None:
    before = node.client.status()
    done = command("model", "import", str(make(tmp_path)), data_dir=node.data_dir)
    assert done.returncode == 4
    assert 1 <= len(done.stderr.splitlines()) <= 2
    assert re.search(said, done.stderr)
    after = node.client.status()
    assert [after[key] for key in ("blocks", "heads", "disk_used")] == [
        before[key] for key in ("blocks", "heads", "disk_used")
    ]
    assert node.client.health()["live"]


def test_a_path_that_does_not_exist(node: Daemon, tmp_path: Path) -> None:
    done = command("model", "import", str(tmp_path / "absent.gguf"), data_dir=node.data_dir)
    assert (done.returncode, "there is no file or directory" in done.stderr) == (2, True)
    with pytest.raises(NodeRefused, match="absent"):
        publish(node.client, tmp_path / "absent.gguf")


def test_a_model_that_does_not_fit_on_the_disk_leaves_room_for_one_that_does(node: Daemon, tmp_path: Path) -> None:
    before = node.client.status()
    done = command("model", "import", str(tiny_checkpoint(tmp_path)), "--name", "large", data_dir=node.data_dir)
    assert done.returncode == 4
    assert f"the cap of {CAP} bytes" in done.stderr
    after = node.client.status()
    assert (after["blocks"], after["disk_used"]) == (before["blocks"], before["disk_used"])
    assert not list((node.data_dir / "blobs").glob("*.tmp"))
    small = tiny_checkpoint(tmp_path, layers=1)
    done = command("model", "import", str(small), "--name", "small", data_dir=node.data_dir)
    assert done.returncode == 0, done.stderr
    wait_until(lambda: serves(node.client), timeout=WITHIN, what="the small model served")
    expected = greedy(small, tmp_path / "units", "Hello", 8)
    assert node.client.chat("Hello", model="small", max_tokens=8, temperature=0)["text"] == expected.text


def test_a_key_works_from_its_making_until_it_is_revoked(node: Daemon) -> None:
    made = json.loads(command("key", "create", "web", "--json", data_dir=node.data_dir).stdout)

    def status_of(path: str) -> int:
        return httpx.get(node.client.url + path, headers={"X-API-Key": made["key"]}, trust_env=False).status_code

    assert [status_of(path) for path in ("/chat", "/status", "/models")] == [200, 403, 405]
    assert command("key", "revoke", made["id"], data_dir=node.data_dir).returncode == 0
    assert [status_of(path) for path in ("/chat", "/health")] == [401, 401]
    assert not node.said(made["key"])


def test_a_second_process_may_have_neither_port_nor_directory(node: Daemon, tmp_path: Path) -> None:
    api = node.client.url.rpartition(":")[2]
    code, said = start_that_fails(tmp_path / "other", "--api-port", api)
    assert (code, f"port {api} on 127.0.0.1 is in use" in said) == (1, True)

    listen = node.client.status()["addresses"][0].partition("/p2p/")[0]
    code, said = start_that_fails(tmp_path / "other", "--listen", listen)
    assert (code, "in use" in said and listen.rpartition("/")[2] in said) == (1, True)

    code, said = start_that_fails(node.data_dir)
    assert (code, f"{node.data_dir} is in use by process {node.process.pid}" in said) == (1, True)
    assert node.client.status()["state"]


def test_settings_that_cannot_be_used(tmp_path: Path) -> None:
    for bootstrap in ("10.0.0.1:4001", "/ip4/10.0.0.1/tcp/4001", "/ip4/127.0.0.1/tcp/4001/p2p/nonsense"):
        code, said = start_that_fails(tmp_path / "node", "--bootstrap", bootstrap)
        assert code in (1, 2)
        assert bootstrap in said


def test_a_key_that_others_may_read(tmp_path: Path) -> None:
    data_dir = tmp_path / "node"
    with daemon(data_dir) as first:
        assert first.stop() == 0
    key = data_dir / "node.key"
    key.chmod(0o644)
    code, said = start_that_fails(data_dir)
    assert (code, f"chmod 600 {key}" in said) == (1, True)
    key.chmod(0o600)
    key.write_text("not a key")
    code, said = start_that_fails(data_dir)
    assert (code, str(key) in said) == (1, True)


def test_the_genesis_of_another_network(tmp_path: Path) -> None:
    data_dir = tmp_path / "node"
    with daemon(data_dir) as first:
        network = first.client.status()["network"]
        assert first.stop() == 0
    other = Genesis.make("other", {Key(bytes([1] * 32)).address: 1}, created_ms=1)
    other.save(tmp_path / "other.toml")
    code, said = start_that_fails(data_dir, "--genesis", str(tmp_path / "other.toml"))
    assert code == 1
    assert "network" in said
    invite = str(Invite.make(other.network, other.name, (f"{LOOPBACK}/p2p/{peer_id_of(Key.generate().public)}",)))
    refused = command("network", "join", invite, data_dir=data_dir)
    assert (refused.returncode, "belongs to network private-" in refused.stderr) == (2, True)
    assert "another --data-dir" in refused.stderr
    (tmp_path / "broken.toml").write_text("format = ")
    code, said = start_that_fails(data_dir, "--genesis", str(tmp_path / "broken.toml"))
    assert (code, "broken.toml" in said) == (2, True)
    with daemon(data_dir) as again:
        assert again.client.status()["network"] == network


def test_weights_that_changed_on_the_disk_are_fetched_again(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path)
    with Testnet(tmp_path / "net", nodes=2, memory_limit=str(4 * PART), settings=EXACT) as net:
        publish(net.node(0).client, checkpoint)
        wait_until(net.serving, timeout=WITHIN, what="both nodes serving")
        wait_until(
            lambda: net.node(1).client.status()["models"][0]["stored"] == list(range(6)),
            timeout=WITHIN,
            what="both store it all",
        )
        blobs = net.node(1).directory.blobs
        net.kill(1)
        store = BlobStore(blobs)
        units, tokenizer = weights_and_tokenizer(store)
        shorten(store, units[-1])
        flip(store, units[-2])
        flip(store, tokenizer)
        net.restart(1)
        client = net.node(1).client
        wait_until(lambda: serves(client), timeout=WITHIN, what="serving again")
        wait_until(lambda: client.status()["models"][0]["stored"] == list(range(6)), timeout=WITHIN, what="whole again")
        for ref in (*units, tokenizer):
            BlobStore(blobs).verify(ref)
        net.stop()  # the other one cannot help now: this node's weights alone answer
    expected = greedy(checkpoint, tmp_path / "units", "Hello", 8)
    with daemon(net.node(1).data_dir, "--genesis", str(net.root / "genesis.toml")) as alone:
        wait_until(lambda: serves(alone.client), timeout=WITHIN, what="serving alone")
        assert alone.client.chat("Hello", max_tokens=8, temperature=0)["text"] == expected.text


def shorten(store: BlobStore, ref: BlobRef) -> None:
    os.truncate(store.path(ref), ref.size // 2)


def flip(store: BlobStore, ref: BlobRef) -> None:
    """Change one byte, as a failing disk would."""
    with store.path(ref).open("r+b") as file:
        file.seek(ref.size // 2)
        byte = file.read(1)
        file.seek(ref.size // 2)
        file.write(bytes([byte[0] ^ 0xFF]))
    with pytest.raises(IntegrityError):
        store.verify(ref)


def weights_and_tokenizer(store: BlobStore) -> tuple[list[BlobRef], BlobRef]:
    """The blobs of the units, the smallest first, and that of the tokenizer, which is JSON."""
    refs = sorted(store.refs(), key=lambda ref: ref.size)
    tokenizer = next(ref for ref in refs if store.path(ref).read_bytes()[:1] == b"{")
    refs.remove(tokenizer)
    return refs, tokenizer


def test_a_lone_node_never_serves_weights_that_changed(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path)
    data_dir = tmp_path / "node"
    with daemon(data_dir) as node:
        publish(node.client, checkpoint)
        wait_until(lambda: serves(node.client), timeout=WITHIN, what="serving")
        assert node.stop() == 0
    kept = tmp_path / "kept"
    shutil.copytree(data_dir / "blobs", kept)
    store = BlobStore(data_dir / "blobs")
    flip(store, weights_and_tokenizer(store)[0][-1])
    with daemon(data_dir) as node:
        wait_until(lambda: node.said("differs from its hash"), timeout=WITHIN, what="noticing")
        with pytest.raises(NodeRefused) as refused:
            node.client.chat("Hello", max_tokens=8, temperature=0)
        assert refused.value.status == 503
        status = node.client.status()
        assert status["models"][0]["served"] == []
        assert len(status["models"][0]["stored"]) == 5
        assert status["state"] != "serving"
        assert not node.client.health()["ready"]
        assert node.stop() == 0
    shutil.rmtree(data_dir / "blobs")
    shutil.copytree(kept, data_dir / "blobs")
    with daemon(data_dir) as node:
        wait_until(lambda: serves(node.client), timeout=WITHIN, what="serving from the backup")
        assert node.stop() == 0
