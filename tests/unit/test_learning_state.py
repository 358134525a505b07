from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from random import Random
from statistics import mean, stdev

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from blyan_node.chain.deltas import Delta, EvalCommit, EvalReveal, LayerChange, Report, commitment
from blyan_node.chain.learning_state import MAX_OPEN, Outcome, Refusal, Verdict
from blyan_node.chain.records import BlobRef
from blyan_node.codec import pack, unpack
from blyan_node.errors import CodecError
from tests.support.court import MODEL, RULES, SALT, TRAINER, Court, Judge, court, measured, member, named, offer

VECTORS = json.loads((Path(__file__).parent / "vectors" / "learning.json").read_text())


def good(effect: float = 0.02) -> Judge:
    return lambda who, id, delta: measured(delta, effect, Random(who + id))


def outcomes(verdicts: list[Verdict]) -> list[Outcome]:
    return [verdict.outcome for verdict in verdicts]


def test_a_lone_delta_on_a_quiet_net_is_judged() -> None:
    net = court()
    assert not net.learning.is_due()
    id = net.submit(offer())
    assert net.learning.is_due()
    (verdict,) = net.judge({id: good()})
    assert (verdict.id, verdict.outcome, verdict.returned, verdict.burnt) == (id, Outcome.ACCEPTED, 100, 0)
    assert 15_000 < verdict.median < 25_000
    assert not net.learning.is_due()
    assert net.refused == []


def test_nobody_reports_and_it_expires_with_its_bond_back() -> None:
    net = court()
    net.submit(offer())
    (verdict,) = net.cut(8)
    assert (verdict.outcome, verdict.returned, verdict.pay) == (Outcome.EXPIRED, 100, ())


@pytest.mark.parametrize(
    ("judge", "outcome", "returned"),
    [
        (good(0.0), Outcome.REJECTED, 100),
        (good(-0.05), Outcome.REJECTED, 100),
        (good(0.004), Outcome.REJECTED, 100),
        (lambda who, id, delta: measured(delta, 0.02, Random(who), noise=0.2), Outcome.REJECTED, 100),
        (lambda who, id, delta: measured(delta, 0.02, Random(who), guard=0.011), Outcome.REJECTED, 100),
        (lambda who, id, delta: measured(delta, 0.02, Random(who), guard=0.009), Outcome.ACCEPTED, 100),
        (lambda who, id, delta: measured(delta, 0.02, Random(who), version=named("other")), Outcome.FALSE, 0),
        (lambda who, id, delta: measured(delta, 0.02, Random(who), version=named(str(who))), Outcome.REJECTED, 100),
        (lambda who, id, delta: None, Outcome.UNAVAILABLE, 90),
    ],
)
def test_what_judges_find_decides(judge: Judge, outcome: Outcome, returned: int) -> None:
    net = court()
    (verdict,) = net.judge({net.submit(offer()): judge})
    assert (verdict.outcome, verdict.returned) == (outcome, returned)


@pytest.mark.parametrize(("against", "outcome"), [(1, Outcome.ACCEPTED), (2, Outcome.REJECTED)])
def test_more_than_two_thirds_have_to_find_it_better(against: int, outcome: Outcome) -> None:
    net = court(6)

    def judge(who: bytes, id: bytes, delta: Delta) -> Report:
        return measured(delta, -0.1 if who in [member(index) for index in range(against)] else 0.02, Random(who))

    (verdict,) = net.judge({net.submit(offer()): judge})
    assert verdict.outcome is outcome


