"""Four validators in trouble while payments flow: none signs twice, and what was answered holds."""

from __future__ import annotations

import random
import re
import resource
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path

import pytest

from blyan_node.chain.genesis import load_genesis
from blyan_node.chain.keys import Key, show_address
from blyan_node.chain.replica import Replica
from blyan_node.testnet.local import Node, Testnet, wait_until
from tests.support.daemons import WITHIN, faults, kill, start_that_fails
from tests.support.payments import (
    Payer,
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

DAY_MS = 24 * 3600 * 1000


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Testnet]:
    """One net for all that happens here. In the end no key has signed twice, and each node's data is sound."""
    with Testnet(tmp_path_factory.mktemp("validators") / "net", nodes=4) as net:
        yield net
        assert not any(node.client.validators()["slashed"] for node in net.nodes)
    keys = [key_of(node).address for node in net.nodes]
    for node in net.nodes:
        assert faults(node) == []
        with Replica.open(node.directory.chain, load_genesis(node.directory.genesis)) as replica:
            assert not any(replica.is_equivocator(key) for key in keys)
        said = node.log.read_text()
        assert not [
            fault for fault in ("voted twice", "cheated", "Traceback", "another one than here") if fault in said
        ]


@pytest.fixture
def net(lasting: Testnet) -> Testnet:
    for node in lasting.nodes:
        if node.running() is None:
            lasting.restart(node.index)
    wait_until(lambda: not any(missing(node) for node in lasting.nodes), timeout=WITHIN, what="all connected")
    return lasting


@contextmanager
def payments(net: Testnet) -> Iterator[list[Payer]]:
    """Payments flow while the context lasts. After it all that was acknowledged is final, once, on all nodes."""
    supply = net.node(0).client.network()["supply_nano"]
    payers = [Payer(net, key_of(net.node(index)), seed=index) for index in range(2)]
    for payer in payers:
        payer.start()
    try:
        yield payers
    finally:
        for payer in payers:
            payer.stop()
    for payer in payers:
        assert payer.acknowledged
        wait_final(net.nodes, payer.acknowledged[-1])
    wait_until(lambda: agreed(net.nodes), timeout=WITHIN, what="one state")
    for node, id in zip(cycle(net.nodes), (id for payer in payers for id in payer.acknowledged)):
        assert standing(node, id) == ("final", None)
    for payer in payers:
        assert {balance(node, payer.payee) for node in net.nodes} == {len(payer.acknowledged) * Payer.AMOUNT}
    assert {node.client.network()["supply_nano"] for node in net.nodes} == {supply}


def pay(net: Testnet, node: Node) -> bytes:
    """Hand one payment of a node's own to it; return its id."""
    sender = key_of(node)
    nonce = next_nonce(node, sender)
    return submit(node, transfer(net, sender, Key.generate().address, 1, nonce=nonce))


def wait_final(nodes: list[Node], record: bytes) -> None:
    wait_until(lambda: words(nodes, record) == {("final", None)}, timeout=WITHIN, what="a final payment")


def wait_cuts(node: Node, more: int) -> None:
    """Wait until so many more cuts are final."""
    enough = final(node)["k"] + more
    wait_until(lambda: final(node)["k"] >= enough, timeout=WITHIN, what=f"{more} more cuts")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kills", [2, pytest.param(12, marks=pytest.mark.long)])
def test_validators_are_killed_in_turn(net: Testnet, kills: int) -> None:
    moments = random.Random(kills)
    with payments(net):
        for index in islice(cycle(range(4)), kills):
            time.sleep(moments.uniform(0.2, 1.0))  # no wait for anything: whichever moment it is must not matter
            kill(net, index)
            assert faults(net.node(index)) == []
            net.restart(index)


@pytest.mark.long
def test_a_validator_that_lost_its_disk_abstains_and_takes_part_again(net: Testnet) -> None:
    robbed, others = net.node(2), [net.node(index) for index in (0, 1, 3)]
    with payments(net):
        wait_cuts(robbed, 3)
        kill(net, 2)
        signed = final(net.node(0))["k"] + 2  # the last height at which it may have voted, at most
        shutil.rmtree(robbed.directory.chain)
        began = robbed.log.stat().st_size
        wait_cuts(net.node(0), 3)
        net.restart(2)
        through = abstains_through(robbed, began)
        assert through > signed
        kill(net, 2)  # it remembers that it abstains
        net.restart(2)
        for node in others:
            wait_until(lambda node=node: final(node)["k"] > through, timeout=WITHIN, what="the end of the abstention")
    assert not signers(net.node(0), signed, through) & {show_address(key_of(robbed).address)}
    assert len(signers(net.node(0), signed, through)) == 3
    kill(net, 0)  # from here on nothing is final without the one that lost its disk
    wait_final([robbed, net.node(1), net.node(3)], pay(net, net.node(1)))
    net.restart(0)
    wait_until(lambda: agreed(net.nodes), timeout=WITHIN, what="one state")


