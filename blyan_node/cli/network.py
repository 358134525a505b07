"""``network new``, ``join``, ``show``, ``restart`` and ``sign``: networks as people found, enter and rescue them."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from blyan_node.cli.common import DataDirOption, JsonOption, data_dir_of, say, say_json, say_table
from blyan_node.config import JOINED, PEER, load_config
from blyan_node.datadir import DataDir, explained, open_data_dir, write_whole
from blyan_node.errors import ConfigError, LocalError, RuleError

if TYPE_CHECKING:
    from blyan_node.chain.checkpoint import Checkpoint
    from blyan_node.chain.genesis import Genesis
    from blyan_node.chain.state import State

app = typer.Typer(help="Networks: found one, join one, look at one, rescue one.", no_args_is_help=True)

OutOption = Annotated[Path, typer.Option("--out", help="Where the genesis file is written.")]
FIRST_STAKE = 1000 * 10**9
"""Nano-BLY that the founder of a network bonds where nothing else is said."""


@app.command(epilog="Example: blyan-node network new our-net --validator 0x5aAe…=1000 --balance 0x9B29…=50.5")
def new(
    name: Annotated[str, typer.Argument(help="What the network is called.")],
    validator: Annotated[
        list[str] | None,
        typer.Option(help="ADDRESS=STAKE in BLY; may be repeated [default: the key of the data directory, 1000]."),
    ] = None,
    balance: Annotated[list[str] | None, typer.Option(help="ADDRESS=AMOUNT in BLY; may be repeated.")] = None,
    preset: Annotated[
        Literal["devnet", "testnet", "mainnet"], typer.Option(help="Which parameters it has for ever.")
    ] = "devnet",
    out: OutOption = Path("genesis.toml"),
    data_dir: DataDirOption = None,
) -> None:
    """Found a network: write its genesis file, which every node of it needs."""
    from blyan_node.chain.genesis import Genesis
    from blyan_node.chain.keys import load_or_create_key, show_address
    from blyan_node.chain.presets import load_preset

    parameters = load_preset(preset)
    balances = _amounts(balance or [], "--balance")
    stakes = _amounts(validator or [], "--validator")
    if not stakes:
        key = load_or_create_key(DataDir(data_dir_of(data_dir)).key)
        stakes = {key.address: max(FIRST_STAKE, parameters.min_stake)}
        say(f"Its validator is this node, {show_address(key.address)}.")
    genesis = Genesis.make(name, stakes, created_ms=_now_ms(), parameters=parameters, balances=balances)
    _write_new(out, genesis)
    say(f"Network {genesis.network.hex()} begins with {out}.")
    say(f"Give that file to the validators; each starts with: blyan-node start --genesis {out}")
    say("Once a node runs, it makes an invite for everybody else: blyan-node network show")


@app.command(epilog="Example: blyan-node network join blyan1lQHE…")
def join(
    invite: Annotated[str, typer.Argument(help="The line of text that you were given.")],
    data_dir: DataDirOption = None,
) -> None:
    """Join the network of an invite: the next start of the node does."""
    from blyan_node.chain.genesis import load_genesis
    from blyan_node.chain.invite import parse_invite

    given = parse_invite(invite)
    for address in given.bootstrap:
        try:
            PEER.parse(address)
        except ValueError as error:
            raise ConfigError(
                f"the invite holds {address!r}, which is not {PEER.allowed}: ask for a new one"
            ) from error
    directory = DataDir(data_dir_of(data_dir))
    if directory.genesis.exists() and (here := load_genesis(directory.genesis)).network != given.network:
        raise ConfigError(
            f"{directory.root} belongs to network {_plain(here.name)} ({here.network.hex()}): "
            "join with another --data-dir, or move this one away"
        )
    lines = [
        "# Written by `blyan-node network join`. Settings here give way to the configuration, environment and flags.",
        f"network = {json.dumps(given.network.hex())}",
        f"bootstrap = {json.dumps(given.bootstrap)}",
    ]
    if given.checkpoint is not None:
        lines.append(f'checkpoint = "{given.checkpoint.k}:{given.checkpoint.cut.hex()}"')
    with explained(directory.root):
        directory.root.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_whole(directory.root / JOINED, "\n".join(lines) + "\n")
    say(f"The next start joins network {_plain(given.name)} ({given.network.hex()}).")
    say(f"Start: blyan-node start --data-dir {directory.root}")


@app.command(epilog="Example: blyan-node network show")
def show(
    file: Annotated[Path | None, typer.Argument(help="A genesis file [default: the node's].")] = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show a network's beginning; where a node runs here, with an invite for others."""
    from blyan_node.chain.genesis import load_genesis

    genesis = _own_genesis(data_dir) if file is None else load_genesis(file)
    invite, advice = (None, "") if file is not None else _invite(data_dir_of(data_dir), genesis)
    facts = _facts(genesis)
    if as_json:
        say_json(facts | {"invite": invite})
        return
    _say_facts(facts)
    if file is None:
        say()
        say(advice if invite is None else f"Invite others with:\nblyan-node network join {invite}{advice}")


