"""``key create``, ``list`` and ``revoke``: API keys. A node that runs heeds the change at once; none needs to run."""

from __future__ import annotations

import re
import time
from dataclasses import asdict
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blyan_node.cli.common import DataDirOption, JsonOption, data_dir_of, print_error, say, say_json, say_table
from blyan_node.datadir import DataDir
from blyan_node.errors import ConfigError

if TYPE_CHECKING:
    from blyan_node.api.keys import ApiKey

app = typer.Typer(help="Keys to this node's HTTP API.", no_args_is_help=True)

_SECONDS = {"m": 60, "h": 3600, "d": 86_400}


class Scope(StrEnum):
    """What a key may do."""

    chat = "chat"
    read = "read"
    send = "send"
    admin = "admin"


@app.command(epilog="Example: blyan-node key create website --tokens-per-day 100000 --expires 90d")
def create(
    name: Annotated[str, typer.Argument(help="Whose key it is, for your own list.")],
    scope: Annotated[
        list[Scope] | None,
        typer.Option(
            help="chat: generate; read: state and chain; send: hand in signed records; admin: all. "
            "May be repeated [default: chat]."
        ),
    ] = None,
    tokens_per_day: Annotated[
        int | None, typer.Option(min=1, help="Most tokens, prompts included, in a day (UTC).")
    ] = None,
    expires: Annotated[str | None, typer.Option(help="After 90d, 12h or 30m, or on a date: 2027-01-31.")] = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a key. It is shown this once; only a hash of it is kept."""
    from blyan_node.api import keys

    now = int(time.time())
    made, secret = keys.create(
        DataDir(data_dir_of(data_dir)).api_keys,
        name,
        scopes=scope or [Scope.chat],
        now=now,
        tokens_per_day=tokens_per_day,
        expires=None if expires is None else _moment(expires, now),
    )
    if as_json:
        say_json({"key": secret} | _shown(made, now))
        return
    say(secret)
    print_error(f"keep it now, it is not shown again. Its id, to revoke it: {made.id}")


@app.command("list", epilog="Example: blyan-node key list --json")
def show(data_dir: DataDirOption = None, as_json: JsonOption = False) -> None:
    """List the keys, also those that are no longer valid."""
    from blyan_node.api import keys

    now = int(time.time())
    listed = [_shown(key, now) for key in keys.load(DataDir(data_dir_of(data_dir)).api_keys)]
    if as_json:
        say_json(listed)
        return
    say_table(
        ["id", "name", "scopes", "tokens a day", "made", "expires", "state"],
        [
            [
                key["id"],
                key["name"],
                ", ".join(key["scopes"]),
                str(key["tokens_per_day"] or "any"),
                _date(key["created"]),
                _date(key["expires"]),
                key["state"],
            ]
            for key in listed
        ],
    )


@app.command(epilog="Example: blyan-node key revoke website")
def revoke(
    which: Annotated[str, typer.Argument(metavar="ID|NAME", help="As key list shows it.")],
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Revoke a key, at once and for good."""
    from blyan_node.api import keys

    now = int(time.time())
    gone = keys.revoke(DataDir(data_dir_of(data_dir)).api_keys, which, now=now)
    if as_json:
        say_json(_shown(gone, now))
        return
    say(f"revoked {gone.id} ({gone.name})")


def _shown(key: ApiKey, now: int) -> dict[str, Any]:
    facts = asdict(key)
    del facts["hash"]
    return facts | {"state": key.state(now)}


def _moment(text: str, now: int) -> int:
    """Seconds since 1970, from a duration or a date (its first second in UTC). Raises ConfigError."""
    if found := re.fullmatch(r"([0-9]{1,6})([mhd])", text):
        return now + int(found[1]) * _SECONDS[found[2]]
    try:
        return int(datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC).timestamp())
    except ValueError as error:
        raise ConfigError(f"--expires {text!r} is neither a time such as 90d, 12h or 30m nor a date") from error


def _date(seconds: int | None) -> str:
    return "never" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")
