"""``chain verify``: recompute the chain of a stopped node."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from blyan_node.cli.common import EXIT_OTHER, DataDirOption, JsonOption, say, say_json
from blyan_node.config import load_config
from blyan_node.datadir import DataDir, open_data_dir
from blyan_node.errors import ConfigError

if TYPE_CHECKING:
    from blyan_node.chain.verify import Fault, Progress, Verified


def verify(
    data_dir: DataDirOption = None,
    genesis: Annotated[str | None, typer.Option(help="Genesis file to verify against.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Recompute the chain of a stopped node from its genesis, and tell all that is wrong. Changes nothing."""
    from blyan_node.chain.genesis import load_genesis
    from blyan_node.chain.verify import Fault, Verified
    from blyan_node.chain.verify import verify as verify_chain

    flags = {"data_dir": None if data_dir is None else str(data_dir), "genesis": genesis}
    config = load_config(flags, os.environ).config
    directory = DataDir(config.data_dir)
    if not directory.chain.is_dir():
        raise ConfigError(f"there is no chain in {directory.root}: name the --data-dir of a node that has run")
    network = load_genesis(config.genesis or directory.genesis)
    faults: list[Fault] = []
    found = Verified(0, 0, 0, complete=False)
    with open_data_dir(config.data_dir):
        for finding in _shown(verify_chain(directory.chain, network), quiet=as_json):
            if isinstance(finding, Verified):
                found = finding
            elif isinstance(finding, Fault):
                faults.append(finding)
    if as_json:
        named = [{"where": fault.where, "what": fault.what} for fault in faults]
        say_json(
            {"sound": not faults, "blocks": found.blocks, "cuts": found.cuts, "faults": named}
            | {"complete": found.complete}
        )
    else:
        _say_found(found, faults, directory.chain)
    if faults:
        raise typer.Exit(EXIT_OTHER)


def _shown(findings: Iterator[Fault | Progress | Verified], *, quiet: bool) -> Iterator[Fault | Verified]:
    """Draw a bar on stderr for what is done, and pass on the rest."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    from blyan_node.chain.verify import Progress

    console = Console(stderr=True)
    columns = ("  {task.description:<8}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bars(*columns, console=console, disable=quiet or not console.is_terminal) as bars:
        tasks = {}
        for finding in findings:
            if not isinstance(finding, Progress):
                yield finding
                continue
            if finding.stage not in tasks:
                tasks[finding.stage] = bars.add_task(finding.stage)
            bars.update(tasks[finding.stage], completed=finding.done, total=finding.total)


def _say_found(found: Verified, faults: list[Fault], chain: Path) -> None:
    for fault in faults:
        say(f"{fault.where}: {fault.what}")
    held = f"{_count(found.blocks, 'block')} and {_count(found.cuts, 'cut')}"
    if not faults:
        say(f"The chain is sound: {held} follow from the genesis.")
        return
    say()
    say(f"The chain is damaged: {_count(len(faults), 'fault')} in {held}.")
    if not found.complete:
        say("There may be more: the search ended here.")
    say(
        f"Move {chain} away and start the node: it fetches the chain from its peers, and as a validator waits until it "
        "cannot contradict what it has signed. Or restore a copy of it that was made since the node last ran."
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
