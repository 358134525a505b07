"""Stages of real daemons are killed, stopped or asked to leave under sessions: the texts are those of one process."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from blyan_node.api.client import connect
from blyan_node.testnet.local import Node, Testnet, wait_until
from tests.support.daemons import EXACT, WITHIN, Reference, greedy, idle, peer_of, publish, serves, spread, text_of
from tests.support.models import tiny_checkpoint

pytestmark = [pytest.mark.chaos, pytest.mark.long, pytest.mark.timeout(600)]

THIRD = "8000000"
"""A memory limit in bytes with which a node holds about a third of a tiny model of six layers."""
FIRST, MIDDLE, LAST = 0, 3, 7  # units of it
PROMPTS = ("Tell me of the sea", "Tell me of the moon and of the wind", "Why?")
LENGTH = 200


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"), layers=6)


@pytest.fixture(scope="module")
def expected(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Reference]:
    return [greedy(checkpoint, tmp_path_factory.mktemp("units"), prompt, LENGTH) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def net(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Testnet]:
    """Seven daemons, of which any may go and the model is still served."""
    with Testnet(tmp_path_factory.mktemp("failover") / "net", nodes=7, memory_limit=THIRD, settings=EXACT) as net:
        publish(net.node(0).client, checkpoint)
        yield net


def served(node: Node) -> list[int]:
    return list(node.client.status()["models"][0]["served"])


def entry_beside(net: Testnet, unit: int) -> Node:
    """A node that does not serve a unit: whoever does is another stage of its sessions."""
    return next(node for node in net.nodes if unit not in served(node))


def interrupted(net: Testnet, unit: int, expected: list[Reference], act: Callable[[Node], object]) -> Node:
    """Run all prompts at one node; in the middle, act on the stage that runs a unit for the first. Returns that one."""
    spread(net)
    entry = entry_beside(net, unit)
    node_of = {peer_of(node): node for node in net.nodes}
    units = entry.client.status()["models"][0]["units"]
    ask = [{"role": "user", "content": PROMPTS[0]}]
    chunks: list[dict[str, Any]] = []
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        others = [pool.submit(_chat, entry.data_dir, prompt) for prompt in PROMPTS[1:]]
        with entry.client.stream(ask, max_tokens=LENGTH, temperature=0) as stream:
            for chunk in stream:
                chunks.append(chunk)
                if len(chunks) == 20:
                    route = chunks[0]["blyan"]["route"]
                    hop = next(hop for hop in route if units.index(hop["first"]) <= unit <= units.index(hop["last"]))
                    victim = node_of[hop["peer"]]
                    act(victim)
        answers = [future.result() for future in others]
    assert len(chunks[0]["blyan"]["route"]) > 2
    assert text_of(chunks) == expected[0].text
    assert [answer["text"] for answer in answers] == [reference.text for reference in expected[1:]]
    gone = next(peer for peer, node in node_of.items() if node is victim)
    assert gone not in {hop["peer"] for hop in chunks[-1]["blyan"]["route"]}
    assert not any(gone in answer["nodes_used"] for answer in answers)
    return victim


def _chat(data_dir: Path, prompt: str) -> dict[str, Any]:
    with connect(data_dir) as client:  # a client serves one thread
        return client.chat(prompt, max_tokens=LENGTH, temperature=0)


def back(net: Testnet, node: Node) -> None:
    net.restart(node.index)
    wait_until(lambda: serves(node.client), timeout=WITHIN, what="serving again")


@pytest.mark.parametrize("unit", [FIRST, MIDDLE, LAST], ids=["first", "middle", "last"])
def test_kill_9_of_a_stage(net: Testnet, expected: list[Reference], unit: int) -> None:
    victim = interrupted(net, unit, expected, lambda node: net.kill(node.index))
    wait_until(lambda: idle([node for node in net.nodes if node is not victim]), timeout=WITHIN, what="all seats free")
    back(net, victim)


def test_a_polite_leave(net: Testnet, expected: list[Reference]) -> None:
    def leave(node: Node) -> None:
        pid = node.directory.holder()
        assert pid is not None
        os.kill(pid, signal.SIGTERM)

    victim = interrupted(net, MIDDLE, expected, leave)
    wait_until(lambda: victim.directory.holder() is None, timeout=WITHIN, what="the end of the leaver")
    victim.forget_client()
    entries = [node.log.read_text() for node in net.nodes if node is not victim]
    assert any("is leaving" in said for said in entries)  # it was left before it went
    back(net, victim)


def test_a_stage_that_stands_still_and_wakes_up_after_it_was_replaced(net: Testnet, expected: list[Reference]) -> None:
    stopped: list[int] = []

    def stop(node: Node) -> None:
        pid = node.directory.holder()
        assert pid is not None
        stopped.append(pid)
        os.kill(pid, signal.SIGSTOP)

    try:
        victim = interrupted(net, MIDDLE, expected, stop)
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
    wait_until(lambda: serves(victim.client), timeout=WITHIN, what="the sleeper serving again")
    wait_until(lambda: idle(net.nodes), timeout=2 * WITHIN, what="all seats free")
    answers: list[Future[dict[str, Any]]] = []
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        answers = [pool.submit(_chat, victim.data_dir, prompt) for prompt in PROMPTS]
    assert [answer.result()["text"] for answer in answers] == [reference.text for reference in expected]
