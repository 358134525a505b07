"""The commands as a person runs them: real processes, against the real HTTP server over a scripted node."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from blyan_node.chain.keys import load_or_create_key
from blyan_node.cli.common import human_size, short, spans
from blyan_node.errors import BlyanError, CheckpointError, GenerationFailed, ModelUnavailable
from tests.support.commands import environment, node_in, run
from tests.support.service import ScriptedService


def test_help_imports_nothing_that_takes_time() -> None:
    probe = """
import sys
from blyan_node.cli import main
sys.argv = ['blyan-node', '--help']
try:
    main()
except SystemExit:
    print([name for name in ('torch', 'libp2p', 'plyvel', 'httpx', 'trio', 'rich') if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, env=environment())
    assert "testnet" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "command",
    [
        "start",
        "status",
        "page",
        "chat",
        "model import",
        "model list",
        "chain log",
        "chain show",
        "chain verify",
        "validators",
        "wallet new",
        "wallet show",
        "network new",
        "network join",
        "network show",
        "network restart",
        "network sign",
        "wallet import",
        "wallet export",
        "wallet balance",
        "wallet history",
        "wallet send",
        "wallet bond",
        "wallet unbond",
        "wallet faucet",
        "config show",
        "testnet up",
        "testnet status",
        "testnet down",
    ],
)
async def test_every_command_has_help_with_an_example(command: str, tmp_path: Path) -> None:
    done = await run(*command.split(), "--help", data_dir=tmp_path)
    assert done.returncode == 0
    assert b"Example: blyan-node" in done.stdout


async def test_one_question(tmp_path: Path) -> None:
    async with node_in(tmp_path) as api:
        done = await run("chat", "Hi", "--system", "Be brief.", "--route", data_dir=tmp_path)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.decode().splitlines()
        assert lines[0] == "Hello wörld!"
        assert "embed to layer.1" in lines[1]
        assert b"can read what they are given" in done.stderr
        assert [turn.role for turn in api.service.asked[0].prompt] == ["system", "user"]

        again = await run("chat", "Hi", "--json", data_dir=tmp_path)
        answer = json.loads(again.stdout)
        assert (answer["text"], answer["finish_reason"], answer["usage"]["total_tokens"]) == (
            "Hello wörld!",
            "stop",
            10,
        )
        assert again.stderr == b""  # the notice comes once


async def test_a_conversation(tmp_path: Path) -> None:
    async with node_in(tmp_path) as api:
        done = await run("chat", data_dir=tmp_path, stdin=b"one\n\ntwo\n")
        assert done.stdout.decode().splitlines() == ["Hello wörld!", "Hello wörld!", ""]
        assert [turn.content for turn in api.service.asked[1].prompt] == ["one", "Hello wörld!", "two"]


async def test_interrupting_an_answer_cancels_it(tmp_path: Path) -> None:
    async with node_in(tmp_path, ScriptedService(hang=True)) as api:
        process = await trio.lowlevel.open_process(
            [sys.executable, "-m", "blyan_node", "chat", "Hi"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(BLYAN_DATA_DIR=str(tmp_path)),
        )
        got = b""
        while b"!" not in got:
            got += await process.stdout.receive_some()
        process.send_signal(signal.SIGINT)
        assert await process.wait() == 130
        with trio.fail_after(5):
            await api.service.left.wait()
        await process.stdout.aclose()
        await process.stderr.aclose()


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (ModelUnavailable("nobody serves layer.3"), 4, "nobody serves layer.3"),
        (GenerationFailed("a stage was lost", partial=""), 4, "a stage was lost"),
    ],
)
async def test_refusals(error: BlyanError, code: int, told: str, tmp_path: Path) -> None:
    async with node_in(tmp_path, ScriptedService(before=error)):
        done = await run("chat", "Hi", data_dir=tmp_path)
        assert done.returncode == code
        assert told in done.stderr.decode()
        assert b"Traceback" not in done.stderr


async def test_status_and_models(tmp_path: Path) -> None:
    async with node_in(tmp_path):
        done = await run("status", data_dir=tmp_path)
        assert done.returncode == 0, done.stderr
        text = done.stdout.decode()
        assert "serving, up 12 s" in text
        assert "tiny: can run, 3 units" in text
        assert json.loads((await run("status", "--json", data_dir=tmp_path)).stdout)["blocks"] == 5
        listed = await run("model", "list", data_dir=tmp_path)
        assert listed.stdout.decode().splitlines() == ["model\tcontext\tstate\towner", "tiny\t512\tcan run\t0xabc"]


async def test_import(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_text("x")
    async with node_in(tmp_path):
        done = await run("model", "import", str(file), data_dir=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "Published." in done.stdout.decode()
        missing = await run("model", "import", str(tmp_path / "no.gguf"), data_dir=tmp_path)
        assert missing.returncode == 2
    async with node_in(tmp_path, ScriptedService(import_error=CheckpointError("a tensor is missing"))):
        refused = await run("model", "import", str(file), data_dir=tmp_path)
        assert refused.returncode == 4
        assert b"a tensor is missing" in refused.stderr


async def test_no_node(tmp_path: Path) -> None:
    for command in (["status"], ["chat", "Hi"], ["model", "list"]):
        done = await run(*command, data_dir=tmp_path)
        assert done.returncode == 3
        assert done.stderr.decode().count("\n") == 1
        assert "start" in done.stderr.decode()


async def test_wrong_usage_and_configuration(tmp_path: Path) -> None:
    assert (await run("bogus", data_dir=tmp_path)).returncode == 2
    for arguments in (
        ["start", "--api-port", "99999"],
        ["start", "--bootstrap", "10.0.0.1"],
        ["testnet", "down", "--dir", str(tmp_path)],
    ):
        done = await run(*arguments, data_dir=tmp_path)
        assert done.returncode == 2, done.stderr
        assert b"Traceback" not in done.stderr


async def test_wallet(tmp_path: Path) -> None:
    assert (await run("wallet", "show", data_dir=tmp_path)).returncode == 1
    load_or_create_key(tmp_path / "node.key")
    shown = json.loads((await run("wallet", "show", "--json", data_dir=tmp_path)).stdout)
    assert shown["address"].startswith("0x")
    assert shown["peer_id"].startswith("16Uiu2")


async def test_config_show(tmp_path: Path) -> None:
    shown = json.loads((await run("config", "show", "--json", data_dir=tmp_path)).stdout)
    assert shown["data_dir"] == {"value": str(tmp_path), "source": "environment"}


def test_forms_for_people() -> None:
    assert [human_size(size) for size in (None, 0, 1, 1023, 1024, 98_362_432, 2**40)] == [
        "no limit",
        "0 B",
        "1 B",
        "1023 B",
        "1.0 KiB",
        "93.8 MiB",
        "1024 GiB",
    ]
    assert spans([]) == "-"
    assert spans([3, 1, 2, 7]) == "1-3, 7"
    assert short("16Uiu2HAmABCDEFGHIJK") == "16Uiu2HA…GHIJK"
