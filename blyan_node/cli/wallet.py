"""``wallet show``: who this node is."""

from __future__ import annotations

import typer

from blyan_node.cli.common import DataDirOption, JsonOption, data_dir_of, say, say_json
from blyan_node.datadir import DataDir
from blyan_node.errors import LocalError

app = typer.Typer(help="The node's identity.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    pass


@app.command(epilog="Example: blyan-node wallet show --json")
def show(data_dir: DataDirOption = None, as_json: JsonOption = False) -> None:
    """Show the address and the peer id of the node's key."""
    from blyan_node.chain.keys import load_or_create_key, show_address
    from blyan_node.p2p.identity import peer_id_of

    path = DataDir(data_dir_of(data_dir)).key
    if not path.exists():
        raise LocalError(f"there is no key {path} yet; the first blyan-node start makes it")
    key = load_or_create_key(path)
    identity = {"address": show_address(key.address), "peer_id": peer_id_of(key.public), "key": str(path)}
    if as_json:
        say_json(identity)
        return
    for name, value in identity.items():
        say(f"{name:<10} {value}")
