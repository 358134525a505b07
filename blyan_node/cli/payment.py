"""Making a record, handing it to the running node, and waiting until it stands."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blyan_node.cli.common import bly, say, say_json
from blyan_node.errors import LocalError, RequestError, RuleError

if TYPE_CHECKING:
    from blyan_node.api.client import Client
    from blyan_node.chain.keys import Key
    from blyan_node.chain.records import Arguments, Record
    from blyan_node.cli.keyring import Keyring

POLL = 0.25
"""Seconds between two questions whether a record stands."""


class Wait(StrEnum):
    """What to wait for before a command ends."""

    none = "none"
    tentative = "tentative"
    final = "final"


_PLACES = {"unknown": 0, "pending": 1, "tentative": 2, "final": 3}


@dataclass(frozen=True)
class Terms:
    """How a record is paid for and waited for. ``fee`` is in nano-BLY; None is what carriers ask for its size."""

    wallet: str
    fee: int | None
    expires: int
    """Cuts, from the last final one on."""
    wait: Wait
    timeout: float
    """Seconds."""
    password_file: Path | None
    as_json: bool


@contextmanager
def paying(keyring: Keyring, terms: Terms) -> Iterator[Payer]:
    """Reach the node, then open the wallet: so nobody types a password for nothing."""
    from blyan_node.api.client import connect

    with connect(keyring.data.root) as client:
        network = client.network()
        yield Payer(client, network, keyring.open(terms.wallet, terms.password_file), terms)


@dataclass(frozen=True)
class Payer:
    """An open wallet, and a node that takes its records; ``network`` is what the node says of it."""

    client: Client
    network: dict[str, Any]
    key: Key
    terms: Terms

    def pay(self, arguments: Arguments, done: str) -> None:
        """Sign, hand in, wait and report. ``done`` tells a person what took effect.

        Raises NodeRefused where the node refuses the record, RuleError where it turns out void, and LocalError where
        the word that was waited for does not come in time.
        """
        record = self._make(arguments)
        standing = self._wait(record.id.hex(), self.client.submit(_packed(record).hex())["word"])
        void = standing["void"]
        if self.terms.as_json:
            say_json(_shown(record) | {"word": standing["word"], "void": void})
        elif void is None:
            say(f"{done}: {standing['word']}.")
            say(f"record {record.id.hex()}, fee {bly(record.fee)} BLY")
        if void is not None:
            raise RuleError(f"record {record.id.hex()} is void ({standing['word']}): {void}")

    def _make(self, arguments: Arguments) -> Record:
        from blyan_node.chain.keys import show_address
        from blyan_node.chain.records import make_record

        nonce = self.client.balance(show_address(self.key.address))["next_nonce"]
        expires_at_cut = int(self.network["final"]["k"]) + self.terms.expires

        def signed(fee: int) -> Record:
            network = bytes.fromhex(self.network["network"])
            return make_record(self.key, network, arguments, nonce=nonce, fee=fee, expires_at_cut=expires_at_cut)

        if self.terms.fee is not None:
            return signed(self.terms.fee)
        per_byte, record = int(self.network["parameters"]["fee_per_byte_nano"]), signed(0)
        while (asked := per_byte * len(_packed(record))) > record.fee:
            record = signed(asked)  # with a larger fee it may be a few bytes longer, and then once more
        return record

    def _wait(self, id: str, word: str) -> dict[str, Any]:
        """Return where the record stands once it has reached the word that is waited for."""
        standing: dict[str, Any] = {"word": word, "void": None}
        deadline = time.monotonic() + self.terms.timeout
        while self.terms.wait is not Wait.none:
            standing = self._standing(id)
            if _PLACES[standing["word"]] >= _PLACES[self.terms.wait]:
                break
            if time.monotonic() >= deadline:
                raise LocalError(
                    f"record {id} is {standing['word']} after {self.terms.timeout:g} s, not yet {self.terms.wait}. "
                    "It may still take effect: look with blyan-node wallet history before you send again"
                )
            time.sleep(POLL)
        return standing

    def _standing(self, id: str) -> dict[str, Any]:
        from blyan_node.api.client import NodeRefused

        try:
            return self.client.transaction(id)
        except NodeRefused as refused:
            if refused.status == 404:  # on its way from one node to another
                return {"word": "unknown", "void": None}
            raise


def amount_of(text: str) -> int:
    """Return the nano-BLY that a person asks for. Raises RequestError, also for nothing."""
    from blyan_node.chain.money import parse_bly

    if not (amount := parse_bly(text)):
        raise RequestError("an amount is more than 0 BLY")
    return amount


def _packed(record: Record) -> bytes:
    from blyan_node.codec import pack

    return pack(record)


def _shown(record: Record) -> dict[str, Any]:
    from blyan_node.chain.keys import show_address

    return {
        "id": record.id.hex(),
        "kind": record.kind,
        "sender": show_address(record.sender),
        "nonce": record.nonce,
        "fee_nano": str(record.fee),
        "expires_at_cut": record.expires_at_cut,
    }
