"""``make demo``: four daemons, the demo model, three questions through three of them, and the chain that they share."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from blyan_node.api.client import Client
from blyan_node.cli.common import human_size, short
from blyan_node.cli.progress import show_progress
from blyan_node.errors import BlyanError, LocalError
from blyan_node.testnet.demo_model import demo_model_path
from blyan_node.testnet.local import Testnet, wait_until

NODES = 4
MEMORY = "300MiB"
"""Of each daemon: too little for the model (538 MB of float32), so that none can answer alone."""
SETTINGS = {"BLYAN_DTYPE": "float32"}
"""Whatever the processor computes fastest in, so that this much memory holds the same layers on every machine."""
SPREAD_TIMEOUT_S = 240.0
MODEL = "SmolLM2-135M-Instruct"
QUESTIONS = (
    "What is the capital of France?",
    "Give me three words that rhyme with 'light'.",
    "Explain in one sentence why the sky is blue.",
)


def main() -> int:
    """Run the demo; 0 if all of it worked."""
    console = Console(highlight=False)
    began = time.monotonic()
    try:
        _demo(console)
    except BlyanError as error:
        console.print(f"[bold red]The demo failed:[/] {escape(str(error))}")
        return 1
    except KeyboardInterrupt:
        console.print("Interrupted.")
        return 130
    console.print(f"\n[bold green]Done[/] in {time.monotonic() - began:.0f} s; all daemons have stopped.")
    return 0


def _demo(console: Console) -> None:
    _title(console, "The model")
    model = demo_model_path(console.print)
    console.print(f"{model} ({human_size(model.stat().st_size)})")
    with tempfile.TemporaryDirectory(prefix="blyan-demo-") as scratch:
        _title(console, f"{NODES} daemons with {MEMORY} each")
        net = Testnet(Path(scratch), nodes=NODES, memory_limit=MEMORY, settings=SETTINGS, progress=console.print)
        try:
            net.start()
            _publish(console, net.node(0).client, model)
            _wait_spread(console, net)
            for number, question in enumerate(QUESTIONS, start=1):
                _ask(console, net.node(number % NODES).client, number % NODES, question)
            _compare_chains(console, net)
        except BlyanError:
            for node in net.nodes:
                console.print(f"\n[bold]The end of node {node.index}'s log:[/]\n{escape(node.last_words())}")
            raise
        finally:
            _title(console, "Stopping")
            killed = net.stop()
        if killed:
            raise LocalError(f"daemons {killed} did not stop within 10 s and were killed")


def _title(console: Console, text: str) -> None:
    console.print(f"\n[bold]{text}[/]")


def _publish(console: Console, client: Client, model: Path) -> None:
    _title(console, "Node 0 publishes the model: each layer becomes a block and a file")
    with client.import_model(str(model), MODEL) as steps:
        show_progress(steps, console)


def _wait_spread(console: Console, net: Testnet) -> None:
    _title(console, "Peers fetch layers, choose which to serve, and load them")
    with _bars(console) as progress:
        tasks = [progress.add_task(f"node {node.index}") for node in net.nodes]

        def spread() -> bool:
            for task, node in zip(tasks, net.nodes, strict=True):
                for held in node.client.status()["models"][:1]:
                    progress.update(task, total=len(held["units"]), completed=len(held["stored"]))
            return net.serving()

        wait_until(spread, timeout=SPREAD_TIMEOUT_S, what="all nodes serving, and all layers served")
    for node in net.nodes:
        status = node.client.status()
        (held,) = status["models"]
        served = [held["units"][unit] for unit in held["served"]]
        what = f"{served[0]} to {served[-1]} ({len(served)} of {len(held['units'])} units)" if served else "nothing yet"
        console.print(f"  node {node.index}  {short(status['peer_id'])}  serves {what}")


def _ask(console: Console, client: Client, number: int, question: str) -> None:
    _title(console, f"Through node {number}: {escape(question)}")
    timing: dict[str, object] = {}
    tokens = 0
    began = time.monotonic()
    messages = [{"role": "user", "content": question}]
    options = {"include_usage": True}
    with client.stream(messages, max_tokens=60, temperature=0, stream_options=options) as chunks:
        for chunk in chunks:
            timing |= chunk.get("blyan", {})
            tokens = chunk.get("usage", {}).get("completion_tokens", tokens)
            for choice in chunk["choices"]:
                console.out(choice["delta"].get("content") or "", end="", style="cyan", highlight=False)
    elapsed = time.monotonic() - began
    console.print()
    route = timing.get("route")
    if not tokens or not isinstance(route, list):
        raise LocalError(f"node {number} gave no answer")
    if len({hop["peer"] for hop in route}) < 2:
        raise LocalError(f"the answer through node {number} came from one machine only")
    table = Table(
        "peer", "ran", "layers", "ms computing", "ms on the way", box=None, header_style="dim", pad_edge=False
    )
    for hop in route:
        table.add_row(
            short(hop["peer"]),
            hop["first"] if hop["first"] == hop["last"] else f"{hop['first']} to {hop['last']}",
            str(hop["layers"]),
            f"{hop['compute_ms']:.1f}",
            f"{hop['network_ms']:.1f}",
        )
    console.print(table)
    console.print(f"[dim]{tokens} tokens in {elapsed:.1f} s, {tokens / elapsed:.1f} a second[/]")


def _compare_chains(console: Console, net: Testnet) -> None:
    _title(console, "The chain, as each node has it")
    statuses: list[dict[str, Any]] = []

    def equal() -> bool:
        statuses[:] = [node.client.status() for node in net.nodes]
        return len({tuple(status["heads"]) for status in statuses}) == 1

    wait_until(equal, timeout=30, what="equal chain heads on all nodes")
    for number, status in enumerate(statuses):
        heads = ", ".join(head[:16] for head in status["heads"])
        console.print(f"  node {number}  {status['blocks']} blocks, heads {heads}")


def _bars(console: Console) -> Progress:
    columns = (TextColumn("  {task.description:<28}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    return Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal)


if __name__ == "__main__":
    sys.exit(main())
