"""Real daemons cut off from one another, again and again: both sides go on, and become one within seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from blyan_node.chain.keys import Key
from blyan_node.testnet.local import Node, Testnet, wait_until
from tests.support.daemons import WITHIN
from tests.support.payments import (
    addresses,
    agreed,
    balance,
    final,
    key_of,
    missing,
    next_nonce,
    standing,
    submit,
    transfer,
    words,
)

pytestmark = pytest.mark.chaos

HEALED_WITHIN = 10.0
"""Seconds from the end of a partition until all nodes have one final state again, with all that was submitted."""
SPLITS = (((0, 1, 2), (3, 4, 5)), ((0, 2, 4), (1, 3, 5)), ((1, 2, 3), (0, 4, 5)))
PAYMENTS = 3
AMOUNT = 1_000_000


@pytest.fixture
def net(tmp_path: Path) -> Iterator[Testnet]:
    with Testnet(tmp_path / "net", nodes=6) as net:
        yield net


def test_both_sides_go_on_and_become_one(net: Testnet) -> None:
    supply = net.node(0).client.network()["supply_nano"]
    took = [_split_and_heal(net, sides, key_of(net.node(index))) for index, sides in enumerate(SPLITS)]
    print("healed within", ", ".join(f"{seconds:.1f} s" for seconds in took))  # noqa: T201 - a measurement
    assert {node.client.network()["supply_nano"] for node in net.nodes} == {supply}
    assert not any(node.client.validators()["slashed"] for node in net.nodes)
    assert max(took) < HEALED_WITHIN


def _split_and_heal(net: Testnet, sides: tuple[tuple[int, ...], ...], cheat: Key) -> float:
    """Split the net, pay on both sides and double spend the cheat's money; return how long the net took to heal."""
    nodes = net.nodes
    here, there = parts = [[nodes[index] for index in side] for side in sides]
    wait_until(lambda: not any(missing(node) for node in nodes), timeout=WITHIN, what="all nodes connected")
    wait_until(lambda: agreed(nodes), timeout=WITHIN, what="all at rest")
    before = final(nodes[0])["k"]
    net.partition(*sides)
    wait_until(lambda: _cut_off(here, there) and _cut_off(there, here), timeout=WITHIN, what="the split")

    nonce = next_nonce(nodes[0], cheat)
    rivals = [submit(part[0], transfer(net, cheat, Key.generate().address, AMOUNT, nonce=nonce)) for part in parts]
    payments: dict[bytes, bytes] = {}
    for part in parts:
        payee, sender = Key.generate().address, key_of(part[-1])
        for _ in range(PAYMENTS):
            record = transfer(net, sender, payee, AMOUNT, nonce=next_nonce(part[0], sender))
            payments[submit(part[0], record)] = payee
            _wait_tentative(part, record.id)
    for part, rival in zip(parts, rivals, strict=True):
        _wait_tentative(part, rival)
    time.sleep(2)  # in which half the stake could decide a cut, were it able to
    assert [final(node)["k"] for node in nodes] == [before] * len(nodes)

    net.heal()
    began = time.monotonic()
    wait_until(lambda: _settled(nodes, [*payments, *rivals]), timeout=WITHIN, what="one state after healing")
    took = time.monotonic() - began

    fates = [words(nodes, rival) for rival in rivals]
    assert [len(fate) for fate in fates] == [1, 1], "the double spend ends the same way everywhere"
    assert {void is None for fate in fates for _, void in fate} == {True, False}, "one of the two is paid"
    assert all(words(nodes, record) == {("final", None)} for record in payments)
    for payee in set(payments.values()):
        assert {balance(node, payee) for node in nodes} == {PAYMENTS * AMOUNT}
    return took


def _cut_off(here: list[Node], there: list[Node]) -> bool:
    return all(missing(node) == addresses(there) for node in here)


def _wait_tentative(nodes: list[Node], record: bytes) -> None:
    wait_until(lambda: words(nodes, record) == {("tentative", None)}, timeout=WITHIN, what="a tentative payment")


def _settled(nodes: list[Node], records: list[bytes]) -> bool:
    """Whether all nodes have one final state, and these records in it."""
    return agreed(nodes) and all(standing(nodes[0], record)[0] == "final" for record in records)
