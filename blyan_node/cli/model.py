"""``model import``, ``model list`` and ``model verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from blyan_node.cli.common import DataDirOption, JsonOption, data_dir_of, say, say_json, say_table
from blyan_node.errors import ConfigError

app = typer.Typer(help="Models of the network.", no_args_is_help=True)


@app.command("import", epilog="Example: blyan-node model import ./SmolLM2-135M-Instruct.Q4_1.gguf --name smollm2")
def import_model(
    source: Annotated[str, typer.Argument(help="A GGUF file, a Hugging Face directory, or hf:REPO.")],
    name: Annotated[str | None, typer.Option(help="What the network is to call it [default: from the source].")] = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Publish a model into the network, from files on this machine. The running node reads them."""
    from rich.console import Console

    from blyan_node.api.client import connect
    from blyan_node.cli.progress import show_progress

    if not source.startswith("hf:"):
        path = Path(source).expanduser().absolute()
        if not path.exists():
            raise ConfigError(f"there is no file or directory {path}")
        source = str(path)
    with connect(data_dir_of(data_dir)) as client, client.import_model(source, name) as steps:
        show_progress(steps, Console(quiet=as_json))
    if as_json:
        say_json({"published": True})
    else:
        say("Published. Peers fetch and spread its layers now; see: blyan-node status")


@app.command("list", epilog="Example: blyan-node model list")
def list_models(data_dir: DataDirOption = None, as_json: JsonOption = False) -> None:
    """List the models that the network has, and whether they can run now."""
    from blyan_node.api.client import connect

    with connect(data_dir_of(data_dir)) as client:
        models = client.models()
    if as_json:
        say_json(models)
        return
    if not models:
        say("This network has no model yet. Publish one with: blyan-node model import FILE.gguf")
        return
    say_table(
        ["model", "context", "state", "owner"],
        [
            [
                model["id"],
                str(model["context_length"]),
                f"nobody serves {len(model['missing'])} units" if model["missing"] else "can run",
                model["owned_by"],
            ]
            for model in models
        ],
    )


@app.command("verify", epilog="Example: blyan-node model verify")
def verify_weights(data_dir: DataDirOption = None, as_json: JsonOption = False) -> None:
    """Check the weights of the running node: on its disk against the chain, in memory against what was loaded.

    What is wrong is named, is not served any more, and is fetched or loaded again.
    """
    from blyan_node.api.client import connect

    with connect(data_dir_of(data_dir)) as client:
        units = client.verify_models()
    if as_json:
        say_json({"verified": units})
    elif units:
        say(f"All weights are what the chain says. Served: {units[0]}..{units[-1]}")
    else:
        say("All weights on the disk are what the chain says. This node serves no layers now.")
