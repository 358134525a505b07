"""The commands that move money, against a real ledger behind the real HTTP server."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from blyan_node.chain import keystore
from blyan_node.chain.keys import Key, load_or_create_key, show_address
from blyan_node.chain.keystore import encrypt_key, save_keystore
from blyan_node.chain.money import NANO
from blyan_node.chain.records import Bond, Faucet, Transfer, Unbond
from blyan_node.codec import pack
from blyan_node.errors import StoreError
from tests.support.commands import Done, ask, invoke, node_in
from tests.support.ledger_node import VALIDATOR, LedgerNode
from tests.support.service import ScriptedService

PASSWORD = "correct horse"
ALICE, BOB = Key(b"\x41" * 32), Key(b"\x42" * 32)
BOBS = show_address(BOB.address)
ALICES = show_address(ALICE.address)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setitem(keystore.encrypt_key.__kwdefaults__, "n", 2)
    monkeypatch.setattr("blyan_node.cli.payment.POLL", 0.01)


@pytest.fixture
def home(tmp_path) -> Path:
    """A data directory with the node's key, and the wallet alice."""
    load_or_create_key(tmp_path / "node.key")
    save_keystore(tmp_path / "wallets" / "alice.json", encrypt_key(ALICE, PASSWORD, n=2))
    return tmp_path


def node_key(home: Path) -> Key:
    return load_or_create_key(home / "node.key")


async def alice(*arguments: str, home: Path, node: LedgerNode, password: str = PASSWORD) -> Done:
    async with node_in(home, ScriptedService(chain=node)):
        return await ask("wallet", *arguments, data_dir=home, BLYAN_WALLET_PASSWORD=password)


async def test_a_payment(home):
    node = LedgerNode(ALICE)
    done = await alice("send", BOBS, "1.5", "--from", "alice", home=home, node=node)
    assert done.code == 0, done.err
    assert done.lines[0] == f"Sent 1.5 BLY to {BOBS}: tentative."
    (record,) = node.submitted
    assert (record.parsed(), record.nonce, record.fee) == (Transfer(BOB.address, 1_500_000_000), 0, 0)
    assert record.expires_at_cut == 1000
    assert record.id.hex() in done.lines[1]
    assert node.view.tentative.account(BOB.address).balance == 1_500_000_000


async def test_payments_follow_one_another_up_to_finality(home):
    node = LedgerNode(ALICE, decides=True)
    for nonce in range(2):
        arguments = ["send", BOBS, "1", "--from", "alice", "--wait", "final", "--expires", "7", "--json"]
        done = await alice(*arguments, home=home, node=node)
        assert done.json == {
            "id": node.submitted[-1].id.hex(),
            "kind": "transfer",
            "sender": ALICES,
            "nonce": nonce,
            "fee_nano": "0",
            "expires_at_cut": nonce + 7,  # each payment made a cut
            "word": "final",
            "void": None,
        }


async def test_the_fee_is_what_the_size_asks_for_unless_given(home):
    node = LedgerNode(ALICE, fee_per_byte=1_000_000)
    await alice("send", BOBS, "1", "--from", "alice", home=home, node=node)
    record = node.submitted[0]
    assert 1_000_000 * len(pack(record)) <= record.fee <= 1_000_000 * (len(pack(record)) + 8)
    await alice("send", BOBS, "1", "--from", "alice", "--fee", "0.25", home=home, node=node)
    assert node.submitted[1].fee == NANO // 4


async def test_the_payee_may_be_a_wallet_here(home):
    node = LedgerNode(node_key(home))
    assert (await alice("send", "alice", "2", home=home, node=node)).code == 0
    assert node.submitted[0].sender == node_key(home).address, "the node's key pays where no wallet is named"
    assert node.submitted[0].parsed() == Transfer(ALICE.address, 2 * NANO)
    assert (await alice("send", "node", "1", "--from", "alice", home=home, node=node)).code == 0
    assert node.submitted[1].parsed().payee == node_key(home).address


@pytest.mark.parametrize(
    ("to", "amount", "told"),
    [
        (BOBS.swapcase().replace("0X", "0x"), "1", "wrong checksum"),
        (BOBS[:-1], "1", "not an address"),
        ("alicf", "1", "nor a wallet here (node, alice)"),
        ("../alice", "1", "nor a wallet here"),
        (BOBS, "0.0000000001", "finer than the smallest"),
        (BOBS, "1000000001", "more than there can be"),
        (BOBS, "-1", None),
        (BOBS, "1e3", "is not an amount"),
        (BOBS, "0", "more than 0"),
    ],
)
def test_slips_are_told_before_anything_is_asked(to, amount, told, home):
    done = invoke("wallet", "send", to, amount, "--from", "alice", data_dir=home)
    assert done.code == (1 if told else 2), done.err
    assert told is None or told in done.err
    assert "Traceback" not in done.err


