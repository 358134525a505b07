"""A network that lost half of its stake for good goes on from a signed genesis, as docs/operating.md tells."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from blyan_node.chain.genesis import load_genesis
from blyan_node.chain.keys import Key
from blyan_node.testnet.local import Node, Testnet, wait_until
from tests.support.daemons import WITHIN, command, daemon, kill
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

pytestmark = [pytest.mark.chaos, pytest.mark.long]

PAYEE = Key.generate().address


def pay(net: Testnet, node: Node, amount: int) -> bytes:
    sender = key_of(node)
    return submit(node, transfer(net, sender, PAYEE, amount, nonce=next_nonce(node, sender)))


def wait_final(nodes: list[Node], record: bytes) -> None:
    wait_until(lambda: words(nodes, record) == {("final", None)}, timeout=WITHIN, what="a final payment")


def run(node: Node, *arguments: str) -> str:
    done = command(*arguments, data_dir=node.data_dir)
    assert done.returncode == 0, done.stderr
    return done.stdout


def successor(old: Testnet, survivors: list[Node], genesis: Path, root: Path) -> Testnet:
    """A net in new data directories, with the survivors' keys."""
    for index, node in enumerate(survivors):
        fresh = root / f"node-{index}"
        fresh.mkdir(parents=True, mode=0o700)
        shutil.copy(node.directory.key, fresh)
    shutil.copy(genesis, root / "genesis.toml")
    (root / "testnet.json").write_text(json.dumps({"nodes": len(survivors)}))
    return Testnet(root, nodes=len(survivors))


def test_two_of_four_validators_restart_the_network(tmp_path: Path) -> None:
    with Testnet(tmp_path / "old", nodes=4) as old:
        survivors, lost = old.nodes[:2], old.nodes[2:]
        wait_until(lambda: not any(missing(node) for node in old.nodes), timeout=WITHIN, what="all connected")
        for amount in (5, 7):
            wait_final(old.nodes, pay(old, old.node(0), amount))
        for node in lost:
            kill(old, node.index)
        wait_until(lambda: all(missing(node) == addresses(lost) for node in survivors), timeout=WITHIN, what="the loss")
        stuck = pay(old, old.node(1), 11)
        wait_until(lambda: words(survivors, stuck) == {("tentative", None)}, timeout=WITHIN, what="a tentative payment")
        wait_until(lambda: agreed(survivors), timeout=WITHIN, what="one final cut")
        last = final(old.node(0))
        assert last["k"] > 0
        shown = run(old.node(0), "status") + run(old.node(0), "validators")
        assert "no further one until more of these validators are back" in shown
        assert "nothing becomes final" in shown
        assert all(shown.count(address) >= 2 for address in addresses(lost))
        owners = {PAYEE, *(key_of(node).address for node in old.nodes)}
        supply, wealth = old.node(0).client.network()["supply_nano"], {who: balance(old.node(0), who) for who in owners}
        old_id = old.node(0).client.network()["network"]
        assert [standing(node, stuck)[0] for node in survivors] == ["tentative"] * 2
        old.stop()

        genesis = tmp_path / "restart.toml"
        going_on = [part for who in sorted(addresses(survivors)) for part in ("--validator", who)]
        assert f"from its cut {last['k']}" in run(old.node(0), "network", "restart", *going_on, "--out", str(genesis))
        assert "25.0 % of the old stake" in run(old.node(0), "network", "sign", str(genesis))
        assert "50.0 % of the old stake" in run(old.node(1), "network", "sign", str(genesis))
        assert "with 50.0 % of the old stake" in run(old.node(1), "network", "show", str(genesis))

        with successor(old, survivors, genesis, tmp_path / "new") as new:
            wait_until(lambda: not any(missing(node) for node in new.nodes), timeout=WITHIN, what="both connected")
            told = new.node(0).client.network()
            assert told["network"] == load_genesis(genesis).network.hex() != old_id
            assert told["supply_nano"] == supply
            kept = {who: balance(new.node(1), who) for who in owners}
            stakes = {key_of(node).address: int(stake(old, node)) for node in lost}
            assert kept == {who: amount + stakes.get(who, 0) for who, amount in wealth.items()}
            wait_final(new.nodes, pay(new, new.node(0), 3))
            wait_final(new.nodes, pay(new, new.node(1), 4))
            assert {balance(node, PAYEE) for node in new.nodes} == {5 + 7 + 3 + 4}

            # one of the lost comes back after all, with its old data, and is told
            address = new.node(0).client.status()["addresses"][0]
            old_genesis = str(old.root / "genesis.toml")
            with daemon(lost[0].data_dir, "--genesis", old_genesis, "--bootstrap", address) as late:
                wait_until(lambda: late.said("parting"), timeout=WITHIN, what="parting")
                assert late.said(f"is of network {told['network'][:16]}, this node of {old_id[:16]}")
                assert late.said("start with its genesis or invite and a data directory of its own")
                assert late.client.network()["final"] == last
                assert late.stop() == 0
            # and joins as the others did
            with daemon(tmp_path / "late", "--genesis", str(genesis), "--bootstrap", address) as joined:
                wait_until(
                    lambda: joined.client.network()["final"] == final(new.node(0)), timeout=WITHIN, what="joining"
                )


def stake(net: Testnet, node: Node) -> int:
    """What a validator had bonded to itself in the beginning."""
    mine = key_of(node).address
    return next(each.stake for each in load_genesis(net.root / "genesis.toml").validators if each.address == mine)
