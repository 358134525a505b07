"""Storms over whole validators: no fork, no divergence, nothing acknowledged lost, an exact supply, then calm."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import storm as module
from tests.support.storm import CHEATS, Storm, Violation, storm


@pytest.mark.parametrize(
    ("seed", "validators", "cheat"), [(1, 4, "fork"), (2, 4, "vote"), (3, 4, "twin"), (4, 7, "fork")]
)
def test_a_storm_passes(seed: int, validators: int, cheat: str, tmp_path: Path) -> None:
    storm(seed, validators, cheat, tmp_path)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("cheat", CHEATS)
@pytest.mark.parametrize("validators", [4, 7])
@pytest.mark.parametrize("seed", range(10, 20))
def test_storms_pass(seed: int, validators: int, cheat: str, tmp_path: Path) -> None:
    storm(seed, validators, cheat, tmp_path)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_storm_can_be_replayed(tmp_path: Path) -> None:
    chains = []
    for time in ("first", "second"):
        ended = storm(5, 4, "vote", tmp_path / time)
        chains.append((ended.written, [record.id for record in ended.acknowledged]))
    assert chains[0] == chains[1]


def test_a_violation_tells_how_to_replay_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(self: Storm) -> None:
        raise AssertionError(f"{self.validators} validators broke a promise")

    monkeypatch.setattr(module, "CHAOS", 1.0)
    monkeypatch.setattr(Storm, "check", check)
    with pytest.raises(Violation, match=r"4 validators broke a promise\nreplay: .*tests\.support\.storm 7 4 none"):
        storm(7, 4, "none", tmp_path)
