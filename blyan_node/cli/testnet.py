"""``testnet up``, ``status``, ``partition``, ``heal`` and ``down``: a local net of real daemons."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from blyan_node.cli.common import JsonOption, say, say_json, say_table, short

app = typer.Typer(help="A local net of real daemons on this machine.", no_args_is_help=True)

DirOption = Annotated[Path | None, typer.Option("--dir", help="Where the net keeps its data [default: by platform].")]


def _root(given: Path | None) -> Path:
    import platformdirs

    return given.absolute() if given else Path(platformdirs.user_data_dir("blyan-testnet", appauthor=False))


@app.command(epilog="Example: blyan-node testnet up -n 4 --model ./model.gguf")
def up(
    nodes: Annotated[int, typer.Option("-n", "--nodes", min=1, max=64, help="How many daemons.")] = 4,
    model: Annotated[Path | None, typer.Option(help="Checkpoint to publish once they run.")] = None,
    memory_limit: Annotated[str | None, typer.Option(help="Memory of each node: 300MiB.")] = None,
    directory: DirOption = None,
) -> None:
    """Start a net, or start again the one that lies in the directory."""
    from rich.console import Console

    from blyan_node.cli.progress import show_progress
    from blyan_node.testnet.local import Testnet

    net = Testnet(_root(directory), nodes=nodes, memory_limit=memory_limit, progress=say)
    net.start()
    if model is not None:
        with net.node(0).client.import_model(str(model.absolute()), None) as steps:
            show_progress(steps, Console())
    net.close()
    say(f"Running. Talk to a node: blyan-node chat --data-dir {net.node(0).data_dir}")


@app.command(epilog="Example: blyan-node testnet status --json")
def status(directory: DirOption = None, as_json: JsonOption = False) -> None:
    """Show the daemons of a net."""
    from blyan_node.testnet.local import attach

    net = attach(_root(directory))
    states = net.states()
    net.close()
    if as_json:
        say_json(states)
        return
    say_table(
        ["node", "pid", "state", "peers", "blocks", "peer id", "data"],
        [
            [
                str(state["node"]),
                str(state["pid"] or "-"),
                state["state"],
                str(state.get("peers", "-")),
                str(state.get("blocks", "-")),
                short(state.get("peer_id", "-")),
                state["data_dir"],
            ]
            for state in states
        ],
    )


@app.command(epilog="Example: blyan-node testnet partition 0,1 2,3")
def partition(
    sides: Annotated[list[str], typer.Argument(help="Numbers of nodes; those named nowhere are one more side.")],
    directory: DirOption = None,
) -> None:
    """Cut a net into sides that cannot reach each other (by each node's blocked.txt)."""
    from blyan_node.testnet.local import attach

    net = attach(_root(directory))
    net.partition(*map(_numbers, sides))
    say("Cut. Mend it with: blyan-node testnet heal")


def _numbers(side: str) -> list[int]:
    try:
        return [int(number) for number in side.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"{side!r} is not a list of nodes like 0,1,2") from error


@app.command(epilog="Example: blyan-node testnet heal")
def heal(directory: DirOption = None) -> None:
    """Mend a net that was cut."""
    from blyan_node.testnet.local import attach

    attach(_root(directory)).heal()
    say("Mended. The nodes find each other within seconds.")


@app.command(epilog="Example: blyan-node testnet down")
def down(directory: DirOption = None) -> None:
    """Stop the daemons of a net; its data stays."""
    from blyan_node.testnet.local import attach

    net = attach(_root(directory))
    killed = net.stop()
    for index in killed:
        say(f"node {index} did not stop within 10 s and was killed")
    say("Stopped.")
