"""The ``network`` commands: founding, inviting, joining, looking, and the way out when too much stake is gone."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from blyan_node.api.client import CannotReach, Client
from blyan_node.chain.genesis import DEVNET, Genesis, load_genesis
from blyan_node.chain.invite import Checkpoint, Invite, parse_invite
from blyan_node.chain.keys import Key, load_or_create_key, show_address
from blyan_node.chain.presets import load_preset
from blyan_node.chain.records import Transfer
from blyan_node.chain.state import State
from blyan_node.cli import network
from blyan_node.config import load_config
from blyan_node.datadir import DataDir, Running, open_data_dir
from blyan_node.errors import AlreadyRunning, ConfigError, LocalError, RequestError
from tests.support.chains import GENESIS, STRANGER
from tests.support.money import STAKES, USERS, VALIDATORS, cut, put, start
from tests.unit.cli.test_commands import run

ADDRESS = "/ip4/10.0.0.1/tcp/4001/p2p/16Uiu2HAmVHRgAfPjoP6KGTJqYgQnNd7fk9hrwqCTzhTNxrmBVPUH"
HERE = ADDRESS.replace("10.0.0.1", "127.0.0.1")
ONE, TWO = (show_address(key.address) for key in VALIDATORS[:2])
BLY = 10**9


async def test_a_network_is_founded_and_looked_at(tmp_path: Path) -> None:
    out, data = tmp_path / "genesis.toml", tmp_path / "data"
    arguments = ["network", "new", "ours", "--balance", f"{ONE}=50.5", "--out", str(out)]
    done = await run(*arguments, data_dir=data)
    assert done.returncode == 0, done.stderr
    genesis, key = load_genesis(out), load_or_create_key(data / "node.key")
    assert genesis == Genesis.make(
        "ours",
        {key.address: 1000 * BLY},
        created_ms=genesis.created_ms,
        balances={VALIDATORS[0].address: 50_500_000_000},
    )
    assert genesis.network.hex() in done.stdout.decode()
    assert (await run(*arguments, data_dir=data)).returncode == 2  # nothing is overwritten
    assert load_genesis(out) == genesis

    shown = (await run("network", "show", str(out), data_dir=data)).stdout.decode()
    assert "1050.5 of at most 1000000000 BLY" in shown
    assert f"{show_address(key.address)}\t1000\t100.0 %" in shown
    assert "restart" not in shown
    plain = json.loads((await run("network", "show", str(out), "--json", data_dir=data)).stdout)
    assert (plain["network"], plain["supply_nano"], plain["restart"]) == (genesis.network.hex(), "1050500000000", None)


def test_validators_shares_and_presets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "genesis.toml"
    network.new("big", [f"{ONE}=3000", f"{TWO}=1000"], preset="mainnet", out=out, data_dir=tmp_path / "data")
    assert load_genesis(out).parameters == load_preset("mainnet") != DEVNET
    assert not (tmp_path / "data").exists()  # its key was not needed
    network.show(out)
    said = capsys.readouterr().out
    assert f"{ONE}\t3000\t75.0 %" in said
    assert "0.00000001 BLY for each byte" in said


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"validator": [ONE]}, "write an address, =, and an amount"),
        ({"validator": [f"{ONE}=x"]}, "is not an amount of BLY"),
        ({"validator": [f"{ONE}=-1"]}, "is not an amount of BLY"),
        ({"validator": [f"{ONE[:-1]}=1"]}, "--validator: .*is not an address"),
        ({"balance": [f"{ONE}=1", f"{ONE.lower()}=1"]}, "--balance names .* twice"),
        ({"balance": [f"{ONE}=0"]}, "not a usable genesis"),
        ({"validator": [f"{ONE}=999"], "preset": "mainnet"}, "less than the least stake"),
    ],
)
def test_what_cannot_be_founded(tmp_path: Path, options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        network.new("n", **options, out=tmp_path / "g.toml", data_dir=tmp_path / "d")
    assert not (tmp_path / "g.toml").exists()


async def test_an_invite_becomes_settings_of_the_next_start(tmp_path: Path) -> None:
    invite = Invite.make(GENESIS.network, "ours\x1b[2J", (ADDRESS,), Checkpoint(12, b"\xb2" * 32))
    done = await run("network", "join", str(invite), data_dir=tmp_path / "data")
    assert done.returncode == 0, done.stderr
    assert b"\x1b" not in done.stdout
    config = load_config({"data_dir": str(tmp_path / "data")}, {}).config
    assert (config.network, config.bootstrap) == (GENESIS.network.hex(), (ADDRESS,))
    assert config.checkpoint == "12:" + "b2" * 32
    assert (tmp_path / "data").stat().st_mode & 0o777 == 0o700
    again = await run("network", "join", str(Invite.make(GENESIS.network, "n", (HERE,))), data_dir=tmp_path / "data")
    assert again.returncode == 0
    config = load_config({"data_dir": str(tmp_path / "data")}, {}).config
    assert (config.bootstrap, config.checkpoint) == ((HERE,), None)
    mistyped = await run("network", "join", str(invite)[:-1], data_dir=tmp_path / "data")
    assert (mistyped.returncode, b"copy it again" in mistyped.stderr) == (1, True)


def test_invites_that_cannot_be_followed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"with a peer id.*new one"):
        network.join(str(Invite.make(GENESIS.network, "n", (ADDRESS, "/ip4/1.2.3.4/tcp/1"))), tmp_path)
    with pytest.raises(RequestError, match="not an invite"):
        network.join(ADDRESS, tmp_path)
    GENESIS.save(DataDir(tmp_path).genesis)
    with pytest.raises(ConfigError, match=f"belongs to network test .{GENESIS.network.hex()}"):
        network.join(str(Invite.make(bytes(32), "n", (ADDRESS,))), tmp_path)
    assert not (tmp_path / "network.toml").exists()
    network.join(str(Invite.make(GENESIS.network, "n", (ADDRESS,))), tmp_path)
    assert (tmp_path / "network.toml").exists()


@pytest.mark.parametrize(
    ("final", "checkpoint"),
    [
        ({"k": 7, "cut": "b2" * 32}, Checkpoint(7, b"\xb2" * 32)),
        ({"k": 0, "cut": GENESIS.network.hex()}, None),
        (None, None),
    ],
)
def test_a_running_node_invites(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    final: dict[str, Any] | None,
    checkpoint: Checkpoint | None,
) -> None:
    def answer(_client: Client) -> dict[str, Any]:
        if final is None:
            raise CannotReach("busy")
        return {"final": final}

    monkeypatch.setattr(Client, "network", answer)
    GENESIS.save(DataDir(tmp_path).genesis)
    with open_data_dir(tmp_path) as data:
        data.make_token()
        data.publish(Running(os.getpid(), "16Uiu2alice", "http://127.0.0.1:1", (ADDRESS, HERE)))
        network.show(None, tmp_path, as_json=False)
        said = capsys.readouterr().out
        invite = parse_invite(said.split("network join ")[1])
        assert invite == Invite.make(GENESIS.network, "test", (ADDRESS, HERE), checkpoint)
        network.show(None, tmp_path, as_json=True)
        assert json.loads(capsys.readouterr().out)["invite"] == str(invite)
        data.publish(Running(os.getpid(), "16Uiu2alice", "http://127.0.0.1:1", (HERE,)))
        network.show(None, tmp_path, as_json=False)
        assert "on this machine only" in capsys.readouterr().out
    network.show(None, tmp_path, as_json=False)
    assert "while the node runs" in capsys.readouterr().out


def test_no_network_yet(tmp_path: Path) -> None:
    with pytest.raises(LocalError, match="belongs to no network yet"):
        network.show(None, tmp_path, as_json=False)
    GENESIS.save(DataDir(tmp_path).genesis)
    with pytest.raises(LocalError, match="there is no chain"):
        network.restart([ONE], tmp_path / "out", None, tmp_path)
    (tmp_path / "chain").mkdir()
    with open_data_dir(tmp_path), pytest.raises(AlreadyRunning, match="Stop that node"):
        network.restart([ONE], tmp_path / "out", None, tmp_path)


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> dict[str, State]:
    """What the stopped node knows: its state after the last final cut, whose id is 32 times 5."""
    states = {"state": cut(start(), put(USERS[0], 0, Transfer(USERS[1].address, 9))).state}
    monkeypatch.setattr(network, "_last_final", lambda _data_dir: (STAKES, b"\5" * 32, states["state"]))
    return states


def data_dir_with(key: Key, folder: Path) -> Path:
    folder.mkdir()
    (folder / "node.key").write_text(key.secret.hex())
    (folder / "node.key").chmod(0o600)
    return folder


def test_a_network_is_restarted_and_signed(
    tmp_path: Path, known: dict[str, State], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "restart.toml"
    network.restart([ONE, TWO], out, None, tmp_path)
    fresh = load_genesis(out)
    assert (fresh.name, fresh.supply, fresh.restart.k) == (STAKES.name, known["state"].supply, 1)
    for number, key in enumerate(VALIDATORS[:2]):
        network.sign(out, data_dir_with(key, tmp_path / str(number)))
    assert "66.7 % of the old stake has now" in capsys.readouterr().out
    assert (load_genesis(out), len(load_genesis(out).signatures)) == (fresh, 2)
    network.show(out, as_json=False)
    said = capsys.readouterr().out
    assert f"{STAKES.network.hex()} after its cut 1" in said
    assert "by 2 old validators with 66.7 % of the old stake" in said
    with pytest.raises(ConfigError, match="there already"):
        network.restart([ONE], out, None, tmp_path)
    with pytest.raises(ConfigError, match="is no validator"):
        network.restart([show_address(USERS[0].address)], tmp_path / "other", None, tmp_path)


def test_what_is_not_signed(tmp_path: Path, known: dict[str, State]) -> None:
    out = tmp_path / "restart.toml"
    network.restart([ONE, TWO], out, "again", tmp_path)
    written = out.read_text()
    with pytest.raises(LocalError, match=r"not signed: .* was no validator"):
        network.sign(out, data_dir_with(STRANGER, tmp_path / "stranger"))
    mine = data_dir_with(VALIDATORS[0], tmp_path / "mine")
    known["state"] = cut(known["state"]).state
    with pytest.raises(LocalError, match="last final cut here is 2"):
        network.sign(out, mine)
    STAKES.save(tmp_path / "plain.toml")
    with pytest.raises(LocalError, match="restarts no network"):
        network.sign(tmp_path / "plain.toml", mine)
    assert out.read_text() == written


def test_a_forged_signature_is_shown_as_such(tmp_path: Path, known: dict[str, State]) -> None:
    out = tmp_path / "restart.toml"
    network.restart([ONE, TWO], out, None, tmp_path)
    network.sign(out, data_dir_with(VALIDATORS[0], tmp_path / "mine"))
    out.write_text(out.read_text().replace("created_ms = 1", "created_ms = 2", 1))
    with pytest.raises(LocalError, match="do not trust this genesis"):
        network.show(out, as_json=False)
