"""``wallet balance``, ``history``, ``send``, ``bond``, ``unbond`` and ``faucet``: money, through the running node.

Records are signed here: a wallet's secret never leaves this process.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blyan_node.cli.common import (
    DataDirOption,
    JsonOption,
    PasswordFileOption,
    bly,
    data_dir_of,
    say,
    say_json,
    say_table,
    short,
)
from blyan_node.cli.payment import Terms, Wait, amount_of, paying
from blyan_node.cli.wallet import keyring_of
from blyan_node.errors import RequestError

if TYPE_CHECKING:
    from blyan_node.api.client import Client

Who = Annotated[str, typer.Argument(metavar="[NAME|ADDRESS]", help="A wallet, or any address.")]
Amount = Annotated[str, typer.Argument(metavar="AMOUNT", help="BLY, like 1.5; at most nine decimals.")]
Validator = Annotated[str, typer.Argument(metavar="VALIDATOR", help="Its address, or a wallet here (node: this one).")]
From = Annotated[str, typer.Option("--from", metavar="NAME", help="The wallet that pays.")]
Fee = Annotated[str | None, typer.Option("--fee", metavar="BLY", help="Fee [default: what carriers ask for the size].")]
Expires = Annotated[int, typer.Option("--expires", metavar="CUTS", min=1, help="Void unless carried by then.")]
WaitFor = Annotated[Wait, typer.Option("--wait", help="End when the record is in the DAG here, or final.")]
Timeout = Annotated[float, typer.Option("--timeout", metavar="SECONDS", min=0, help="Longest wait.")]
PAGE = 100


def balance(who: Who = "node", data_dir: DataDirOption = None, as_json: JsonOption = False) -> None:
    """Show what an address owns: what is final, and what it will be as things stand."""
    from blyan_node.api.client import connect

    address = _address(data_dir, who)
    with connect(data_dir_of(data_dir)) as client:
        holding = client.balance(address)
    if as_json:
        say_json(holding)
        return
    final, tentative = holding["final"], holding["tentative"]
    say(address)
    rows = [
        [name, *(bly(each[f"{name}_nano"]) for each in (final, tentative))]
        for name in ("balance", "bonded", "unbonding")
    ]
    rows.append(["next nonce", str(final["nonce"]), str(tentative["nonce"])])
    say_table(["BLY", f"final (cut {final['k']})", "tentative"], rows)
    if holding["bonds"]:
        say()
        say_table(["bonded to", "BLY"], [[bond["validator"], bly(bond["amount_nano"])] for bond in holding["bonds"]])


def history(
    who: Who = "node",
    number: Annotated[int, typer.Option("-n", "--number", min=1, help="How many entries.")] = 20,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what moved an address's money, newest first."""
    from blyan_node.api.client import connect

    address = _address(data_dir, who)
    with connect(data_dir_of(data_dir)) as client:
        entries = _movements(client, address, number)
    if as_json:
        say_json(entries)
        return
    if not entries:
        say(f"Nothing has moved the money of {address} yet.")
        return
    say_table(
        ["cut", "word", "kind", "BLY", "fee", "with", "balance", "record"],
        [
            [
                str(entry["k"]),
                entry["word"],
                entry["kind"],
                _sign(entry, address) + bly(entry["amount_nano"]),
                bly(entry["fee_nano"]),
                short(entry["other"] or "-"),
                bly(entry["balance_nano"]),
                entry["record"][:10],
            ]
            for entry in entries
        ],
    )