def test_records_out_of_place_have_no_effect() -> None:
    net = court()
    id = net.submit(offer())
    net.cut(2)
    report = measured(offer(), 0.02, Random(1))
    early = EvalCommit(id, commitment(member(0), id, report, SALT))
    net.carry(b"", member(0), early)
    assert net.refused == [Refusal.NOT_MEMBER]  # nobody is, yet
    net.cut()
    net.carry(b"", member(0), early)
    net.carry(b"", member(0), early)
    net.carry(b"", member(1), early)  # a copy, which it can never reveal
    net.carry(b"", TRAINER, early)
    net.carry(b"", member(0), EvalReveal(id, report, SALT))
    net.carry(b"", member(0), EvalCommit(named("nothing"), SALT))
    assert net.refused[1:] == [Refusal.TWICE, Refusal.NOT_MEMBER, Refusal.NOT_NOW, Refusal.NOT_OPEN]
    net.cut(3)
    net.carry(b"", member(2), early)
    net.carry(b"", member(1), EvalReveal(id, report, SALT))
    net.carry(b"", member(2), EvalReveal(id, report, SALT))
    net.carry(b"", member(0), EvalReveal(id, replace(report, guard_after=1), SALT))
    net.carry(b"", member(0), EvalReveal(id, report, bytes([1]) * 32))
    net.carry(b"", member(0), EvalReveal(id, report, SALT))
    net.carry(b"", member(0), EvalReveal(id, report, SALT))
    assert net.refused[5:] == [
        Refusal.NOT_NOW,
        Refusal.MISMATCH,
        Refusal.NO_COMMIT,
        Refusal.MISMATCH,
        Refusal.MISMATCH,
        Refusal.TWICE,
    ]
    net.cut(2)
    net.carry(b"", member(0), EvalReveal(id, report, SALT))
    assert net.refused[-1] is Refusal.NOT_OPEN
    assert outcomes(net.verdicts) == [Outcome.EXPIRED]


@pytest.mark.parametrize(
    ("delta", "refusal"),
    [
        (offer(size=1001), Refusal.OVERSIZED),
        (offer(bond=99), Refusal.SMALL_BOND),
        (offer(units=(4, 3)), Refusal.UNSORTED),
        (offer(units=(3, 3)), Refusal.UNSORTED),
        (replace(offer(), model=named("another")), Refusal.STALE),
        (offer(units=(11,)), Refusal.STALE),
        (replace(offer(), layers=(LayerChange(3, named("old"), BlobRef(named("x"), 1)),)), Refusal.STALE),
    ],
)
def test_a_delta_that_does_not_fit_is_refused(delta: Delta, refusal: Refusal) -> None:
    net = court()
    net.submit(delta)
    assert net.refused == [refusal]
    assert not net.learning.is_due()


def test_a_copy_is_refused_while_the_first_is_judged_and_afterwards() -> None:
    net = court()
    id = net.submit(offer())
    net.submit(offer(), trainer=member(3), id=named("copy"))
    assert net.refused == [Refusal.COPIED]
    assert outcomes(net.judge({id: good()})) == [Outcome.ACCEPTED]
    net.submit(offer(), trainer=member(3))
    assert net.refused == [Refusal.COPIED, Refusal.STALE]


def test_only_so_many_are_judged_at_once() -> None:
    net = court()
    for index in range(MAX_OPEN + 1):
        net.submit(offer(f"delta {index}"), id=named(str(index)))
    assert net.refused == [Refusal.CROWDED]


def test_of_two_on_one_base_the_better_becomes_the_head() -> None:
    net = court()
    worse, better, elsewhere = (net.submit(offer(*given)) for given in [("a",), ("b", (4, 5)), ("c", (6,))])
    verdicts = net.judge({worse: good(0.02), better: good(0.04), elsewhere: good(0.01)})
    assert {verdict.id: verdict.outcome for verdict in verdicts} == {
        better: Outcome.ACCEPTED,
        worse: Outcome.SURPASSED,
        elsewhere: Outcome.ACCEPTED,
    }
    assert all(verdict.returned == 100 for verdict in verdicts)


@pytest.mark.parametrize(("later_by", "expected"), [(2, Outcome.SURPASSED), (3, Outcome.ACCEPTED)])
def test_a_delta_waits_for_a_rival_that_was_there_before_its_judges(later_by: int, expected: Outcome) -> None:
    net = court()
    first = net.submit(offer("a"))
    net.cut(later_by)
    second = net.submit(offer("b"))
    net.cut(3 - later_by)
    said = {first: net.commit(first, good(0.02))}
    net.cut(later_by)
    said[second] = net.commit(second, good(0.04))
    net.cut(3 - later_by)
    net.reveal(first, said[first])
    net.cut(later_by)
    if second in net.learning.open:
        net.reveal(second, said[second])
    net.cut(3)
    assert {verdict.id: verdict.outcome for verdict in net.verdicts}[first] is expected
    assert len(net.verdicts) == 2


def test_weights_that_their_owner_replaces_end_a_judgement() -> None:
    net = court()
    net.submit(offer())
    net.cut(3)
    net.roots[MODEL, 4] = named("published by the owner")
    assert outcomes(net.cut()) == [Outcome.SURPASSED]


