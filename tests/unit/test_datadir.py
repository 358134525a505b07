from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from blyan_node.datadir import DataDir, Running, explained, open_data_dir
from blyan_node.errors import AlreadyRunning, DiskFull, LocalError

HOLD = """
import sys
from pathlib import Path
from blyan_node.datadir import Running, open_data_dir
with open_data_dir(Path(sys.argv[1])) as data:
    data.publish(Running(1, "peer", "http://x", ()))
    print("held", flush=True)
    sys.stdin.read()
"""


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_directory_is_private_and_tidied(tmp_path: Path) -> None:
    root = tmp_path / "a" / "b"
    with open_data_dir(root) as data:
        assert mode_of(root) == 0o700
        token = data.make_token()
        assert len(token) >= 32
        assert mode_of(data.token) == 0o600
        assert data.make_token() == token == data.read_token()
        running = Running(os.getpid(), "16Uiu2", "http://127.0.0.1:1", ("/ip4/127.0.0.1/tcp/1/p2p/16Uiu2",))
        data.publish(running)
        assert data.running() == running
        assert data.holder() == os.getpid()
    assert data.running() is None
    assert data.holder() is None
    assert not data.state.exists()


def test_one_process_at_a_time_and_a_killed_one_leaves_nothing(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with holder:
        assert holder.stdout.readline() == b"held\n"
        assert DataDir(tmp_path).holder() == holder.pid
        assert DataDir(tmp_path).running() is not None
        with pytest.raises(AlreadyRunning, match=f"process {holder.pid}"), open_data_dir(tmp_path):
            pass
        holder.kill()
    assert DataDir(tmp_path).state.exists()
    assert DataDir(tmp_path).running() is None
    with open_data_dir(tmp_path) as data:
        assert data.running() is None


def test_secrets_that_others_may_read_are_refused(tmp_path: Path) -> None:
    with open_data_dir(tmp_path) as data:
        with pytest.raises(LocalError, match="start the node once"):
            data.read_token()
        data.make_token()
        data.token.chmod(0o644)
        with pytest.raises(LocalError, match="chmod 600"):
            data.make_token()
        data.token.write_text("")
        data.token.chmod(0o600)
        with pytest.raises(LocalError, match="empty"):
            data.read_token()


def test_what_is_not_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(LocalError, match="cannot use"), open_data_dir(tmp_path / "file"):
        pass


def test_a_damaged_state_file(tmp_path: Path) -> None:
    with open_data_dir(tmp_path) as data:
        data.state.write_text("{")
        with pytest.raises(LocalError, match="restart the node"):
            data.running()


@pytest.mark.parametrize(
    ("number", "kind", "told"),
    [
        (errno.ENOSPC, DiskFull, "no space left"),
        (errno.EACCES, LocalError, "no permission"),
        (errno.EROFS, LocalError, "no permission"),
        (errno.EIO, LocalError, "cannot use"),
    ],
)
def test_errors_of_the_disk_are_explained(number: int, kind: type[LocalError], told: str) -> None:
    with pytest.raises(kind, match=told), explained(Path("/x")):
        raise OSError(number, os.strerror(number))