def send(
    to: Annotated[str, typer.Argument(metavar="TO", help="An address, or a wallet here.")],
    amount: Amount,
    payer: From = "node",
    fee: Fee = None,
    expires: Expires = 1000,
    wait: WaitFor = Wait.tentative,
    timeout: Timeout = 60,
    password_file: PasswordFileOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Pay. Tentative: it is in the DAG here, and could still lose to a rival. Final: it can never be reverted."""
    from blyan_node.chain.records import Transfer

    keyring, payee, nano = keyring_of(data_dir), _parse(data_dir, to), amount_of(amount)
    with paying(keyring, _terms(payer, fee, expires, wait, timeout, password_file, as_json)) as wallet:
        wallet.pay(Transfer(payee, nano), f"Sent {bly(nano)} BLY to {_show(payee)}")


def bond(
    validator: Validator,
    amount: Amount,
    payer: From = "node",
    fee: Fee = None,
    expires: Expires = 1000,
    wait: WaitFor = Wait.tentative,
    timeout: Timeout = 60,
    password_file: PasswordFileOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Put money behind a validator; it votes from the next epoch on, and is lost in part where the validator cheats."""
    from blyan_node.chain.records import Bond

    keyring, target, nano = keyring_of(data_dir), _parse(data_dir, validator), amount_of(amount)
    with paying(keyring, _terms(payer, fee, expires, wait, timeout, password_file, as_json)) as wallet:
        wallet.pay(Bond(target, nano), f"Bonded {bly(nano)} BLY to {_show(target)}")


def unbond(
    validator: Validator,
    amount: Amount,
    payer: From = "node",
    fee: Fee = None,
    expires: Expires = 1000,
    wait: WaitFor = Wait.tentative,
    timeout: Timeout = 60,
    password_file: PasswordFileOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take money back from a validator; it can be spent when the unbonding period is over."""
    from blyan_node.chain.records import Unbond

    keyring, target, nano = keyring_of(data_dir), _parse(data_dir, validator), amount_of(amount)
    with paying(keyring, _terms(payer, fee, expires, wait, timeout, password_file, as_json)) as wallet:
        period = wallet.network["parameters"]["unbonding"]
        wallet.pay(
            Unbond(target, nano), f"Took {bly(nano)} BLY back from {_show(target)}, to be spent {period} cuts from now"
        )


def faucet(
    amount: Annotated[
        str | None, typer.Argument(metavar="[AMOUNT]", help="BLY [default: the most it gives at once].")
    ] = None,
    to: Annotated[str | None, typer.Option(metavar="TO", help="Whom to give it [default: the asking wallet].")] = None,
    asker: Annotated[
        str, typer.Option("--from", metavar="NAME", help="The wallet that asks, and pays a fee.")
    ] = "node",
    fee: Fee = None,
    expires: Expires = 1000,
    wait: WaitFor = Wait.tentative,
    timeout: Timeout = 60,
    password_file: PasswordFileOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Ask for new money, on a test net."""
    from blyan_node.chain.records import Faucet

    keyring, payee = keyring_of(data_dir), _parse(data_dir, to or asker)
    wanted = None if amount is None else amount_of(amount)
    with paying(keyring, _terms(asker, fee, expires, wait, timeout, password_file, as_json)) as wallet:
        most = int(wallet.network["parameters"]["faucet_per_record_nano"])
        if not most:
            raise RequestError(f"the network {wallet.network['name']} has no faucet: only test nets have one")
        nano = most if wanted is None else wanted
        wallet.pay(Faucet(payee, nano), f"The faucet gave {bly(nano)} BLY to {_show(payee)}")


def _terms(
    wallet: str,
    fee: str | None,
    expires: int,
    wait: Wait,
    timeout: float,
    password_file: Path | None,
    as_json: bool,
) -> Terms:
    from blyan_node.chain.money import parse_bly

    return Terms(wallet, None if fee is None else parse_bly(fee), expires, wait, timeout, password_file, as_json)


def _movements(client: Client, address: str, number: int) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    after: str | None = None
    while len(entries) < number:
        page = client.transactions(address, min(number - len(entries), PAGE), after)
        entries += page["data"]
        if (after := page["next"]) is None:
            break
    return entries


def _sign(entry: dict[str, Any], address: str) -> str:
    """How an entry changes the balance: not at all, where money only moves between bonds, or to somebody else."""
    if entry["kind"] == "faucet":
        return "+" if entry["other"] == address else ""
    return {"transfer": "-", "bond": "-", "received": "+", "fee": "+", "released": "+", "reward": "+"}.get(
        entry["kind"], ""
    )


def _parse(data_dir: Path | None, who: str) -> bytes:
    return keyring_of(data_dir).address(who)


def _address(data_dir: Path | None, who: str) -> str:
    return _show(_parse(data_dir, who))


def _show(address: bytes) -> str:
    from blyan_node.chain.keys import show_address

    return show_address(address)
