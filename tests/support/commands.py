"""The commands as a person runs them, over a scripted node: as real processes, or quicker, within this one."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio

from blyan_node.cli import main
from blyan_node.datadir import Running, open_data_dir
from tests.support.api import TOKEN, Served, served
from tests.support.service import ScriptedService


def environment(**more: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("BLYAN_")} | more


async def run(*arguments: str, data_dir: Path, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return await trio.run_process(
        [sys.executable, "-m", "blyan_node", *arguments],
        capture_stdout=True,
        capture_stderr=True,
        check=False,
        stdin=stdin,
        env=environment(BLYAN_DATA_DIR=str(data_dir)),
    )


@asynccontextmanager
async def node_in(tmp_path: Path, service: ScriptedService | None = None) -> AsyncIterator[Served]:
    async with served(service) as api:
        with open_data_dir(tmp_path) as data:
            data.token.write_text(TOKEN)
            data.token.chmod(0o600)
            data.publish(Running(os.getpid(), "16Uiu2alice", api.url, ()))
            yield api


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()


def invoke(*arguments: str, data_dir: Path, stdin: str = "", **variables: str) -> Done:
    """Run a command in this process, one at a time. ``stdin`` is no terminal."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("BLYAN_")]:
            patch.delenv(name)
        for name, value in {"BLYAN_DATA_DIR": str(data_dir), **variables}.items():
            patch.setenv(name, value)
        patch.setattr(sys, "argv", ["blyan-node", *arguments])
        patch.setattr(sys, "stdin", io.StringIO(stdin))
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        code: object = 0
        try:
            main()
        except SystemExit as left:
            code = left.code or 0
    return Done(code if isinstance(code, int) else 1, out.getvalue(), err.getvalue())


async def ask(*arguments: str, data_dir: Path, stdin: str = "", **variables: str) -> Done:
    """Run a command in this process, in a thread, beside the node that it talks to."""
    return await trio.to_thread.run_sync(lambda: invoke(*arguments, data_dir=data_dir, stdin=stdin, **variables))
