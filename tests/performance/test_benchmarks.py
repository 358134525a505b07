"""The benchmarks run and print what they promise; their figures are for people, never for asserts."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks.__main__ import ALL


@pytest.mark.benchmark
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ALL)
def test_a_benchmark_runs_and_prints_its_table(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", name], check=False, capture_output=True, text=True, timeout=880
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "load" in done.stdout
    assert len(done.stdout.splitlines()) > 5


def test_an_unknown_benchmark_is_named() -> None:
    done = subprocess.run([sys.executable, "-m", "benchmarks", "nosuch"], check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"there are: {', '.join(ALL)}" in done.stderr
