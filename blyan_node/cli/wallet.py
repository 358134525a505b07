"""``wallet new``, ``show``, ``import`` and ``export``: keys on this machine. No node needs to run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blyan_node.cli.common import (
    DataDirOption,
    JsonOption,
    PasswordFileOption,
    data_dir_of,
    print_error,
    say,
    say_json,
    say_table,
)
from blyan_node.datadir import DataDir
from blyan_node.errors import ConfigError, LocalError

if TYPE_CHECKING:
    from blyan_node.chain.keys import Key
    from blyan_node.cli.keyring import Keyring, Wallet

app = typer.Typer(help="Keys and money: the node's own key, and wallets.", no_args_is_help=True)

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="The wallet's name: letters, digits, - and _.")]


def keyring_of(data_dir: Path | None) -> Keyring:
    """The wallets that a command means."""
    from blyan_node.cli.keyring import Keyring

    return Keyring(DataDir(data_dir_of(data_dir)))


@app.command(epilog="Example: blyan-node wallet new savings --words 24")
def new(
    name: NameArgument,
    words: Annotated[int, typer.Option(help="Length of the phrase: 12, 15, 18, 21 or 24 words.")] = 12,
    no_phrase: Annotated[bool, typer.Option("--no-phrase", help="Draw a key that no phrase gives back.")] = False,
    password_file: PasswordFileOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a wallet: an encrypted key file, and the phrase that gives the key back if the file or password is lost."""
    from blyan_node.chain.keys import Key
    from blyan_node.chain.phrase import key_of_phrase, new_phrase
    from blyan_node.cli.keyring import new_password

    keyring = keyring_of(data_dir)
    keyring.check_free(name)
    phrase = None if no_phrase else new_phrase(words)
    key = Key.generate() if phrase is None else key_of_phrase(phrase)
    wallet = keyring.add(name, key, new_password(password_file))
    if as_json:
        say_json(wallet.shown() | {"phrase": phrase})
        return
    _say_wallet(wallet)
    if phrase is not None:
        say()
        say(f"  {phrase}")
        say()
        print_error(
            "write these words down, in this order, on paper. They are shown this once; who has them has the money."
        )


@app.command(epilog="Example: blyan-node wallet show --json")
def show(data_dir: DataDirOption = None, as_json: JsonOption = False) -> None:
    """Show the node's address and peer id, and the wallets."""
    from blyan_node.chain.keys import load_or_create_key, show_address
    from blyan_node.p2p.identity import peer_id_of

    keyring = keyring_of(data_dir)
    wallets = [keyring.wallet(name).shown() for name in keyring.names()]
    path = keyring.data.key
    identity: dict[str, Any] = {}
    if path.exists():
        key = load_or_create_key(path)
        identity = {"address": show_address(key.address), "peer_id": peer_id_of(key.public), "key": str(path)}
    elif not wallets:
        raise LocalError(
            f"there is no key {path} yet; the first blyan-node start makes it. Or make a wallet: wallet new NAME"
        )
    if as_json:
        say_json(identity | {"wallets": wallets})
        return
    for name, value in identity.items():
        say(f"{name:<10} {value}")
    if wallets:
        if identity:
            say()
        say_table(["wallet", "address"], [[wallet["name"], wallet["address"]] for wallet in wallets])


@app.command("import", epilog="Example: blyan-node wallet import savings --phrase")
def import_wallet(
    name: NameArgument,
    phrase: Annotated[bool, typer.Option("--phrase", help="From a BIP-39 phrase; it is asked for.")] = False,
    keystore: Annotated[
        Path | None, typer.Option(help="From an Ethereum keystore (V3); it keeps its password.")
    ] = None,
    secret_file: Annotated[Path | None, typer.Option(help="From a file with the secret: 64 hex digits.")] = None,
    password_file: PasswordFileOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take in a key from elsewhere. A phrase gives the address of the first account of Ethereum wallets."""
    if sum((phrase, keystore is not None, secret_file is not None)) != 1:
        raise ConfigError("say where from: --phrase, --keystore FILE or --secret-file FILE")
    keyring = keyring_of(data_dir)
    keyring.check_free(name)
    if keystore is not None:
        wallet = _import_keystore(keyring, name, keystore, password_file)
    else:
        wallet = _import_secret(keyring, name, secret_file, password_file)
    if as_json:
        say_json(wallet.shown())
        return
    _say_wallet(wallet)


def _import_keystore(keyring: Keyring, name: str, path: Path, password_file: Path | None) -> Wallet:
    from blyan_node.chain.keystore import decrypt_key, load_keystore
    from blyan_node.cli.keyring import ask_password

    keystore = load_keystore(path)
    key = decrypt_key(keystore, ask_password(f"Password of {path.name}", password_file))
    return keyring.add_keystore(name, key, keystore)


def _import_secret(keyring: Keyring, name: str, path: Path | None, password_file: Path | None) -> Wallet:
    from blyan_node.chain.phrase import key_of_phrase
    from blyan_node.cli.keyring import ask_hidden, new_password

    key = key_of_phrase(ask_hidden("Phrase")) if path is None else _read_secret(path)
    return keyring.add(name, key, new_password(password_file))


def _read_secret(path: Path) -> Key:
    from blyan_node.chain.keys import load_or_create_key

    if not path.exists():
        raise ConfigError(f"there is no file {path}")
    return load_or_create_key(path)


@app.command(epilog="Example: blyan-node wallet export savings --out savings-backup.json")
def export(
    name: NameArgument,
    out: Annotated[Path, typer.Option(help="File to write, mode 600; none is overwritten.")],
    secret: Annotated[bool, typer.Option("--secret", help="Write the secret itself, not encrypted.")] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="Yes, write the secret: who reads the file has the money.")
    ] = False,
    password_file: PasswordFileOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a wallet for a backup or another program: an Ethereum keystore, or its secret."""
    from blyan_node.chain.keystore import encrypt_key, load_keystore, save_keystore, save_secret
    from blyan_node.cli.keyring import NODE, new_password

    if secret and not yes:
        raise ConfigError("who reads that file has the money; to write it nevertheless, add --yes")
    keyring = keyring_of(data_dir)
    wallet = keyring.wallet(name)
    if out.exists():
        raise LocalError(f"there is a file {out} already: choose another one")
    if secret:
        save_secret(out, keyring.open(name, password_file).secret.hex() + "\n")
    elif name == NODE:  # its own file is not encrypted
        save_keystore(out, encrypt_key(keyring.open(name, None), new_password(password_file)))
    else:
        keystore = load_keystore(wallet.path)
        save_keystore(out, keystore if isinstance(keystore, dict) else {})
    if as_json:
        say_json({"name": name, "address": wallet.shown()["address"], "out": str(out), "secret": secret})
        return
    say(f"Written to {out}{'; keep it from everybody' if secret else ', under the same password'}.")


def _say_wallet(wallet: Wallet) -> None:
    for name, value in wallet.shown().items():
        say(f"{name:<10} {value}")
