"""How soon a net that was cut in two is one again.

    python -m benchmarks.heal [--splits 6] [--payments 10]

Six daemons on this machine, 3 against 3, again and again; both sides pay meanwhile. Printed, in seconds from the end of
a partition: until all six have one final state root and all payments are in it, beside the target; and what of that
nobody could save, in the same run: until all have dialled one another and told what they have (one STATUS each way),
and, apart from that, what one payment takes to become final while the net is whole.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from pathlib import Path

from benchmarks._common import load_average, median, table
from benchmarks.finality import Payer
from blyan_node.api.client import Client
from blyan_node.chain.keys import load_or_create_key
from blyan_node.testnet.local import Node, Testnet, wait_until

NODES = 6
SPLITS = (((0, 1, 2), (3, 4, 5)), ((0, 2, 4), (1, 3, 5)), ((1, 2, 3), (0, 4, 5)))
TARGET = 10.0
PATIENCE = 120.0
POLL = 0.01


def connected(nodes: Sequence[Node]) -> bool:
    """Whether each has a connection to all validators, and has heard from each what it has."""
    return not any(node.client.validators()["missing"] for node in nodes)


def agreed(nodes: Sequence[Node]) -> bool:
    """Whether all have one final cut and one state root."""
    return len({tuple(node.client.network()["final"].values()) for node in nodes}) == 1


def until(condition: Callable[[], bool], began: float, what: str) -> float:
    """Wait for a condition; return the seconds since ``began``."""
    while not condition():
        if time.perf_counter() - began > PATIENCE:
            raise SystemExit(f"{what}: not within {PATIENCE:.0f} s")
        time.sleep(POLL)
    return time.perf_counter() - began


def payer_of(node: Node) -> Payer:
    return Payer(node.client, load_or_create_key(node.directory.key))


def heal(net: Testnet, sides: tuple[tuple[int, ...], ...], payments: int) -> tuple[float, float]:
    """Split, pay on both sides, heal; return the seconds until all have talked, and until all have one state."""
    net.partition(*sides)
    away = [len(side) for side in reversed(sides) for _ in side]
    parts = [net.node(index) for side in sides for index in side]
    wait_until(
        lambda: [len(node.client.validators()["missing"]) for node in parts] == away, timeout=PATIENCE, what="the split"
    )
    paid = []
    for side in sides:
        payer = payer_of(net.node(side[0]))
        paid += [payer.pay() for _ in range(payments)]
        for id in paid[-payments:]:
            payer.wait(id, "tentative")
    net.heal()
    began = time.perf_counter()
    talked = until(lambda: connected(net.nodes), began, "connected again")
    first = net.node(0).client
    one = until(lambda: agreed(net.nodes) and _all_final(first, paid), began, "one state root")
    return talked, one


def _all_final(client: Client, ids: Sequence[str]) -> bool:
    return all(client.transaction(id)["word"] == "final" for id in reversed(ids))


def whole(net: Testnet) -> float:
    """Return the seconds that one payment takes to become final on all nodes of the whole net."""
    payer = payer_of(net.node(0))
    began = time.perf_counter()
    id = payer.pay()
    return until(lambda: agreed(net.nodes) and _all_final(net.node(0).client, [id]), began, "a final payment")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--splits", type=int, default=6)
    parser.add_argument("--payments", type=int, default=10)
    options = parser.parse_args()
    talked, one, alone = [], [], []
    with tempfile.TemporaryDirectory() as folder, Testnet(Path(folder), nodes=NODES, memory_limit="256MiB") as net:
        wait_until(lambda: connected(net.nodes), timeout=PATIENCE, what="all connected")
        for sides in islice(cycle(SPLITS), options.splits):
            alone.append(whole(net))
            seconds = heal(net, sides, options.payments)
            talked.append(seconds[0])
            one.append(seconds[1])
    rows = [
        ["heal to one state root", f"{median(one):.2f}", f"{max(one):.2f}", f"{TARGET:.0f}"],
        ["dialled again, one STATUS each way", f"{median(talked):.2f}", f"{max(talked):.2f}", ""],
        ["one payment final, net whole", f"{median(alone):.2f}", f"{max(alone):.2f}", ""],
        ["one state / (dialled + one payment)", f"{median(one) / (median(talked) + median(alone)):.2f}×", "", ""],
    ]
    print(load_average())
    print(table([f"{options.splits} splits, 3 against 3", "median s", "worst s", "target s"], rows))


if __name__ == "__main__":
    main()
