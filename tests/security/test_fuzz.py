"""Decoders under fire: whatever the bytes, a documented error or a value that encodes to the same bytes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from blyan_node.errors import RuleError
from tests.support import fuzzing
from tests.support.fuzzing import Target, fuzz, make_input, methods, targets

QUICK, LONG = 20_000, 1_000_000


def share(total: int) -> int:
    return -(-total // len(targets()))


@pytest.mark.parametrize("name", targets())
def test_well_formed_samples_are_taken(name):
    target = targets()[name]
    assert target.samples
    if name != "state":  # one row is no state
        assert all(target.run(sample) for sample in target.samples)


def test_every_message_of_the_relay_is_a_target():
    named = {cls.__name__ for method in methods() for cls in (method.request, method.response)}
    assert named <= targets().keys()
    assert len(methods()) >= 8


@pytest.mark.parametrize("name", targets())
def test_a_few_inputs(name):
    taken = fuzz(name, range(share(QUICK)))
    if name not in ("state", "invite", "Told", "GetGenesis"):  # mutations of these are hardly ever well formed
        assert taken > 0, "some inputs have to come past the decoder"


@pytest.mark.long
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", targets())
def test_a_million_inputs_in_all(name):
    fuzz(name, range(share(QUICK), share(QUICK) + share(LONG)))


def test_inputs_differ_and_can_be_replayed():
    inputs = [make_input("block", number) for number in range(200)]
    assert inputs == [make_input("block", number) for number in range(200)]
    assert len(set(inputs)) > 150


def test_what_breaks_a_decoder_is_told_with_the_way_to_replay_it(monkeypatch):
    def read(data: bytes) -> bytes:
        if len(data) == 40:
            raise KeyError("a bug")
        raise RuleError("wrong")

    monkeypatch.setitem(targets(), "cut", Target(read, bytes, targets()["cut"].samples))
    with pytest.raises(AssertionError, match=r"KeyError: 'a bug'\nreplay: .*fuzzing 'cut' \d+"):
        fuzz("cut", range(1000))


def test_what_does_not_come_back_as_it_was_is_told(monkeypatch):
    monkeypatch.setitem(targets(), "cut", Target(lambda data: data, lambda data: data[:3], targets()["cut"].samples))
    with pytest.raises(AssertionError, match="which encodes to"):
        fuzz("cut", range(1000))


def test_the_command_replays_one_input():
    root = Path(fuzzing.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.fuzzing", "Since", "7"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[0] == make_input("Since", 7).hex()
