"""Real daemons: started, found, killed, restarted and stopped."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from blyan_node.errors import ConfigError
from blyan_node.testnet.local import Testnet, attach, wait_until
from tests.support.daemons import command

pytestmark = pytest.mark.e2e


def states_seen_from_outside(root: Path) -> list[dict[str, Any]]:
    net = attach(root)
    try:
        return net.states()
    finally:
        net.close()


def test_a_net_lives_dies_and_comes_back(tmp_path: Path) -> None:
    with Testnet(tmp_path, nodes=2) as net:
        first, second = net.nodes
        wait_until(
            lambda: all(len(node.client.status()["peers"]) == 1 for node in net.nodes), timeout=30, what="meeting"
        )
        assert first.client.status()["network"] == second.client.status()["network"]
        assert first.client.health()["live"]
        assert not first.client.health()["ready"]

        with pytest.raises(ConfigError, match="already running"):
            Testnet(tmp_path, nodes=2).start()
        assert [state["peers"] for state in states_seen_from_outside(tmp_path)] == [1, 1]

        peer = second.client.status()["peer_id"]
        net.kill(1)
        assert states_seen_from_outside(tmp_path)[1]["state"] == "down"
        net.restart(1)
        assert second.client.status()["peer_id"] == peer
        wait_until(lambda: len(second.client.status()["peers"]) == 1, timeout=30, what="meeting again")

        began = time.monotonic()
        assert net.stop() == []
        assert time.monotonic() - began < 10
    assert [state["state"] for state in states_seen_from_outside(tmp_path)] == ["down", "down"]


def neighbours(net: Testnet) -> list[int]:
    return [len(node.client.status()["peers"]) for node in net.nodes]


def test_a_net_is_cut_in_two_and_mended(tmp_path: Path) -> None:
    with Testnet(tmp_path, nodes=3) as net:
        wait_until(lambda: neighbours(net) == [2, 2, 2], timeout=30, what="meeting")
        assert command("testnet", "partition", "0,x", data_dir=tmp_path).returncode == 2
        for sides in ("0,3", "0,0"), ("0", "1,0"):
            done = command("testnet", "partition", *sides, "--dir", str(tmp_path), data_dir=tmp_path)
            assert done.returncode == 2
            assert "cannot be put on a side" in done.stderr
        assert command("testnet", "partition", "0,2", "--dir", str(tmp_path), data_dir=tmp_path).returncode == 0
        wait_until(lambda: neighbours(net) == [1, 0, 1], timeout=30, what="being cut")
        assert command("testnet", "heal", "--dir", str(tmp_path), data_dir=tmp_path).returncode == 0
        wait_until(lambda: neighbours(net) == [2, 2, 2], timeout=10, what="finding each other")


def test_a_daemon_that_hangs_is_killed(tmp_path: Path) -> None:
    with Testnet(tmp_path, nodes=1) as net:
        os.kill(net.node(0).directory.holder(), signal.SIGSTOP)
        assert net.stop() == [0]
