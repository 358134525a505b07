"""What the loss of a stage costs: the pause from the kill to the next token, beside the same log prefilled afresh.

``python -m benchmarks.failover``: real daemons on loopback with the real small model. In the middle of a text the
daemon that runs the first, a middle or the last stage is killed with SIGKILL, stopped with SIGSTOP or asked to leave.
Beside the pause: the time to the first token of a new chat with a prompt about as long as the log was then, in the same
net, and the median time of a token.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")

from benchmarks._common import load_average, median, table
from benchmarks.daemons import FLOAT32, MODEL, QUESTION, publish
from blyan_node.testnet.local import Node, Testnet, wait_until
from tests.support.daemons import spread

NODES = 7
MEMORY = "300MiB"
STORY = f"{QUESTION} " + "The sea was calm and the lamp was lit. " * 30
AT, TOKENS = 12, 40


def signalled(number: signal.Signals) -> Callable[[Node], None]:
    def act(node: Node) -> None:
        pid = node.directory.holder()
        assert pid is not None
        os.kill(pid, number)

    return act


def served(node: Node) -> list[int]:
    return list(node.client.status()["models"][0]["served"])


def first_token(node: Node, salt: int) -> float:
    """Seconds to the first token of a prompt as long as the others."""
    ask = [{"role": "user", "content": f"{salt} {STORY}"}]
    began = time.perf_counter()
    with node.client.stream(ask, model=MODEL, max_tokens=2, temperature=0) as chunks:
        for chunk in chunks:
            if chunk["choices"] and chunk["choices"][0]["delta"].get("content"):
                break
    return time.perf_counter() - began


def interrupted(net: Testnet, where: str, act: Callable[[Node], None]) -> tuple[list[float], Node, int, Node]:
    """Act on a stage in the middle of a text; returns when each piece came, who it was, how many stages, the entry."""
    units = len(net.node(0).client.status()["models"][0]["units"])
    unit = {"first": 0, "middle": units // 2, "last": units - 1}[where]
    entry = next(node for node in net.nodes if unit not in served(node))
    names = entry.client.status()["models"][0]["units"]
    node_of = {node.client.status()["peer_id"]: node for node in net.nodes}
    stamps: list[float] = []
    ask = [{"role": "user", "content": STORY}]
    with entry.client.stream(ask, model=MODEL, max_tokens=TOKENS, temperature=0) as chunks:
        first = next(chunks)
        route = first["blyan"]["route"]
        hop = next(hop for hop in route if names.index(hop["first"]) <= unit <= names.index(hop["last"]))
        for chunk in chunks:
            if chunk["choices"] and chunk["choices"][0]["delta"].get("content"):
                stamps.append(time.perf_counter())
                if len(stamps) == AT:
                    act(node_of[hop["peer"]])
    return stamps, node_of[hop["peer"]], len(route), entry


def measure(net: Testnet, what: str, where: str, act: Callable[[Node], None]) -> list[str]:
    spread(net, timeout=300)
    stamps, victim, stages, entry = interrupted(net, where, act)
    steps = [later - sooner for sooner, later in pairwise(stamps)]
    pause = max(steps[AT - 1 :])
    fresh = median([first_token(entry, salt) for salt in range(3)])
    if what == "SIGSTOP":
        signalled(signal.SIGCONT)(victim)
    else:
        wait_until(lambda: victim.directory.holder() is None, timeout=60, what="its end")
        net.restart(victim.index)
    wait_until(lambda: victim.client.status()["state"] == "serving", timeout=120, what="serving again")
    return [
        f"{what}, {where} of {stages} stages",
        f"{pause:.2f} s",
        f"{fresh:.2f} s",
        f"{pause / fresh:.2f}×",
        f"{1000 * median(steps):.0f} ms",
    ]


def main() -> None:
    rows: list[list[str]] = []
    with (
        tempfile.TemporaryDirectory() as scratch,
        Testnet(Path(scratch) / "net", nodes=NODES, memory_limit=MEMORY, settings=FLOAT32) as net,
    ):
        publish(net)
        rows += [measure(net, "SIGKILL", where, signalled(signal.SIGKILL)) for where in ("first", "middle", "last")]
        rows.append(measure(net, "SIGSTOP", "middle", signalled(signal.SIGSTOP)))
        rows.append(measure(net, "SIGTERM", "middle", signalled(signal.SIGTERM)))
    print(load_average())
    print(table(["a stage is lost", "pause", "fresh prefill", "ratio", "a token"], rows))


if __name__ == "__main__":
    main()
