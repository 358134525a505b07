"""What the commands share: options, exit codes, and how errors and tables are shown."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from blyan_node.config import load_config
from blyan_node.errors import BlyanError, ConfigError

EXIT_OTHER = 1
EXIT_USAGE = 2
EXIT_UNREACHABLE = 3
EXIT_REFUSED = 4
EXIT_INTERRUPTED = 130

EXIT_CODES = (
    "Exit codes: 0 success; 1 failed; 2 wrong usage or configuration; 3 the node cannot be reached; "
    "4 the node refused; 130 interrupted."
)

DataDirOption = Annotated[
    Path | None,
    typer.Option("--data-dir", help="The node's data directory [default: by platform, or BLYAN_DATA_DIR]."),
]
PasswordFileOption = Annotated[
    Path | None,
    typer.Option("--password-file", help="File with the wallet's password [or BLYAN_WALLET_PASSWORD; else it asks]."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


def fail(error: BlyanError) -> NoReturn:
    """Print an error on stderr and leave with the code that belongs to it."""
    from blyan_node.api.client import CannotReach, NodeRefused

    codes: tuple[tuple[type[BlyanError], int], ...] = (
        (ConfigError, EXIT_USAGE),
        (CannotReach, EXIT_UNREACHABLE),
        (NodeRefused, EXIT_REFUSED),
    )
    print_error(str(error))
    raise SystemExit(next((code for kind, code in codes if isinstance(error, kind)), EXIT_OTHER))


def print_error(message: str) -> None:
    """Print one line for people on stderr."""
    sys.stderr.write(f"blyan-node: {message}\n")


def say(text: str = "", *, end: str = "\n") -> None:
    """Print to stdout, at once."""
    sys.stdout.write(text + end)
    sys.stdout.flush()


def say_json(value: Any) -> None:
    """Print a value as JSON."""
    say(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def data_dir_of(given: Path | None) -> Path:
    """The data directory that a command means."""
    flags = {"data_dir": None if given is None else str(given)}
    return load_config(flags, os.environ).config.data_dir


def say_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: drawn by rich for people, tab-separated where stdout is not a terminal."""
    if not sys.stdout.isatty():
        say("\t".join(columns))
        for row in rows:
            say("\t".join(row))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, box=None, header_style="bold", pad_edge=False)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def human_size(size: int | None) -> str:
    """Bytes, for people; None is no limit."""
    if size is None:
        return "no limit"
    power = min((size.bit_length() - 1) // 10, 3) if size else 0
    number = size / 1024**power
    return f"{number:.{1 if power and number < 100 else 0}f} {('B', 'KiB', 'MiB', 'GiB')[power]}"


def bly(amount: int | str) -> str:
    """Nano-BLY, a decimal string where it comes from the API, in BLY."""
    from blyan_node.chain.money import show_bly

    return show_bly(int(amount))


def clean(text: str) -> str:
    """Text that a stranger wrote, made fit for a terminal: without what moves the cursor or changes colours."""
    return "".join(character if character.isprintable() else "�" for character in text)


def short(identity: str) -> str:
    """A long id, recognisable."""
    return identity if len(identity) <= 16 else f"{identity[:8]}…{identity[-5:]}"


def spans(units: Sequence[int]) -> str:
    """Unit indexes as ranges: ``0-3, 7``."""
    ranges: list[list[int]] = []
    for index in sorted(units):
        if ranges and index == ranges[-1][1] + 1:
            ranges[-1][1] = index
        else:
            ranges.append([index, index])
    return ", ".join(f"{first}-{last}" if first != last else str(first) for first, last in ranges) or "-"
