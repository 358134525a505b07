"""kill -9, at the worst moments: nothing that was acknowledged is lost, and a text under way comes to its end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from blyan_node.chain.blobs import BlobStore
from blyan_node.chain.genesis import load_genesis
from blyan_node.chain.replica import Replica
from blyan_node.testnet.local import Node, Testnet, wait_until
from tests.support.daemons import EXACT, PART, WITHIN, greedy, idle, kill, peer_of, publish, serves, text_of
from tests.support.models import tiny_checkpoint

pytestmark = pytest.mark.chaos

UNITS = 6
PROMPT = "Tell me of the sea"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def lone(tmp_path: Path) -> Iterator[Testnet]:
    """A net of one: nobody else can make good what it loses."""
    with Testnet(tmp_path / "net", nodes=1, settings=EXACT) as net:
        yield net


def blocks_on_disk(node: Node, genesis: Path) -> set[bytes]:
    """What the replica of a dead node holds."""
    with Replica.open(node.directory.chain, load_genesis(genesis)) as replica:
        return {block.id for block in replica.blocks(limit=1000)}


def records(node: Node) -> int:
    """The records of its own that a running node has in its chain."""
    address = node.client.status()["address"]
    return int(node.client.balance(address)["tentative"]["nonce"])


def test_what_an_import_acknowledged_survives_kill_9(lone: Testnet, checkpoint: Path, tmp_path: Path) -> None:
    node = lone.node(0)
    publish(node.client, checkpoint)
    kill(lone, 0)
    blocks = blocks_on_disk(node, lone.root / "genesis.toml")
    store = BlobStore(node.directory.blobs)
    assert len(store.refs()) == 1 + UNITS
    for ref in store.refs():
        store.verify(ref)
    lone.restart(0)
    wait_until(lambda: serves(node.client), timeout=WITHIN, what="serving again")
    assert records(node) == 1 + UNITS
    expected = greedy(checkpoint, tmp_path / "units", PROMPT, 12)
    assert node.client.chat(PROMPT, max_tokens=12, temperature=0)["text"] == expected.text
    kill(lone, 0)
    assert blocks_on_disk(node, lone.root / "genesis.toml") == blocks


@pytest.mark.parametrize("moment", ["storing layer.2", "publishing"])
def test_kill_9_in_the_middle_of_an_import(lone: Testnet, checkpoint: Path, tmp_path: Path, moment: str) -> None:
    """Whatever had been done by then: the node starts, and the same import brings the model to its end."""
    node = lone.node(0)
    with node.client.import_model(str(checkpoint), "tiny") as steps:
        next(step for step in steps if step["stage"] == moment)
        kill(lone, 0)
    lone.restart(0)
    assert not list(node.directory.blobs.glob("*.tmp"))
    assert node.client.health()["live"]
    publish(node.client, checkpoint)
    wait_until(lambda: serves(node.client), timeout=WITHIN, what="serving")
    assert records(node) == 1 + UNITS  # none twice
    expected = greedy(checkpoint, tmp_path / "units", PROMPT, 12)
    assert node.client.chat(PROMPT, max_tokens=12, temperature=0)["text"] == expected.text


def test_a_text_goes_on_unchanged_when_a_stage_is_killed(checkpoint: Path, tmp_path: Path) -> None:
    length = 300
    expected = greedy(checkpoint, tmp_path / "units", PROMPT, length)
    with Testnet(tmp_path / "net", nodes=4, memory_limit=str(PART), settings=EXACT) as net:
        publish(net.node(0).client, checkpoint)
        wait_until(net.serving, timeout=WITHIN, what="all nodes serving")
        wait_until(
            lambda: min(net.node(0).client.status()["models"][0]["coverage"]) > 1, timeout=WITHIN, what="spare capacity"
        )
        index_of = {peer_of(node): node.index for node in net.nodes}
        chunks, victim = [], 0
        ask = [{"role": "user", "content": PROMPT}]
        with net.node(0).client.stream(ask, max_tokens=length, temperature=0) as stream:
            for chunk in stream:
                chunks.append(chunk)
                if len(chunks) == 5:
                    route = [index_of[hop["peer"]] for hop in chunks[0]["blyan"]["route"]]
                    victim = next(index for index in route if index != 0)
                    kill(net, victim)
        assert text_of(chunks) == expected.text
        assert chunks[-1]["choices"][0]["finish_reason"] == expected.finish_reason
        survivors = [node for node in net.nodes if node.index != victim]
        route = [index_of[hop["peer"]] for hop in chunks[-1]["blyan"]["route"]]
        assert victim not in route
        wait_until(lambda: idle(survivors), timeout=WITHIN, what="all seats free")

        net.restart(victim)
        wait_until(lambda: serves(net.node(victim).client), timeout=WITHIN, what="the killed one serving again")
        heads = {tuple(node.client.status()["heads"]) for node in net.nodes}
        assert len(heads) == 1
        again = net.node(victim).client.chat(PROMPT, max_tokens=length, temperature=0)
        assert again["text"] == expected.text
