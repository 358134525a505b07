"""How a node begins and ends: on an empty machine, given one address, told to stop."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

from blyan_node.api.client import CannotReach, NodeRefused
from blyan_node.datadir import DataDir
from blyan_node.testnet.local import Testnet, wait_until
from tests.support.daemons import (
    EXACT,
    LOOPBACK,
    PART,
    STOPS_WITHIN,
    WITHIN,
    Daemon,
    command,
    daemon,
    greedy,
    publish,
    serves,
    spawned,
    text_of,
)
from tests.support.models import tiny_checkpoint

pytestmark = pytest.mark.e2e

ENDLESS = 60_000
"""Tokens that the tiny model cannot make in the seconds that a node takes to stop."""
NOBODY = "/ip4/127.0.0.1/tcp/1/p2p/16Uiu2HAm2F68kKeXmgRFLWouJvSrg71WcUoJDMpNt9hcWnxxFAij"


def test_first_start_on_an_empty_machine(tmp_path: Path) -> None:
    """No flags at all, no file: a private network, and how others join it. The second start is the same network."""
    data_dir = tmp_path / "made" / "by" / "the node"
    assert command("status", data_dir=data_dir).returncode == 3
    with daemon(data_dir) as first:
        invite = re.search(r"started a private network; others join with: --bootstrap (\S+)", first.output.read_text())
        status = first.client.status()
        assert invite
        assert invite[1] == status["addresses"][0]
        assert status["network_name"].startswith("private-")
        assert not first.client.health()["ready"]
        shown = command("status", data_dir=data_dir)
        assert shown.returncode == 0
        assert status["network_name"] in shown.stdout
        assert "This network has no model yet" in command("model", "list", data_dir=data_dir).stdout
        asked = command("chat", "Hello", data_dir=data_dir)
        assert (asked.returncode, "publish one with" in asked.stderr) == (4, True)
        assert oct(DataDir(data_dir).key.stat().st_mode)[-3:] == "600"
        assert first.stop() == 0
        assert "stopped" in first.output.read_text()
    assert command("status", data_dir=data_dir).returncode == 3
    with daemon(data_dir) as second:
        again = second.client.status()
        assert (again["network"], again["peer_id"]) == (status["network"], status["peer_id"])
        assert second.stop(signal.SIGINT) == 0  # as Ctrl-C does


def test_an_empty_disk_and_one_address_are_enough_to_serve(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path)
    with Testnet(tmp_path / "net", nodes=2, memory_limit=str(PART), settings=EXACT) as net:
        publish(net.node(0).client, checkpoint)
        wait_until(net.serving, timeout=WITHIN, what="both nodes serving")
        address = net.node(1).client.status()["addresses"][0]  # not the publisher's
        flags = ("--listen", LOOPBACK, "--api-port", "0", "--bootstrap", address, "--memory-limit", str(PART))
        with daemon(tmp_path / "late", "--data-dir", str(tmp_path / "late"), *flags) as late:
            wait_until(lambda: serves(late.client), timeout=WITHIN, what="the newcomer serving")
            status, other = late.client.status(), net.node(0).client.status()
            assert (status["heads"], status["blocks"]) == (other["heads"], other["blocks"])
            assert status["network"] == other["network"]
            assert {peer["peer"] for peer in status["peers"]} == {node.client.status()["peer_id"] for node in net.nodes}
            assert "joined network testnet" in late.output.read_text()
            wait_until(
                lambda: late.client.status()["models"][0]["stored"] == list(range(6)),
                timeout=WITHIN,
                what="the newcomer stores all units",
            )
            expected = greedy(checkpoint, tmp_path / "units", "Hello", 12)
            assert late.client.chat("Hello", max_tokens=12, temperature=0)["text"] == expected.text

            # It has no stake: what it publishes is carried by those who have.
            other_model = tiny_checkpoint(tmp_path, layers=2, seed=9)
            done = command("model", "import", str(other_model), data_dir=late.data_dir)
            assert done.returncode == 0, done.stderr
            owner = late.client.status()["address"]
            wait_until(
                lambda: int(net.node(0).client.balance(owner)["final"]["nonce"]) == 1 + 4,
                timeout=WITHIN,
                what="a manifest and four units of the newcomer's are final",
            )

            gone = late.client.status()["peer_id"]
            assert late.stop() == 0
        wait_until(
            lambda: gone not in {peer["peer"] for peer in net.node(0).client.status()["peers"]},
            timeout=WITHIN,
            what="the others know that it left",
        )
        assert net.node(0).client.chat("Hello", model="tiny", max_tokens=12, temperature=0)["text"] == expected.text


def test_sigterm_ends_a_node_that_still_looks_for_its_network(tmp_path: Path) -> None:
    with spawned(
        tmp_path / "log",
        BLYAN_DATA_DIR=str(tmp_path / "lost"),
        BLYAN_LISTEN=LOOPBACK,
        BLYAN_API_PORT="0",
        BLYAN_BOOTSTRAP=NOBODY,
    ) as lost:
        wait_until(lambda: lost.said("asking 1 bootstrap"), timeout=WITHIN, what="asking for the network")
        assert lost.stop() == 0


def read_and_stop(node: Daemon, prompt: str, max_tokens: int) -> str:
    """Read a greedy answer, send SIGTERM when its third piece has come, and return what was read in all."""
    ask = [{"role": "user", "content": prompt}]
    text = ""
    with node.client.stream(ask, max_tokens=max_tokens, temperature=0) as chunks:
        for number, chunk in enumerate(chunks):
            text += text_of([chunk])
            if number == 3:
                node.process.send_signal(signal.SIGTERM)
    return text


def test_sigterm_lets_a_short_generation_end(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path)
    with daemon(tmp_path / "node") as node:
        publish(node.client, checkpoint)
        wait_until(lambda: serves(node.client), timeout=WITHIN, what="serving")
        assert read_and_stop(node, "on", 40) == greedy(checkpoint, tmp_path / "units", "on", 40).text
        assert node.process.wait(STOPS_WITHIN) == 0


def test_sigterm_cuts_a_long_generation(tmp_path: Path) -> None:
    """Its reader is told, or cut off; nobody hangs."""
    checkpoint = tiny_checkpoint(tmp_path, max_position_embeddings=ENDLESS)
    with daemon(tmp_path / "node", BLYAN_CONTEXT_LIMIT=str(ENDLESS)) as node:
        publish(node.client, checkpoint)
        wait_until(lambda: serves(node.client), timeout=WITHIN, what="serving")
        with pytest.raises((CannotReach, NodeRefused)):
            read_and_stop(node, "on", ENDLESS - 100)
        assert node.process.wait(STOPS_WITHIN) == 0
        assert not node.said("Traceback")
