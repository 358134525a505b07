"""Real daemons and the real command line, for tests. Deadlines are generous: machines that run tests are busy."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blyan_node.api.client import Client, connect
from blyan_node.chain.genesis import load_genesis
from blyan_node.chain.verify import Fault, verify
from blyan_node.datadir import DataDir
from blyan_node.inference.generation import Message, Sampling
from blyan_node.model.importing import open_checkpoint
from blyan_node.model.shard import Shard, Token, Work
from blyan_node.model.tokenizer import Tokenizer
from blyan_node.testnet.local import Node, Testnet, wait_until
from tests.support.models import import_units

PART = 7_500_000
"""A memory limit in bytes, of which 3/4 are for weights: a node holds a part of the tiny model (10 MB), not all."""
LOOPBACK = "/ip4/127.0.0.1/tcp/0"
WITHIN = 90.0
STOPS_WITHIN = 15.0
"""Seconds from SIGTERM to the end. The promise is 10 on a machine of one's own; tests share theirs with others."""


def environment(**more: str) -> dict[str, str]:
    """This process's environment without settings of a node, and with those given."""
    return {name: value for name, value in os.environ.items() if not name.startswith("BLYAN_")} | more


def command(*arguments: str, data_dir: Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run ``blyan-node`` to its end."""
    return subprocess.run(
        [sys.executable, "-m", "blyan_node", *arguments],
        capture_output=True,
        text=True,
        input=stdin,
        timeout=WITHIN,
        check=False,
        env=environment(BLYAN_DATA_DIR=str(data_dir)),
    )


def start_that_fails(data_dir: Path, *arguments: str) -> tuple[int, str]:
    """Start a daemon that cannot run; return its exit code and what it said last, for a person: a line or two."""
    ports = () if "--listen" in arguments else ("--listen", LOOPBACK)
    ports += () if "--api-port" in arguments else ("--api-port", "0")
    done = command("start", *ports, *arguments, data_dir=data_dir)
    assert "Traceback" not in done.stderr
    _, found, said = done.stderr.partition("blyan-node: ")
    assert found, done.stderr
    assert 1 <= len(said.splitlines()) <= 2
    return done.returncode, said


@dataclass
class Process:
    """A ``blyan-node start`` that a test started by hand, up or not."""

    process: subprocess.Popen[str]
    output: Path

    def said(self, text: str) -> bool:
        """Whether its log holds this text."""
        return text in self.output.read_text()

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Signal it and return its exit code. Fails where it takes longer than STOPS_WITHIN."""
        self.process.send_signal(number)
        return self.process.wait(STOPS_WITHIN)


@dataclass
class Daemon(Process):
    """One that is up."""

    data_dir: Path
    client: Client


@contextmanager
def spawned(output: Path, *arguments: str, **settings: str) -> Iterator[Process]:
    """Start ``blyan-node start`` with these arguments and environment; kill it in the end."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("a") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "blyan_node", "start", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(**settings),
            start_new_session=True,
        )
    try:
        yield Process(process, output)
    finally:
        process.kill()
        process.wait()


@contextmanager
def daemon(data_dir: Path, *arguments: str, **settings: str) -> Iterator[Daemon]:
    """Start a daemon in a data directory, on loopback and ports that the system chooses, and wait until it is up."""
    settings = {"BLYAN_DATA_DIR": str(data_dir), "BLYAN_LISTEN": LOOPBACK, "BLYAN_API_PORT": "0"} | settings
    with spawned(data_dir.with_name(data_dir.name + ".log"), *arguments, **settings) as begun:
        process = begun.process
        wait_until(
            lambda: DataDir(data_dir).running() is not None or process.poll() is not None, timeout=WITHIN, what="start"
        )
        assert process.poll() is None, begun.output.read_text()
        with connect(data_dir) as client:
            yield Daemon(process, begun.output, data_dir, client)


def kill(net: Testnet, index: int) -> None:
    """SIGKILL, at once."""
    process = net.node(index).process
    assert process is not None
    process.kill()
    net.kill(index)


def faults(node: Node) -> list[Fault]:
    """What ``chain verify`` finds wrong in the data of a node that is down."""
    genesis = load_genesis(node.directory.genesis)
    return [found for found in verify(node.directory.chain, genesis) if isinstance(found, Fault)]


def publish(client: Client, checkpoint: Path, name: str = "tiny") -> None:
    """Import a checkpoint and wait for the answer."""
    with client.import_model(str(checkpoint), name) as steps:
        assert list(steps)[-1] == {"published": True}


def serves(client: Client) -> bool:
    """Whether a node serves a part of a model, and the model can run."""
    status = client.status()
    return status["state"] == "serving" and any(
        model["complete"] and all(model["coverage"]) for model in status["models"]
    )


def spread(net: Testnet, *, timeout: float = 2 * WITHIN) -> None:
    """Wait until every unit is served twice; a node whose units are served more often chooses again for that."""
    deadline = time.monotonic() + timeout
    while True:
        wait_until(net.serving, timeout=timeout, what="all nodes serving")
        models = [node.client.status()["models"][0] for node in net.nodes]
        if min(min(model["coverage"]) for model in models) > 1:
            return
        assert time.monotonic() < deadline
        coverage = models[0]["coverage"]
        spare = [i for i, model in enumerate(models) if i and all(coverage[unit] > 2 for unit in model["served"])]
        if sum(coverage) == sum(len(model["served"]) for model in models) and spare:
            net.kill(spare[0])
            net.restart(spare[0])
        time.sleep(0.5)


def idle(nodes: list[Node]) -> bool:
    """Whether no session has a seat anywhere."""
    return not any(node.client.status()["sessions"] for node in nodes)


def peer_of(node: Node) -> str:
    """The peer id of a running node."""
    return str(node.client.status()["peer_id"])


@dataclass(frozen=True)
class Reference:
    """What one process alone makes of a prompt, greedily."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str


def greedy(checkpoint: Path, scratch: Path, prompt: str, max_tokens: int) -> Reference:
    """Run a prompt through all units of a checkpoint in this process."""
    opened = open_checkpoint(checkpoint)
    spec, tokenizer = opened.spec, Tokenizer(opened.tokenizer)
    shard = Shard.load(spec, 0, len(spec.units) - 1, import_units(opened, scratch))
    tokens = list(tokenizer.encode(tokenizer.render((Message("user", prompt),)), special=False))
    began = len(tokens)
    cache = shard.open(bytes(16), began + max_tokens)
    stream, text, fresh, reason = tokenizer.stream(), "", tuple(tokens), "length"
    while len(tokens) < began + max_tokens:
        position = len(tokens) - len(fresh)
        (drawn,) = shard.step([Work(cache, position, fresh, None, Sampling(temperature=0))])
        assert isinstance(drawn, Token)
        if drawn.id in tokenizer.eos_ids:
            reason = "stop"
            break
        tokens.append(drawn.id)
        fresh = (drawn.id,)
        text += stream.push(drawn.id)
    cache.close()
    return Reference(text + stream.finish(), began, len(tokens) - began, reason)


def text_of(chunks: list[dict[str, Any]]) -> str:
    """The text of a stream of chunks."""
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