@app.command(epilog="Example: blyan-node network restart --validator 0x5aAe… --validator 0x9B29… --out restart.toml")
def restart(
    validator: Annotated[list[str], typer.Option(help="Address of an old validator that goes on; may be repeated.")],
    out: OutOption,
    name: Annotated[str | None, typer.Option(help="What the new network is called [default: as the old one].")] = None,
    data_dir: DataDirOption = None,
) -> None:
    """Continue a network that lost more than 1/3 of its stake for good: write the genesis of its successor.

    It is made from the last final cut that the stopped node of this data directory knows. The old validators sign it
    (network sign), each after comparing it with their own; then all start with it, in new data directories.
    """
    from blyan_node.chain.restart import restart_genesis

    old, cut, state = _last_final(data_dir)
    going_on = [_address(text, "--validator") for text in validator]
    genesis = restart_genesis(state, old, cut, going_on, name=name or old.name, created_ms=_now_ms())
    _write_new(out, genesis)
    say(f"Network {genesis.network.hex()} continues {old.network.hex()} from its cut {state.k}, with {out}.")
    say(f"Each old validator that agrees runs: blyan-node network sign {out}")


@app.command(epilog="Example: blyan-node network sign restart.toml")
def sign(
    file: Annotated[Path, typer.Argument(help="The genesis of a restarted network.")],
    data_dir: DataDirOption = None,
) -> None:
    """Compare a restart with the state that this stopped node knows, and add its signature to the file."""
    from blyan_node.chain.genesis import load_genesis
    from blyan_node.chain.keys import load_or_create_key, show_address
    from blyan_node.chain.restart import check_restart, check_signatures, sign_genesis

    genesis = load_genesis(file)
    old, cut, state = _last_final(data_dir)
    key = load_or_create_key(DataDir(data_dir_of(data_dir)).key)
    try:
        check_restart(genesis, state, old, cut)
        genesis = sign_genesis(genesis, key)
        signed = _share(check_signatures(genesis), sum(state.stake().values()))
    except RuleError as error:
        raise LocalError(f"{file} is not signed: {error}") from error
    write_whole(file, genesis.to_toml())
    say(f"Signed as {show_address(key.address)}: {signed} of the old stake has now.")


def _facts(genesis: Genesis) -> dict[str, Any]:
    """What a genesis says, as plain values; amounts in nano-BLY are text, as in the API."""
    from dataclasses import asdict

    from blyan_node.chain.keys import show_address
    from blyan_node.chain.restart import check_signatures

    staked = sum(each.stake for each in genesis.validators)
    facts: dict[str, Any] = {
        "name": genesis.name,
        "network": genesis.network.hex(),
        "created_ms": genesis.created_ms,
        "parameters": asdict(genesis.parameters),
        "supply_nano": str(genesis.supply),
        "balances": len(genesis.balances),
        "validators": [
            {
                "address": show_address(each.address),
                "stake_nano": str(each.stake),
                "share": _share(each.stake, staked),
            }
            for each in genesis.validators
        ],
        "restart": None,
    }
    if (old := genesis.restart) is not None:
        try:
            signed = check_signatures(genesis)
        except RuleError as error:
            raise LocalError(f"do not trust this genesis: {error}") from error
        facts["restart"] = {
            "network": old.network.hex(),
            "k": old.k,
            "cut": old.cut.hex(),
            "state_root": old.state_root.hex(),
            "signers": [show_address(each.address) for each in genesis.signatures],
            "signed_nano": str(signed),
            "total_nano": str(old.stake),
            "share": _share(signed, old.stake),
            "barred": [show_address(address) for address in old.barred],
        }
    return facts


