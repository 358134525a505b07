"""``start``, ``status`` and ``config show``."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blyan_node.cli.common import (
    DataDirOption,
    JsonOption,
    data_dir_of,
    human_size,
    say,
    say_json,
    say_table,
    short,
    spans,
)
from blyan_node.config import FIELDS, Loaded, load_config, shown
from blyan_node.datadir import DataDir

if TYPE_CHECKING:
    from blyan_node.api.client import Client

config_app = typer.Typer(help="The node's settings.", no_args_is_help=True)

ConfigFile = Annotated[Path | None, typer.Option("--config", help="TOML file of settings [or BLYAN_CONFIG].")]


def start(
    data_dir: DataDirOption = None,
    config: ConfigFile = None,
    genesis: Annotated[str | None, typer.Option(help="Genesis file of the network to join.")] = None,
    listen: Annotated[str | None, typer.Option(help="Multiaddr on which peers connect.")] = None,
    announce: Annotated[list[str] | None, typer.Option(help="Multiaddr told to peers; may be repeated.")] = None,
    bootstrap: Annotated[list[str] | None, typer.Option(help="Peer to join through; may be repeated.")] = None,
    api_host: Annotated[str | None, typer.Option(help="Address of the HTTP API.")] = None,
    api_port: Annotated[int | None, typer.Option(help="Port of the HTTP API; 0 is chosen by the system.")] = None,
    memory_limit: Annotated[str | None, typer.Option(help="Most memory for weights and KV cache: 4GiB.")] = None,
    disk_limit: Annotated[str | None, typer.Option(help="Most disk space for weights: 50GiB.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16, int8 or fp8.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads that compute layers.")] = None,
    context_limit: Annotated[int | None, typer.Option(help="Most tokens in one session.")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    log_format: Annotated[str | None, typer.Option(help="console or json.")] = None,
) -> None:
    """Run a node until it is stopped (Ctrl-C or SIGTERM). The first start needs no configuration."""
    flags: dict[str, Any] = {
        "data_dir": None if data_dir is None else str(data_dir),
        "genesis": genesis,
        "listen": listen,
        "announce": announce or None,
        "bootstrap": bootstrap or None,
        "api_host": api_host,
        "api_port": api_port,
        "memory_limit": memory_limit,
        "disk_limit": disk_limit,
        "device": device,
        "dtype": dtype,
        "threads": threads,
        "context_limit": context_limit,
        "log_level": log_level,
        "log_format": log_format,
    }
    settings = load_config(flags, os.environ, config).config
    # These are read once, when torch is imported. Threads that spin while they wait would take the cores from the
    # other nodes of this machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(settings.threads)
    from blyan_node.node import run

    run(settings)


def page(data_dir: DataDirOption = None) -> None:
    """Print the address of the running node's web page. The local API key stands in it: give it to nobody."""
    from blyan_node.api.client import connect

    directory = data_dir_of(data_dir)
    with connect(directory) as client:
        say(f"{client.url}/#key={DataDir(directory).read_token()}")


def status(
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
    watch: Annotated[bool, typer.Option("--watch", help="Show it again every two seconds.")] = False,
) -> None:
    """Show the running node: peers, layers held and coverage, chain heads."""
    from blyan_node.api.client import connect

    with connect(data_dir_of(data_dir)) as client:
        if as_json:
            say_json(client.status())
            return
        _show_status(client)
        while watch:
            time.sleep(2)
            say("\x1b[2J\x1b[H", end="")
            _show_status(client)


def _show_status(client: Client) -> None:
    node = client.status()
    facts = [
        ("node", f"{node['peer_id']}  ({node['state']}, up {node['uptime_s']:.0f} s)"),
        ("address", node["address"]),
        ("network", f"{node['network_name']}  {node['network'][:16]}…"),
        ("listens", ", ".join(node["addresses"])),
        ("memory", f"{human_size(node['memory_used'])} of {human_size(node['memory_limit'])} for weights and caches"),
        ("process", f"{human_size(node['resident'])} of memory in all"),
        ("weights on disk", f"{human_size(node['disk_used'])} of {human_size(node['disk_limit'])}"),
        ("chain", f"{node['blocks']} blocks, heads {', '.join(head[:12] for head in node['heads'])}"),
        ("final", _finality(node)),
        ("sessions", str(node["sessions"])),
    ]
    for name, value in facts:
        say(f"{name:<16} {value}")
    for model in node["models"]:
        say()
        _show_model(model)
    if node["peers"]:
        say()
        say_table(
            ["peer", "state", "serves", "round trip"],
            [
                [
                    short(peer["peer"]),
                    peer["state"],
                    "-" if peer["first"] is None else f"{peer['model']} units {peer['first']}-{peer['last']}",
                    "-" if peer["round_trip_ms"] is None else f"{peer['round_trip_ms']:.1f} ms",
                ]
                for peer in node["peers"]
            ],
        )


def _finality(node: dict[str, Any]) -> str:
    cut = f"cut {node['cut']}"
    if not (missing := node["missing_validators"]):
        return cut
    return f"{cut}; no further one until more of these validators are back: {', '.join(missing)}"


def _show_model(model: dict[str, Any]) -> None:
    missing = [unit for unit, peers in enumerate(model["coverage"]) if not peers]
    state = "being published" if not model["complete"] else "can run" if not missing else "cannot run yet"
    say(f"{'model':<16} {model['name']}: {state}, {len(model['units'])} units")
    say(f"{'  held here':<16} serves {spans(model['served'])}, stores {spans(model['stored'])}")
    if missing:
        say(f"{'  nobody serves':<16} {spans(missing)}")


@config_app.command("show", epilog="Example: blyan-node config show --json")
def show_config(data_dir: DataDirOption = None, config: ConfigFile = None, as_json: JsonOption = False) -> None:
    """Show every setting, its value and where that came from."""
    flags = {"data_dir": None if data_dir is None else str(data_dir)}
    loaded: Loaded = load_config(flags, os.environ, config)
    values = {name: getattr(loaded.config, name) for name in FIELDS}
    if as_json:
        say_json({name: {"value": value, "source": loaded.sources[name]} for name, value in values.items()})
        return
    say_table(
        ["setting", "value", "from", "meaning"],
        [
            [name, shown(value), loaded.sources[name], FIELDS[name].metadata["meaning"]]
            for name, value in values.items()
        ],
    )