def test_no_node(home):
    for command in (
        ["wallet", "send", BOBS, "1", "--from", "alice"],
        ["wallet", "bond", BOBS, "1"],
        ["wallet", "unbond", BOBS, "1"],
        ["wallet", "faucet"],
        ["wallet", "balance"],
        ["wallet", "history"],
    ):
        done = invoke(*command, data_dir=home)
        assert (done.code, "start it with" in done.err, done.out) == (3, True, ""), command


def test_no_wallet(home, tmp_path):
    done = invoke("wallet", "balance", data_dir=tmp_path / "new")
    assert (done.code, "no key" in done.err) == (1, True)


async def test_a_wrong_password_pays_nothing(home):
    node = LedgerNode(ALICE)
    done = await alice("send", BOBS, "1", "--from", "alice", home=home, node=node, password="correct horsf")
    assert (done.code, "wrong password" in done.err) == (1, True)
    assert (await alice("send", BOBS, "1", "--from", "carol", home=home, node=node)).code == 1
    assert node.submitted == []


async def test_what_the_node_refuses(home):
    node = LedgerNode(ALICE)
    done = await alice("send", BOBS, "100.000000001", "--from", "alice", home=home, node=node)
    assert (done.code, "balance is too small" in done.err, done.out) == (4, True, "")


async def test_a_void_payment_fails_with_its_reason(home):
    node = LedgerNode(ALICE, lets_void=True)
    done = await alice("send", BOBS, "101", "--from", "alice", home=home, node=node)
    assert (done.code, done.out) == (1, "")
    assert "void (tentative): the sender's balance is too small" in done.err
    told = await alice("send", BOBS, "101", "--from", "alice", "--json", home=home, node=node)
    assert (told.code, told.json["void"]) == (1, "the sender's balance is too small")


async def test_a_word_that_does_not_come(home):
    never = LedgerNode(ALICE, carries=False)
    arguments = ["send", BOBS, "1", "--from", "alice", "--timeout", "0.05"]
    done = await alice(*arguments, home=home, node=never)
    assert (done.code, done.out) == (1, "")
    assert "is pending after 0.05 s, not yet tentative" in done.err
    assert "before you send again" in done.err
    undecided = await alice(*arguments, "--wait", "final", home=home, node=LedgerNode(ALICE))
    assert "is tentative after 0.05 s, not yet final" in undecided.err
    handed_in = await alice(*arguments, "--wait", "none", "--json", home=home, node=LedgerNode(ALICE, carries=False))
    assert (handed_in.code, handed_in.json["word"]) == (0, "pending")


async def test_a_word_that_comes_late(home):
    node = LedgerNode(ALICE, carries=False)
    async with node_in(home, ScriptedService(chain=node)), trio.open_nursery() as nursery:

        async def carry_then_decide() -> None:
            while not node.submitted:
                await trio.sleep(0.01)
            record = node.submitted.pop()  # for a moment nobody here knows it: it is on its way
            node.carries = True
            await trio.sleep(0.05)
            await node.submit(record)
            await trio.sleep(0.05)
            node.decide()

        nursery.start_soon(carry_then_decide)
        arguments = ["wallet", "send", BOBS, "1", "--from", "alice", "--wait", "final"]
        done = await ask(*arguments, data_dir=home, BLYAN_WALLET_PASSWORD=PASSWORD)
    assert (done.code, done.lines[0]) == (0, f"Sent 1 BLY to {BOBS}: final."), done.err


async def test_bonding_and_taking_back(home):
    node = LedgerNode(ALICE, unbonding=50)
    validator = show_address(VALIDATOR.address)
    done = await alice("bond", validator, "30", "--from", "alice", home=home, node=node)
    assert done.lines[0] == f"Bonded 30 BLY to {validator}: tentative."
    done = await alice("unbond", validator, "10", "--from", "alice", home=home, node=node)
    assert "to be spent 50 cuts from now" in done.lines[0]
    bond, unbond = (record.parsed() for record in node.submitted)
    assert bond == Bond(VALIDATOR.address, 30 * NANO)
    assert unbond == Unbond(VALIDATOR.address, 10 * NANO)
    done = await alice("unbond", validator, "21", "--from", "alice", home=home, node=node)
    assert (done.code, "not bonded that much" in done.err) == (4, True)