def _say_facts(facts: dict[str, Any]) -> None:
    from blyan_node.chain.genesis import MILLION
    from blyan_node.chain.money import show_bly

    fixed = facts["parameters"]
    rows = [
        ("network", _plain(facts["name"])),
        ("id", facts["network"]),
        ("created", _date(facts["created_ms"])),
        ("supply", f"{show_bly(int(facts['supply_nano']))} of at most {show_bly(fixed['cap'])} BLY"),
        ("balances", f"of {facts['balances']} addresses"),
        ("least stake", f"{show_bly(fixed['min_stake'])} BLY"),
        ("validators change", f"every {fixed['epoch']} cuts"),
        ("unbonding takes", f"{fixed['unbonding']} cuts"),
        ("cheating costs", f"{_share(fixed['slash_millionths'], MILLION)} of the stake"),
        ("faucet", f"{show_bly(fixed['faucet_per_record'])} BLY at once, {show_bly(fixed['faucet_per_cut'])} in a cut"),
        ("least fee", f"{show_bly(fixed['fee_per_byte'])} BLY for each byte of a record"),
    ]
    if (old := facts["restart"]) is not None:
        rows += [
            ("continues", f"{old['network']} after its cut {old['k']} ({old['cut']})"),
            ("signed", f"by {len(old['signers'])} old validators with {old['share']} of the old stake"),
            *(("", address) for address in old["signers"]),
            *(("barred", address) for address in old["barred"]),
        ]
    for name, value in rows:
        say(f"{name:<18} {value}")
    say()
    say_table(
        ["validator", "stake (BLY)", "share"],
        [[each["address"], show_bly(int(each["stake_nano"])), each["share"]] for each in facts["validators"]],
    )


def _invite(root: Path, genesis: Genesis) -> tuple[str | None, str]:
    """Return an invite to the network of the running node, and what else is to be said about it."""
    from blyan_node.chain.invite import Invite

    if (running := DataDir(root).running()) is None:
        return None, "An invite for others can be made while the node runs: it names the node's addresses."
    if not running.p2p:
        return None, "The node listens on no address, so it can invite nobody: see the settings listen and announce."
    invite = Invite.make(genesis.network, genesis.name, running.p2p, _checkpoint(root))
    local = all(address.startswith(("/ip4/127.", "/ip6/::1/")) for address in running.p2p)
    return str(invite), "\nIts addresses are of use on this machine only; see the setting announce." if local else ""


def _checkpoint(root: Path) -> Checkpoint | None:
    """Return the last final cut of the running node; None where it has none or does not tell."""
    from blyan_node.api.client import CannotReach, NodeRefused, connect
    from blyan_node.chain.checkpoint import Checkpoint

    try:
        with connect(root) as client:
            final = client.network()["final"]
    except (CannotReach, NodeRefused):
        return None
    return Checkpoint(final["k"], bytes.fromhex(final["cut"])) if final["k"] else None


def _own_genesis(data_dir: Path | None) -> Genesis:
    from blyan_node.chain.genesis import load_genesis

    flags = {"data_dir": None if data_dir is None else str(data_dir)}
    config = load_config(flags, os.environ).config
    path = config.genesis or DataDir(config.data_dir).genesis
    if config.genesis is None and not path.exists():
        raise LocalError(
            f"{config.data_dir} belongs to no network yet: the first start of the node joins one, or founds one"
        )
    return load_genesis(path)


def _last_final(data_dir: Path | None) -> tuple[Genesis, bytes, State]:
    """Return the genesis, the id of the last final cut and the state after it, of a node that does not run."""
    from blyan_node.chain.replica import Replica

    root, genesis = data_dir_of(data_dir), _own_genesis(data_dir)
    if not DataDir(root).chain.exists():
        raise LocalError(f"there is no chain in {root}: name the --data-dir of a node of the old network")
    with open_data_dir(root) as data:
        replica: Any = Replica.open(data.chain, genesis)
        with replica:
            final = replica.final
    return genesis, final.id, final.state


def _amounts(texts: list[str], option: str) -> dict[bytes, int]:
    """Read ``ADDRESS=AMOUNT`` options; amounts are in BLY."""
    from blyan_node.chain.money import parse_bly

    amounts: dict[bytes, int] = {}
    for text in texts:
        written, equals, amount = text.partition("=")
        if not equals:
            raise ConfigError(f"{option} {text}: write an address, =, and an amount of BLY, like 0x5aAe…=1000")
        address = _address(written, option)
        if address in amounts:
            raise ConfigError(f"{option} names {written} twice")
        try:
            amounts[address] = parse_bly(amount)
        except RuleError as error:
            raise ConfigError(f"{option} {text}: {error}") from error
    return amounts


def _address(text: str, option: str) -> bytes:
    from blyan_node.chain.keys import parse_address

    try:
        return parse_address(text)
    except RuleError as error:
        raise ConfigError(f"{option}: {error}") from error


def _write_new(path: Path, genesis: Genesis) -> None:
    if path.exists():
        raise ConfigError(f"{path} is there already: move it away, or choose another --out")
    with explained(path):
        genesis.save(path)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %"


def _date(ms: int) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(ms // 1000))
    except (ValueError, OverflowError, OSError):
        return f"{ms} ms after 1970"  # a year that no calendar here knows


def _plain(name: str) -> str:
    """A name from elsewhere, without characters that would steer a terminal."""
    return "".join(letter if letter.isprintable() else "�" for letter in name)