def abstains_through(node: Node, began: int) -> int:
    """The cut through which a node says, behind that place in its log, that it abstains."""

    def told() -> re.Match[bytes] | None:
        return re.search(rb"abstains through cut (\d+)", node.log.read_bytes()[began:])

    wait_until(lambda: told() is not None, timeout=WITHIN, what="abstaining")
    found = told()
    assert found
    return int(found[1])


def signers(node: Node, after: int, through: int) -> set[str]:
    """Who signed the certificates of these cuts."""
    cuts = node.client.cuts(limit=100)["data"]
    chosen = [cut for cut in cuts if after < cut["k"] <= through]
    assert len(chosen) == through - after
    return {signer for cut in chosen for signer in cut["signers"]}


@pytest.mark.long
@pytest.mark.parametrize("files", ["*.log", "*.ldb"])
def test_a_damaged_database_is_told_and_fetched_again(net: Testnet, files: str) -> None:
    node = net.node(3)
    wait_final(net.nodes, pay(net, node))
    net.kill(3)
    if files == "*.ldb":
        net.restart(3)  # which makes a table of the log
        net.kill(3)
    damage(node.directory.chain, files)
    for _ in range(2):  # and it stays as it is, for whoever wants to look
        code, said = start_that_fails(node.data_dir)
        assert code == 1
        assert "the chain's database is damaged" in said
        assert f"move {node.directory.chain} away" in said
    shutil.move(node.directory.chain, node.data_dir / f"damaged-{time.monotonic_ns()}")
    net.restart(3)
    wait_until(lambda: agreed(net.nodes), timeout=WITHIN, what="all fetched again")
    with payments(net):
        wait_cuts(node, 4)


def damage(database: Path, files: str) -> None:
    """Change bytes of files, as a failing disk would."""
    paths = [path for path in database.glob(files) if path.stat().st_size]
    assert paths
    for path in paths:
        content = bytearray(path.read_bytes())
        for at in range(10, len(content), 50):
            content[at] ^= 0xFF
        path.write_bytes(content)


def newest(node: Node) -> Path:
    """The log of a node's database, which holds what was written last."""
    (log,) = node.directory.chain.glob("*.log")
    return log


@pytest.mark.long
def test_a_validator_whose_disk_is_full_waits_and_goes_on(net: Testnet) -> None:
    node = net.node(3)
    with payments(net):
        # the limit is the same for all files of the process, and its text log must have room to tell
        wait_until(lambda: newest(node).stat().st_size > 2 * node.log.stat().st_size, timeout=WITHIN, what="much data")
        with full_disk(node):
            wait_until(lambda: "File too large" in node.log.read_text(), timeout=WITHIN, what="noticing")
            before = final(node)["k"]
            wait_cuts(net.node(0), 3)
            assert final(node)["k"] <= before + 1
            assert node.client.status()["state"]
        wait_cuts(node, 3)
    kill(net, 3)
    assert faults(node) == []
    net.restart(3)
    wait_until(lambda: agreed(net.nodes), timeout=WITHIN, what="one state")


@contextmanager
def full_disk(node: Node) -> Iterator[None]:
    """No file of a running node can grow beyond what its database's log has now, and a little: a write ends halfway."""
    pid = node.directory.holder()
    assert pid
    soft, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (newest(node).stat().st_size + 5000, hard))
    yield
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.long
def test_a_clock_that_is_wrong_by_a_day_breaks_nothing(
    net: Testnet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = net.node(2)
    for days in (1, -1):
        wrong_clock(tmp_path, days)
        with monkeypatch.context() as patch:
            patch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
            net.kill(2)
            net.restart(2)
        with payments(net):
            record = pay(net, node)
            wait_until(lambda record=record: standing(node, record)[0] != "unknown", timeout=WITHIN, what="a block")
            wait_cuts(node, 3)
        off = newest_block(node)["timestamp_ms"] - time.time_ns() / 1e6
        assert off == pytest.approx(days * DAY_MS, abs=120_000)


def wrong_clock(folder: Path, days: int) -> None:
    """Write what shifts the clock of every Python that has this folder on its path."""
    (folder / "sitecustomize.py").write_text(
        f"import time\n_ns = time.time_ns\n"
        f"time.time_ns = lambda: _ns() + {days * DAY_MS} * 10**6\n"
        f"time.time = lambda: time.time_ns() / 1e9\n"
    )


def newest_block(node: Node) -> dict:
    """The highest block that a node has written."""
    mine = show_address(key_of(node).address)
    return next(block for block in node.client.blocks("T", limit=100)["data"] if block["author"] == mine)