def test_the_committee_is_drawn_by_stake_without_the_trainer() -> None:
    net = Court({member(index): 1 + 20 * (index < 50) for index in range(100)})
    seats = dict.fromkeys(net.stakes, 0)
    for index in range(40):
        net.salt = str(index)
        id = net.submit(offer(f"delta {index}"), trainer=member(0))
        net.cut(3)
        assert len(net.committee(id)) == RULES.committee
        for who in net.committee(id):
            seats[who] += 1
        net.learning.open.clear()
    assert seats[member(0)] == 0
    rich = sum(seats[member(index)] for index in range(50))
    assert rich > 0.85 * sum(seats.values())


def test_where_only_the_trainer_validates_nobody_judges() -> None:
    net = court(1)
    net.submit(offer(), trainer=member(0))
    assert outcomes(net.cut(9)) == [Outcome.EXPIRED]


def test_rewards_grow_with_the_improvement_decline_and_never_pass_the_cap() -> None:
    net, paid = court(emission=10**6, emission_millionths=900_000), []
    for index in range(60):
        units = (3,)
        layers = (LayerChange(3, net.roots[MODEL, 3], BlobRef(named(f"new {index}"), 1)),)
        id = net.submit(replace(offer(f"delta {index}", units), layers=layers))
        (verdict,) = net.judge({id: good(0.4)})
        assert verdict.outcome is Outcome.ACCEPTED
        paid.append(sum(pay.amount for pay in verdict.pay))
    assert paid[0] == pytest.approx(0.9 * 0.4 * 10**6, rel=0.01)
    assert paid[1] == pytest.approx((10**6 - paid[0]) * 0.9 * 0.4, rel=0.01)
    assert sum(paid) == net.learning.emitted <= 10**6
    assert paid[-1] <= 1


def test_pay_is_split_and_who_is_far_from_the_median_gets_none() -> None:
    net = court(10)

    def judge(who: bytes, id: bytes, delta: Delta) -> Report:
        return measured(delta, 0.5 if who == member(4) else 0.02, Random(who))

    (verdict,) = net.judge({net.submit(offer()): judge})
    pays = {pay.payee: pay.amount for pay in verdict.pay}
    assert pays.keys() == {TRAINER, *(member(index) for index in range(10) if index != 4)}
    total = sum(pays.values())
    assert total == 10**15 // 100 * verdict.median // 10**6
    assert pays[member(0)] == total * 200_000 // 10**6 // 9
    assert pays[TRAINER] == total - 9 * pays[member(0)]


losses = st.integers(1, 8_000_000)


@given(st.lists(st.tuples(losses, losses), min_size=2, max_size=30), st.integers(0, 50_000))
def test_integers_judge_as_the_formula_says(batches: list[tuple[int, int]], threshold: int) -> None:
    drops = [before - after for before, after in batches]
    margin = mean(drops) - 2 * stdev(drops) / len(drops) ** 0.5 - threshold / 1e6 * mean(loss for loss, _ in batches)
    assume(abs(margin) > 1e-3)
    expected = margin > 0 and sum(drops) > 0
    assert Report(bytes(32), tuple(batches), 0, 0).passes(threshold, 0) == expected


def test_a_report_of_one_batch_or_absurd_losses_cannot_be_read() -> None:
    for report in (Report(bytes(32), ((1, 1),), 0, 0), Report(bytes(32), ((1, 10**9),) * 2, 0, 0)):
        with pytest.raises(CodecError):
            unpack(Report, pack(report), most=1000)


def vectors() -> dict[str, str]:
    """What this version makes of fixed input; printed by ``python -m tests.unit.test_learning_state``."""
    delta, report = offer(), Report(offer().version, ((3, 2), (5, 4)), 7, 7)
    committed = commitment(TRAINER, named("id"), report, SALT)
    made = {
        "delta": pack(delta),
        "version": delta.version,
        "commitment": committed,
        "commitment to nothing": commitment(TRAINER, named("id"), None, SALT),
        "commit": pack(EvalCommit(named("id"), committed)),
        "reveal": pack(EvalReveal(named("id"), report, SALT)),
    }
    net = court(40, salt="vector")
    id = net.submit(delta)
    net.cut(3)
    made["committee"] = b"".join(net.committee(id))
    return {name: value.hex() for name, value in made.items()}


def test_pinned_vectors() -> None:
    assert vectors() == VECTORS


if __name__ == "__main__":
    print(json.dumps(vectors(), indent=1))  # noqa: T201
