"""Finality among simulated validators: no forks, nothing lost, an end; and each rule that this needs is missed."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import pytest

from blyan_node.chain.ballots import Ballots
from blyan_node.chain.height import Height
from blyan_node.chain.validators import ValidatorSet
from tests.support.byzantine import STYLES
from tests.support.simulator import Settings, Simulation, Violation, simulate
from tests.support.universe import Universe


def mixed(seed: int, nodes: int) -> Settings:
    """Another mixture of faults for each seed, with as many Byzantine validators as may be."""
    faulty, draw = (nodes - 1) // 3, random.Random(seed)
    twins = faulty if seed % 3 == 2 else 0
    stakes = sorted((draw.randint(8, 12) for _ in range(nodes)), reverse=not twins)  # the faulty hold the least
    return Settings(
        nodes=nodes,
        byzantine=() if twins else tuple(draw.choice(STYLES) for _ in range(faulty)),
        twins=twins,
        partitions=draw.randint(0, 6),
        crashes=draw.randint(0, 5),
        stakes=tuple(stakes) if seed % 4 == 3 else (),
    )


@pytest.mark.parametrize("nodes", [4, 7])
@pytest.mark.parametrize("seed", range(25))
def test_agreement_and_an_end(seed, nodes):
    simulate(seed, mixed(seed, nodes))


@pytest.mark.long
@pytest.mark.parametrize("nodes", [4, 7])
@pytest.mark.parametrize("seed", range(25, 275))
def test_agreement_and_an_end_at_length(seed, nodes):
    simulate(seed, mixed(seed, nodes))


@pytest.mark.parametrize("seed", range(5))
def test_honest_validators_decide_in_the_first_rounds(seed):
    net = simulate(seed, Settings(loss=0, partitions=0))
    assert net.max_round == 0
    assert net.evidence == set()


def test_twins_are_found_out():
    assert any(simulate(seed, Settings(nodes=7, twins=2)).evidence for seed in range(5))


def test_all_at_once_crash_and_go_on():
    for seed in range(5):
        net = Simulation(seed, Settings(crashes=0))
        for time in (3000, 7000, 11_000):
            net.at(time, lambda net=net: [net.crash(node) for node in net.nodes if node.alive] and None)
        net.run()
        assert net.decided


def hunt(settings: Settings, seeds: int, what: str) -> None:
    """Find a seed under which a mutant does what the rule prevents."""
    for seed in range(seeds):
        try:
            simulate(seed, settings)
        except Violation as violation:
            if what in str(violation):
                return
    pytest.fail(f"the mutant passed {seeds} seeds")


def test_the_hunts_find_nothing_in_what_is_sound():
    for seed in range(10):
        simulate(seed, Settings(nodes=7, twins=2, partitions=6))
        simulate(seed, Settings(byzantine=("leave",), partitions=6))
        simulate(seed, Settings(byzantine=("starve",)))
        simulate(seed, Settings(crashes=6))


def test_a_quorum_of_a_half_is_caught(monkeypatch):
    # At 4 validators of equal stake more than a half is 3, as more than two thirds is.
    monkeypatch.setattr(ValidatorSet, "is_quorum", lambda self, stake: 2 * stake > self.total)
    hunt(Settings(nodes=7, twins=2, partitions=6, demand_coverage=False), 200, "fork")


def test_dropping_a_conflicting_vote_is_caught(monkeypatch):
    add = Ballots.add

    def drop(self, value, signed, *, of_quorum=False):
        return self.rival(value, signed.validator) is None and add(self, value, signed)

    monkeypatch.setattr(Ballots, "add", drop)
    hunt(Settings(byzantine=("leave",), partitions=6), 50, "not final")


def test_no_coverage_rule_is_caught(monkeypatch):
    monkeypatch.setattr(Height, "_is_covered", lambda self, window: True)
    hunt(Settings(byzantine=("starve",)), 20, "cut around")


def test_no_vote_log_is_caught():
    hunt(Settings(crashes=6, vote_log=False), 60, "voted twice")


def test_acknowledging_acknowledgements_is_caught(monkeypatch):
    monkeypatch.setattr(Universe, "payload_to_acknowledge", property(lambda self: -1))
    hunt(Settings(payloads=2, chaos_ms=5000, rest_ms=10_000), 3, "rest")


def test_rounds_without_content_are_caught(monkeypatch):
    settings = Settings(loss=0, partitions=0, payloads=3, chaos_ms=60_000)
    assert max(simulate(seed, settings).max_round for seed in range(3)) <= 1
    monkeypatch.setattr(Height, "_has_something", lambda self: True)
    assert max(simulate(seed, settings).max_round for seed in range(3)) > 5


def test_a_violation_tells_how_to_replay_it(monkeypatch):
    monkeypatch.setattr(Height, "_is_covered", lambda self, window: True)
    with pytest.raises(Violation) as caught:
        simulate(0, Settings(byzantine=("starve",)))
    assert "simulate(0, Settings(byzantine=('starve',)))" in str(caught.value)


def test_a_run_does_not_depend_on_the_order_of_sets():
    program = (
        "from tests.support.simulator import *\n"
        "net = simulate(3, Settings(nodes=7, byzantine=('fork', 'split'), crashes=3))\n"
        "print(net.messages, net.now, [cut.id.hex() for cut in net.decided.values()])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for hash_seed in ("0", "1", "2")
    }
    assert len(outputs) == 1
    assert len(outputs.pop()) > 50
