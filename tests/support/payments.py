"""Payments between real daemons, by their HTTP APIs: what a test submits, and where it stands on each node."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterable
from typing import Any

from blyan_node.api.client import NodeRefused
from blyan_node.chain.genesis import load_genesis
from blyan_node.chain.keys import Key, load_or_create_key, show_address
from blyan_node.chain.records import Record, Transfer, make_record
from blyan_node.codec import pack
from blyan_node.errors import LocalError
from blyan_node.testnet.local import Node, Testnet, wait_until
from tests.support.daemons import WITHIN


def key_of(node: Node) -> Key:
    """The key of a node, whose address has money from the genesis."""
    return load_or_create_key(node.directory.key)


def network_of(net: Testnet) -> bytes:
    """The id of the network."""
    return load_genesis(net.root / "genesis.toml").network


def transfer(net: Testnet, sender: Key, payee: bytes, amount: int, *, nonce: int) -> Record:
    """A signed payment, not sent yet."""
    return make_record(sender, network_of(net), Transfer(payee, amount), nonce=nonce)


def next_nonce(node: Node, sender: Key) -> int:
    """The nonce of a sender's next record, as far as this node knows."""
    return int(node.client.balance(show_address(sender.address))["next_nonce"])


def submit(node: Node, record: Record) -> bytes:
    """Hand a record to a node; return its id. It is acknowledged then: at least one validator keeps it."""
    assert node.client.submit(pack(record).hex())["id"] == record.id.hex()
    return record.id


def standing(node: Node, record: bytes) -> tuple[str, str | None]:
    """Where a record stands on a node, its word and why it is void; ("unknown", None) where it has not arrived."""
    try:
        found = node.client.transaction(record.hex())
    except NodeRefused as error:
        if error.status == 404:
            return "unknown", None
        raise
    return found["word"], found["void"]


def words(nodes: Iterable[Node], record: bytes) -> set[tuple[str, str | None]]:
    """The standings of a record on several nodes."""
    return {standing(node, record) for node in nodes}


def final(node: Node) -> dict[str, Any]:
    """The last final cut of a node: ``k``, ``cut`` and ``state_root``."""
    return dict(node.client.network()["final"])


def agreed(nodes: Iterable[Node]) -> bool:
    """Whether all have one final cut and one state."""
    return len({tuple(sorted(final(node).items())) for node in nodes}) == 1


def missing(node: Node) -> set[str]:
    """The addresses of the validators that a node has not heard of."""
    return set(node.client.validators()["missing"])


def addresses(nodes: Iterable[Node]) -> set[str]:
    """The addresses of nodes."""
    return {show_address(key_of(node).address) for node in nodes}


def balance(node: Node, address: bytes, word: str = "final") -> int:
    """What an address can spend, in nano-BLY."""
    return int(node.client.balance(show_address(address))[word]["balance_nano"])


class Payer(threading.Thread):
    """Pays one address again and again, through whichever node answers, until it is stopped.

    ``acknowledged`` are the payments that a node said to be tentative, so in a block, or final.
    """

    AMOUNT = 1000
    PATIENCE = 3.0  # seconds, until another node is asked
    PAUSE = 0.05

    def __init__(self, net: Testnet, sender: Key, seed: int) -> None:
        super().__init__(daemon=True)
        self._net, self._sender, self._random = net, sender, random.Random(seed)
        self._nodes = [Node(node.index, node.data_dir) for node in net.nodes]  # a client serves one thread
        self._nonce = next_nonce(net.node(0), sender)
        self._ended = threading.Event()
        self.payee = Key.generate().address
        self.acknowledged: list[bytes] = []

    def run(self) -> None:
        """Pay; see the class."""
        while not self._ended.wait(self.PAUSE):
            record = transfer(self._net, self._sender, self.payee, self.AMOUNT, nonce=self._nonce)
            while not self._is_acknowledged(record):
                pass
            self.acknowledged.append(record.id)
            self._nonce += 1
        for node in self._nodes:
            node.forget_client()

    def stop(self) -> None:
        """Let the payment under way be acknowledged, and return."""
        self._ended.set()
        self.join(WITHIN)
        assert not self.is_alive()

    def _is_acknowledged(self, record: Record) -> bool:
        """Hand a payment to some node, and hear of it there; False where that one is gone, or takes too long."""
        node = self._random.choice(self._nodes)
        try:
            submit(node, record)
            wait_until(
                lambda: standing(node, record.id)[0] in ("tentative", "final"), timeout=self.PATIENCE, what="a block"
            )
        except LocalError:
            node.forget_client()
            return False
        return True
