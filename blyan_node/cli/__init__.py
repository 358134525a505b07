"""The ``blyan-node`` command. Commands parse, call and print; what they call is imported when they run.

So ``blyan-node --help`` imports neither torch nor libp2p nor rich.
"""

from __future__ import annotations

import typer

from blyan_node import __version__
from blyan_node.cli import chain, chat, key, model, money, network, node, testnet, verify, wallet
from blyan_node.cli.common import EXIT_CODES, EXIT_INTERRUPTED, fail
from blyan_node.errors import BlyanError

app = typer.Typer(
    name="blyan-node",
    help="Run one language model on many machines, without a centre.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # importing rich would take a third of the time of --help
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    _version: bool = typer.Option(False, "--version", callback=_show_version, is_eager=True, help="Print the version."),
) -> None:
    pass


app.command(epilog="Example: blyan-node start --bootstrap /ip4/10.0.0.1/tcp/4001/p2p/16Uiu2…")(node.start)
app.command(epilog="Example: blyan-node status --watch")(node.status)
app.command(epilog='Example: blyan-node chat "What is a block?"')(chat.chat)
app.command(epilog="Example: blyan-node page --data-dir ./node")(node.page)
app.command(epilog="Example: blyan-node validators")(chain.validators)
chain.app.command(epilog="Example: blyan-node chain verify --data-dir ./node")(verify.verify)
app.add_typer(chain.app, name="chain")
app.add_typer(model.app, name="model")
wallet.app.command(epilog="Example: blyan-node wallet balance savings")(money.balance)
wallet.app.command(epilog="Example: blyan-node wallet history -n 50")(money.history)
wallet.app.command(
    epilog="Example: blyan-node wallet send 0x9858EfFD232B4033E47d90003D41EC34EcaEda94 1.5 --wait final"
)(money.send)
wallet.app.command(epilog="Example: blyan-node wallet bond node 100")(money.bond)
wallet.app.command(epilog="Example: blyan-node wallet unbond node 100")(money.unbond)
wallet.app.command(epilog="Example: blyan-node wallet faucet 100 --to savings")(money.faucet)
app.add_typer(wallet.app, name="wallet")
app.add_typer(key.app, name="key")
app.add_typer(network.app, name="network")
app.add_typer(node.config_app, name="config")
app.add_typer(testnet.app, name="testnet")


def _first(error: BaseException) -> BlyanError:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if not isinstance(error, BlyanError):
        raise error
    return error


def main() -> None:
    """Run the command line; errors become one line on stderr and an exit code."""
    try:
        app()
    except BlyanError as error:
        fail(error)
    except BaseExceptionGroup as group:
        # What ends a node comes out of its nurseries in groups; where all of it is meant, the first says enough.
        ours, others = group.split(BlyanError)
        if ours is None or others is not None:
            raise
        fail(_first(ours))
    except KeyboardInterrupt:
        raise SystemExit(EXIT_INTERRUPTED) from None
