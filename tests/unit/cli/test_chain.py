"""The chain in the terminal, over the real HTTP server and a chain of real blocks and cuts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from blyan_node.api.chain_service import BlockInfo, Seat, Validators
from blyan_node.chain.keys import show_address
from blyan_node.chain.records import BlobRef, Manifest, make_record, sign_record
from blyan_node.cli.chain import _when
from tests.support.chain_service import ScriptedChain, scripted_chain
from tests.support.chains import KEYS, NETWORK, Forge
from tests.support.commands import Done, ask, invoke, node_in
from tests.support.money import VALIDATORS
from tests.support.service import ScriptedService


async def told(*arguments: str, home, chain: ScriptedChain) -> Done:
    async with node_in(home, ScriptedService(chain=chain)):
        return await ask(*arguments, data_dir=home)


def id_of(line: str) -> str:
    """The id in a line of the log, without the lanes."""
    return next((word for word in line.split() if len(word) == 10 and not set(word) - set("0123456789abcdef")), "")


async def test_the_log_has_every_block_under_the_cut_that_made_it_final(tmp_path):
    chain = scripted_chain()
    done = await told("chain", "log", home=tmp_path, chain=chain)
    assert done.code == 0, done.err
    seen: dict[int | None, set[str]] = {}
    under: int | None = None
    for line in done.lines:
        if "── cut " in line:
            under = int(line.partition("── cut ")[2].split()[0])
            assert line.endswith(f"── cut {under} · all stake · round 1 ──")
        elif id := id_of(line):
            seen.setdefault(under, set()).add(id)
    expected: dict[int | None, set[str]] = {}
    for info in chain.written:
        expected.setdefault(info.cut, set()).add(info.block.id.hex()[:10])
    expected[1].add(NETWORK.hex()[:10])
    assert seen == expected
    assert list(seen) == [None, 3, 2, 1]
    assert done.lines[-1].split()[-3:] == ["genesis", "of", "test"]
    first = done.lines[0]
    top = max(chain.written, key=lambda info: (info.block.height, info.block.id)).block
    author = show_address(top.header.author)
    assert first.endswith(f"T data {author[:8]}…{author[-5:]} {len(top.records)} records, tentative")


async def test_a_late_block_stands_with_its_cut(tmp_path):
    """A block of little height that a later cut took in stands above higher ones of an earlier cut."""
    forge, chain = Forge(), scripted_chain()
    early = [forge.block(KEYS[0]) for _ in range(3)]
    late = forge.block(KEYS[1])
    join = forge.block(KEYS[1], (late.id, early[-1].id))
    chain.written = [BlockInfo(block, 1) for block in early] + [BlockInfo(late, 2), BlockInfo(join, 2)]
    done = await told("chain", "log", home=tmp_path, chain=chain)
    ids = [id for line in done.lines if (id := id_of(line))]
    assert ids == [each.hex()[:10] for each in (join.id, late.id, *(block.id for block in reversed(early)), NETWORK)]


async def test_the_log_of_some_blocks_or_of_one_chain(tmp_path):
    forge, chain = Forge(), scripted_chain()
    blocks = [forge.block(KEYS[0], chain=name) for name in "ATTBA" * 2]
    chain.written = [BlockInfo(block, None) for block in blocks]
    newest = await told("chain", "log", "-n", "4", "--json", home=tmp_path, chain=chain)
    assert [block["id"] for block in newest.json["blocks"]] == [block.id.hex() for block in blocks[:-5:-1]]
    assert newest.json["cuts"] == []
    drawn = await told("chain", "log", "-n", "4", home=tmp_path, chain=chain)
    assert [line[0] for line in drawn.lines] == ["●"] * 4, "what lies below is open, not an end"
    of_t = await told("chain", "log", "--chain", "t", home=tmp_path, chain=chain)
    assert [id_of(line) for line in of_t.lines if id_of(line)] == [
        blocks[place].id.hex()[:10] for place in (7, 6, 2, 1)
    ]
    assert [id_of(line) for line in of_t.lines if "○" in line] == [blocks[place].id.hex()[:10] for place in (6, 1)]
    assert (await told("chain", "log", "--chain", "X", home=tmp_path, chain=chain)).code == 2


async def test_a_long_log_comes_in_pages(tmp_path, monkeypatch):
    monkeypatch.setattr("blyan_node.cli.chain.PAGE", 2)
    chain = scripted_chain()
    done = await told("chain", "log", "--json", "-n", "11", home=tmp_path, chain=chain)
    assert len(done.json["blocks"]) == 11
    assert [cut["k"] for cut in done.json["cuts"]] == [3, 2, 1]


async def test_an_empty_chain(tmp_path):
    chain = scripted_chain()
    chain.written = []
    done = await told("chain", "log", home=tmp_path, chain=chain)
    assert (done.code, done.lines) == (0, ["There is no block yet."])


async def test_a_block_with_its_records(tmp_path):
    chain = scripted_chain()
    block = next(info.block for info in chain.written if info.cut is None and info.block.records)
    for id in (block.id.hex(), block.id.hex()[:10], block.id.hex()[:20].upper()):
        done = await told("chain", "show", id, home=tmp_path, chain=chain)
        assert done.code == 0, done.err
        assert done.lines[0].split() == ["block", block.id.hex()]
    assert done.out.count("\nrecord ") == len(block.records)
    assert "tentative, VOID: the sender's balance is too small" in done.lines[-1]
    assert "amount 0.001 BLY" in done.out
    assert "after cut 99" in done.out
    shown = await told("chain", "show", block.id.hex(), "--json", home=tmp_path, chain=chain)
    assert shown.json["records"][-1]["void"] == "the sender's balance is too small"


async def test_a_cut_with_its_signers(tmp_path):
    chain = scripted_chain()
    done = await told("chain", "show", "2", home=tmp_path, chain=chain)
    assert done.code == 0, done.err
    assert done.lines[0].split() == ["cut", "2", chain.decided[1].cut.id.hex()]
    assert {line.split()[-1] for line in done.lines if line.startswith("signed by")} == {
        show_address(key.address) for key in VALIDATORS
    }
    assert "0.0000003 of 0.0000003 BLY (all stake)" in done.out
    assert (await told("chain", "show", "3", "--json", home=tmp_path, chain=chain)).json["k"] == 3


async def test_what_is_not_there(tmp_path):
    chain = scripted_chain()
    for what, code, message in (
        ("4", 1, "there is no final cut 4"),
        ("0", 1, "there is no final cut 0"),
        ("abc", 1, "neither a cut's number nor"),
        ("g" * 64, 1, "neither a cut's number nor"),
        ("0" * 10, 1, "give the whole id"),
        ("0" * 64, 4, "is not here"),
    ):
        done = await told("chain", "show", what, home=tmp_path, chain=chain)
        assert (done.code, message in done.err) == (code, True), done.err


async def test_what_strangers_wrote_does_not_reach_the_terminal_as_it_is(tmp_path):
    forge, chain = Forge(), scripted_chain()
    manifest = Manifest("\x1b[31mred\n", b"{}", ("embed",), BlobRef(bytes(32), 1))
    records = (
        make_record(KEYS[0], NETWORK, manifest, nonce=0),
        sign_record(KEYS[0], NETWORK, "\x1b]0;mine\x07", b"\x1b" * 200, nonce=1),
    )
    block = forge.block(KEYS[0], records=records, type="\x1b[2J", timestamp_ms=2**62)
    chain.written = [BlockInfo(block, None)]
    for command in (["log"], ["show", block.id.hex()]):
        done = await told("chain", *command, home=tmp_path, chain=chain)
        assert done.code == 0, done.err
        assert not [character for character in done.out if not character.isprintable() and character != "\n"]


def test_a_time_beyond_the_calendar():
    assert _when(0) == "1970-01-01T00:00:00.000+00:00"
    assert _when(2**63 - 1) == f"{2**63 - 1} ms"


async def test_validators_and_who_is_missing(tmp_path):
    chain = scripted_chain()
    here, quiet, away = (show_address(key.address) for key in sorted(VALIDATORS, key=lambda key: key.address))
    chain.heard = {}
    chain.heard[VALIDATORS[0].address] = 3
    done = await told("validators", home=tmp_path, chain=chain)
    assert done.lines[0].split("\t") == ["validator", "stake", "share", "next", "connected", "behind"]
    rows = {line.split("\t")[0]: line.split("\t")[1:] for line in done.lines[1:-1]}
    assert set(rows) == {here, quiet, away}
    assert rows[show_address(VALIDATORS[0].address)] == ["0.0000001", "33.3 %", "same", "this node", "0 cuts"]
    assert rows[show_address(VALIDATORS[1].address)] == ["0.0000001", "33.3 %", "same", "no", "-"]
    assert done.lines[-1].startswith("No quorum: 33.3 % of the stake is connected")
    for key in VALIDATORS[1:]:
        assert show_address(key.address) in done.lines[-1]
        chain.heard[key.address] = 2
    done = await told("validators", home=tmp_path, chain=chain)
    assert done.lines[-1] == "A quorum is connected: 100.0 % of the stake."
    assert "yes\t1 cut" in done.out
    assert (await told("validators", "--json", home=tmp_path, chain=chain)).json["total_nano"] == "300"


async def test_exactly_two_thirds_are_no_quorum_and_seats_come_and_go(tmp_path, monkeypatch):
    chain = scripted_chain()
    plain = chain.validators()
    seats = tuple(
        replace(seat, final=None if seat.address == VALIDATORS[2].address else 3, next_stake=0) for seat in plain.seats
    )
    seats += (Seat(KEYS[7].address, 0, 50, False, None),)
    monkeypatch.setattr(chain, "validators", lambda: Validators(plain.k, plain.deciding, seats, (KEYS[6].address,)))
    done = await told("validators", home=tmp_path, chain=chain)
    assert done.lines[-1].endswith(f"Missing: {show_address(VALIDATORS[2].address)}"), (
        "who has no stake yet is not missed"
    )
    assert "66.7 %" in done.lines[-1]
    assert f"slashed: {show_address(KEYS[6].address)}" in done.lines
    assert "\tleaves\t" in done.out
    assert "0\t0.0 %\t0.00000005\tno\t-" in done.out


@pytest.mark.parametrize("command", [["chain", "log"], ["chain", "show", "1"], ["validators"]])
def test_no_node(command, tmp_path):
    done = invoke(*command, data_dir=tmp_path)
    assert (done.code, "start it with" in done.err) == (3, True)