async def test_the_faucet(home):
    node = LedgerNode(ALICE, bly=0)
    done = await alice("faucet", "--from", "alice", home=home, node=node)
    assert done.lines[0] == f"The faucet gave 1000 BLY to {ALICES}: tentative.", done.err
    done = await alice("faucet", "5", "--to", "alice", "--json", home=home, node=node)
    assert done.json["kind"] == "faucet"
    assert [record.parsed() for record in node.submitted] == [
        Faucet(ALICE.address, 1000 * NANO),
        Faucet(ALICE.address, 5 * NANO),
    ]
    assert node.submitted[1].sender == node_key(home).address
    none = LedgerNode(ALICE, faucet_per_record=0, faucet_per_cut=0)
    done = await alice("faucet", "--from", "alice", home=home, node=none)
    assert (done.code, "no faucet" in done.err) == (1, True)


async def test_a_balance_tells_final_from_tentative(home):
    node = LedgerNode(ALICE)
    await alice("send", BOBS, "1.5", "--from", "alice", home=home, node=node)
    await alice("bond", show_address(VALIDATOR.address), "20", "--from", "alice", home=home, node=node)
    done = await alice("balance", "alice", home=home, node=node)
    assert done.lines == [
        ALICES,
        "BLY\tfinal (cut 0)\ttentative",
        "balance\t100\t78.5",
        "bonded\t0\t20",
        "unbonding\t0\t0",
        "next nonce\t0\t2",
        "",
        "bonded to\tBLY",
        f"{show_address(VALIDATOR.address)}\t20",
    ]
    told = await alice("balance", BOBS, "--json", home=home, node=node)
    assert told.json["tentative"]["balance_nano"] == "1500000000"
    assert (await alice("balance", home=home, node=node)).lines[0] == show_address(node_key(home).address)


async def test_a_history_in_pages(home, monkeypatch):
    monkeypatch.setattr("blyan_node.cli.money.PAGE", 2)
    node = LedgerNode(ALICE, decides=True)
    await alice("faucet", "7", "--from", "alice", home=home, node=node)
    await alice("faucet", "7", "--from", "alice", "--to", BOBS, home=home, node=node)
    await alice("send", BOBS, "1.5", "--from", "alice", "--fee", "0.5", home=home, node=node)
    node.decides = False
    await alice("bond", BOBS, "3", "--from", "alice", home=home, node=node)
    done = await alice("history", "alice", home=home, node=node)
    entries = [line.split("\t") for line in done.lines]
    assert [(cut, word, kind, amount, fee, left) for cut, word, kind, amount, fee, _, left, _ in entries[1:]] == [
        ("4", "tentative", "bond", "-3", "0", "102"),
        ("3", "final", "transfer", "-1.5", "0.5", "105"),
        ("2", "final", "faucet", "7", "0", "107"),
        ("1", "final", "faucet", "+7", "0", "107"),
    ]
    assert entries[1][5] == f"{BOBS[:8]}…{BOBS[-5:]}"
    assert entries[1][7] == node.submitted[-1].id.hex()[:10]
    three = await alice("history", "alice", "-n", "3", "--json", home=home, node=node)
    assert [entry["kind"] for entry in three.json] == ["bond", "transfer", "faucet"]
    received = await alice("history", BOBS, "-n", "1", home=home, node=node)
    assert received.lines[1].split("\t")[2:4] == ["received", "+1.5"]
    nothing = await alice("history", home=home, node=node)
    assert "Nothing has moved" in nothing.out


async def test_a_payment_follows_those_that_no_block_carries_yet(home):
    node = LedgerNode(ALICE, carries=False, lets_void=True)
    for _ in range(3):
        done = await alice("send", BOBS, "1", "--from", "alice", "--wait", "none", home=home, node=node)
        assert done.code == 0, done.err
    assert [record.nonce for record in node.submitted] == [0, 1, 2]


async def test_a_node_that_fails_while_it_is_asked(home, monkeypatch):
    node = LedgerNode(ALICE)

    def broken(_id: bytes) -> None:
        if node.submitted:
            raise StoreError("the disk failed")

    monkeypatch.setattr(node, "is_pending", broken)
    node.carries = False
    done = await alice("send", BOBS, "1", "--from", "alice", home=home, node=node)
    assert (done.code, "the disk failed" in done.err) == (4, True)
