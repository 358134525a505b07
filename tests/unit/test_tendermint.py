"""The core of finality by itself: what it answers to one message, one arrival, one time-out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from blyan_node.chain.ballots import KEPT
from blyan_node.chain.cut import (
    PRECOMMIT,
    PREVOTE,
    Certificate,
    Cut,
    Proposal,
    Signed,
    Vote,
    Votes,
    check_certificate,
    sign_proposal,
    sign_vote,
)
from blyan_node.chain.effects import (
    Broadcast,
    Decide,
    Diverged,
    Evidence,
    FetchBlocks,
    FetchCuts,
    GetVotes,
    InRound,
    LogEntry,
    Majority,
    ScheduleTimeout,
    Send,
    SendCuts,
    SyncVoteLog,
)
from blyan_node.chain.genesis import Validator
from blyan_node.chain.height import Base, Timing, Window
from blyan_node.chain.tendermint import MAX_EARLY, Tendermint
from blyan_node.chain.validators import ValidatorSet
from blyan_node.errors import RuleError, SignatureError
from tests.support.universe import NETWORK, FastSigner, address, fast_recover

TIMING = Timing()
SET = ValidatorSet.of(Validator(address(i), 10) for i in range(4))
ORDER = SET.proposers(NETWORK, 1)
A, B, C, D = ORDER  # A proposes in round 0, B in round 1, …
BASE = Base(1, NETWORK, (NETWORK,), bytes([7]) * 32, SET.hash, SET)
STRANGER = bytes([99]) * 20
GOOD = Window(ordered=True, content=True, anchored=frozenset(ORDER[:3]))
EMPTY = Window(ordered=True, content=False, anchored=frozenset())
HOUR = 3_600_000


def head(number):
    return bytes([number]) * 32


def cut(number, **changes):
    return replace(Cut(1, NETWORK, (head(number),), BASE.state_root, SET.hash), **changes)


X, Y = cut(1), cut(2)


class StubView:
    """Every set of heads is good unless told otherwise; ``current`` are the heads to propose."""

    def __init__(self):
        self.current = (head(1),)
        self.windows = {}

    def heads(self, base):
        return self.current

    def window(self, base, heads):
        return self.windows.get(heads, GOOD)


def core(who=D, *, view=None, base=BASE, **options):
    made = Tendermint(
        NETWORK, view or StubView(), signer=FastSigner(who), timing=TIMING, recover=fast_recover, **options
    )
    made.first = made.begin(base, 0)
    return made


def vote(who, value, *, round=0, step=PREVOTE, k=1):
    id = value.id if isinstance(value, Cut) else value
    return sign_vote(FastSigner(who), NETWORK, k=k, round=round, step=step, cut=id)


def propose(value=X, *, round=0, valid_round=None, who=None):
    return sign_proposal(FastSigner(who or ORDER[round % 4]), NETWORK, round=round, valid_round=valid_round, cut=value)


def quorum(value, *, round=0, step=PREVOTE, voters=(A, B, C)):
    signed = sorted((v.validator, v.signature) for v in (vote(who, value, round=round, step=step) for who in voters))
    return Votes(1, round, step, value, tuple(Signed(*item) for item in signed))


def said(effects):
    return [effect.message for effect in effects if isinstance(effect, Broadcast)]


def votes_in(effects):
    return [(message.round, message.step, message.cut) for message in said(effects) if isinstance(message, Vote)]


def of(kind, effects):
    return [effect for effect in effects if isinstance(effect, kind)]


def feed(made, *messages, now=0):
    return [effect for message in messages for effect in made.handle(message, ORDER[0], now)]


def run_clock(made, start, end):
    """Tick every 50 ms."""
    return [effect for now in range(start, end, 50) for effect in made.tick(now)]


# One height without faults


def test_four_cores_decide_one_cut():
    cores = {who: core(who) for who in ORDER}
    waiting = [(who, effect) for who, made in cores.items() for effect in made.first]
    decided = {}
    while waiting:
        who, effect = waiting.pop(0)
        if isinstance(effect, Broadcast):
            for other, made in cores.items():
                if other != who:
                    waiting += [(other, reply) for reply in made.handle(effect.message, who, 10)]
        elif isinstance(effect, Decide):
            decided[who] = effect
    assert {effect.cut for effect in decided.values()} == {X}
    assert len(decided) == 4
    for effect in decided.values():
        check_certificate(effect.certificate, X, SET, NETWORK, fast_recover)


def test_what_is_signed_is_logged_before_it_is_said():
    proposer = core(A)
    effects = proposer.first + feed(proposer, vote(B, X), vote(C, X))
    signed = [effect for effect in effects if isinstance(effect, SyncVoteLog | Broadcast)]
    assert len(signed) == 6
    for logged, sent in zip(signed[::2], signed[1::2], strict=True):
        assert (logged.entry.proposal or logged.entry.vote) == sent.message
    assert [logged.entry.place for logged in signed[::2]] == [(1, 0, 0), (1, 0, PREVOTE), (1, 0, PRECOMMIT)]
    assert signed[4].entry.polka == quorum(X)


@pytest.mark.parametrize(
    ("value", "window"),
    [
        (cut(1, prev_state_root=bytes(32)), GOOD),
        (cut(1, next_validators_hash=bytes(32)), GOOD),
        (cut(1, prev_cut=bytes(32)), GOOD),
        (X, replace(GOOD, ordered=False)),
        (X, replace(GOOD, content=False)),
        (X, replace(GOOD, anchored=frozenset(ORDER[:2]))),
        (X, replace(GOOD, anchored=frozenset([*ORDER[:2], STRANGER]))),
    ],
)
def test_an_invalid_cut_gets_no_vote(value, window):
    view = StubView()
    view.current = (head(9),)
    view.windows[value.heads] = window
    assert votes_in(feed(core(view=view), propose(value))) == [(0, PREVOTE, None)]


def test_a_valid_cut_gets_a_vote():
    assert votes_in(feed(core(), propose(X))) == [(0, PREVOTE, X.id)]
    assert votes_in(feed(core(), propose(Y))) == [(0, PREVOTE, Y.id)]


def test_a_cut_counts_as_received_when_its_blocks_are_here():
    view = StubView()
    view.windows[Y.heads] = Window(missing=(head(5),))
    made = core(view=view)
    effects = feed(made, propose(Y))
    assert of(FetchBlocks, effects) == [FetchBlocks((head(5),), A)]
    assert votes_in(effects) == []
    view.windows[Y.heads] = GOOD
    assert votes_in(made.blocks_arrived(100)) == [(0, PREVOTE, Y.id)]


def test_a_decision_waits_for_the_blocks():
    view = StubView()
    view.windows[Y.heads] = Window(missing=(head(5),))
    made = core(view=view)
    certificate = Certificate(Y.id, 1, 4, quorum(Y, round=4, step=PRECOMMIT).signatures)
    effects = made.on_certificate(Y, certificate, B, 0)
    assert (of(FetchBlocks, effects), of(Decide, effects)) == ([FetchBlocks((head(5),), B)], [])
    view.windows[Y.heads] = GOOD
    assert of(Decide, made.blocks_arrived(1)) == [Decide(Y, certificate)]


def test_what_was_decided_but_is_invalid_here_stops_the_node():
    bad = cut(1, prev_state_root=bytes(32))
    made = core()
    certificate = Certificate(bad.id, 1, 0, quorum(bad, step=PRECOMMIT).signatures)
    assert of(Diverged, made.on_certificate(bad, certificate, B, 0)) == [Diverged(bad, certificate)]
    assert run_clock(made, 0, 10_000) == []


def test_a_follower_without_a_key_decides_and_says_nothing():
    made = Tendermint(NETWORK, StubView(), signer=None, timing=TIMING, recover=fast_recover)
    effects = made.begin(BASE, 0) + feed(made, propose(X), quorum(X), quorum(X, step=PRECOMMIT))
    assert [effect.cut for effect in of(Decide, effects)] == [X]
    assert of(SyncVoteLog, effects) == of(Broadcast, effects) == []


# Time-outs


def test_a_missing_proposal_costs_one_round():
    made = core()
    effects = run_clock(made, 0, TIMING.propose + 50)
    assert votes_in(effects)[:1] == [(0, PREVOTE, None)]
    effects = feed(made, vote(A, None), vote(B, None), now=2000)
    assert (0, PRECOMMIT, None) in votes_in(effects)
    feed(made, vote(A, None, step=PRECOMMIT), vote(B, None, step=PRECOMMIT), now=2000)
    run_clock(made, 2000, 2000 + TIMING.precommit + 50)
    assert made.height.round == 1


def test_later_rounds_wait_longer():
    made = core()
    feed(made, vote(A, None, round=5), vote(B, None, round=5))
    assert made.height.round == 5
    assert TIMING.of(0, 5) == TIMING.propose + 5 * TIMING.step
    assert (5, PREVOTE, None) not in votes_in(run_clock(made, 0, TIMING.of(0, 5)))
    assert (5, PREVOTE, None) in votes_in(run_clock(made, TIMING.of(0, 5), TIMING.of(0, 5) + 50))


def test_idle_rounds_do_not_inflate_time_outs():
    view = StubView()
    view.windows[view.current] = EMPTY
    made = core(A, view=view)
    assert made.first == []
    assert run_clock(made, 0, HOUR) == []
    view.current = (head(2),)
    effects = made.blocks_arrived(HOUR)
    assert [message.cut for message in said(effects) if isinstance(message, Proposal)] == [Y]
    assert made.height.round == 0
    assert HOUR + TIMING.propose in [effect.at for effect in of(ScheduleTimeout, effects)]


def test_a_bad_proposal_on_a_quiet_net_moves_nobody():
    view = StubView()
    view.windows[view.current] = EMPTY
    made = core(view=view)
    assert feed(made, propose(X)) == []
    assert run_clock(made, 0, HOUR // 10) == []


def test_what_matters_is_sent_again():
    made = core()
    feed(made, propose(X))
    again = said(made.tick(TIMING.resend))
    assert again == [InRound(1, 0), propose(X), vote(D, X)]
    feed(made, vote(A, X), vote(B, X))
    assert Majority(1, 0, PREVOTE, X.id) in said(made.tick(2 * TIMING.resend))


# Rounds and locks


def locked_on(value=X, who=D):
    made = core(who)
    effects = feed(made, propose(value), vote(A, value), vote(C, value))
    assert (0, PRECOMMIT, value.id) in votes_in(effects)
    return made


def to_round(made, round, voters=(A, C)):
    return feed(made, *(vote(who, None, round=round, step=PRECOMMIT) for who in voters))


def test_a_lock_holds_against_a_new_cut():
    made = locked_on()
    to_round(made, 1)
    assert (1, PREVOTE, None) in votes_in(feed(made, propose(Y, round=1)))


def test_a_lock_allows_its_own_cut():
    made = locked_on()
    to_round(made, 1)
    assert (1, PREVOTE, X.id) in votes_in(feed(made, propose(X, round=1)))


def test_a_lock_yields_to_a_later_quorum_only():
    made = locked_on()
    to_round(made, 2)
    assert votes_in(feed(made, propose(Y, round=2, valid_round=1))) == []
    assert (2, PREVOTE, Y.id) in votes_in(feed(made, quorum(Y, round=1)))
    made = locked_on(Y)
    to_round(made, 1)
    feed(made, propose(Y, round=1), vote(A, Y, round=1), vote(B, Y, round=1))  # locked on Y again, in round 1
    to_round(made, 2)
    assert (2, PREVOTE, None) in votes_in(feed(made, propose(X, round=2, valid_round=0), quorum(X)))


def test_a_proposal_of_an_old_cut_brings_or_asks_for_its_quorum():
    made = core()
    to_round(made, 1)
    effects = made.handle(propose(Y, round=1, valid_round=0), B, 0)
    assert of(Send, effects) == [Send(B, GetVotes(1, 0, PREVOTE, Y.id))]
    proposer = locked_on(X, B)
    sent = said(to_round(proposer, 1))
    place = next(i for i, message in enumerate(sent) if isinstance(message, Proposal))
    assert (sent[place].cut, sent[place].valid_round) == (X, 0)
    assert isinstance(sent[place + 1], Votes)
    assert sent[place + 1].value == X.id


def test_rounds_are_skipped_behind_one_honest_validator():
    made = core()
    feed(made, vote(A, None, round=7))
    assert made.height.round == 0
    feed(made, vote(B, None, round=3))
    assert made.height.round == 3  # A and B are in 3 or later, so an honest one is
    assert made.height.ballots(1_000_000, PREVOTE) is None


def test_a_late_precommit_of_an_old_round_decides():
    made = core()
    feed(made, propose(X))
    to_round(made, 1)
    messages = [vote(who, X, step=PRECOMMIT) for who in (A, B, C)]
    assert [effect.cut for effect in of(Decide, feed(made, *messages))] == [X]


# Double votes


def test_a_dropped_conflicting_vote_would_lose_liveness():
    """A and B locked with C's vote for the cut; C told D nil before, and is gone. D must come to believe A and B."""
    made = core()
    feed(made, vote(C, None), propose(X), vote(A, X), vote(B, X), vote(C, X))
    assert made.height.locked == (0, X)
    made = core(D)
    feed(made, vote(C, None), vote(A, X), vote(B, X), vote(C, X))  # the proposal was lost
    to_round(made, 1)
    assert (1, PREVOTE, X.id) in votes_in(feed(made, propose(X, round=1, valid_round=0)))


def test_votes_are_kept_for_three_values_and_for_any_that_had_a_quorum():
    made = core()
    for number in range(10):
        feed(made, vote(C, head(50 + number)))
    feed(made, vote(C, X), vote(A, X), vote(B, X))
    ballots = made.height.ballots(0, PREVOTE)
    assert sum(ballots.has(head(50 + number), C) for number in range(10)) == KEPT
    assert not ballots.has_quorum(X.id)
    claim = Majority(1, 0, PREVOTE, X.id)
    (ask,) = of(Send, made.handle(claim, A, 0))
    assert ask == Send(A, GetVotes(1, 0, PREVOTE, X.id))
    knows = core(A)  # which proposed it
    feed(knows, vote(B, X), vote(C, X))
    (answer,) = of(Send, knows.handle(ask.message, D, 0))
    assert answer == Send(D, quorum(X))
    made.handle(answer.message, A, 0)
    assert ballots.has_quorum(X.id)
    assert made.handle(claim, A, 0) == []


def test_a_double_vote_is_told_once():
    made = core()
    effects = feed(made, vote(A, X), vote(A, Y), vote(A, None), vote(A, Y))
    (evidence,) = of(Evidence, effects)
    assert {evidence.proof.first.cut, evidence.proof.second.cut} == {X.id, Y.id}


def test_an_equivocating_proposer_cannot_hide_what_others_heard():
    made = core()
    feed(made, propose(X))
    assert votes_in(feed(made, propose(Y))) == []
    assert (0, PRECOMMIT, Y.id) in votes_in(feed(made, quorum(Y)))
    assert of(Decide, feed(made, quorum(Y, step=PRECOMMIT)))


# Restarts


def entries(effects):
    return [effect.entry for effect in of(SyncVoteLog, effects)]


def test_a_restart_never_contradicts_the_log():
    first = core(A)
    log = entries(first.first)
    view = StubView()
    view.current = (head(2),)
    again = core(A, view=view, log=log)
    effects = again.first + run_clock(again, 0, 20_000)
    signed = {(m.round, m.step): m.cut for m in said(effects) if isinstance(m, Vote) and m.round == 0}
    assert signed[0, PREVOTE] == X.id
    assert {m.cut for m in said(effects) if isinstance(m, Proposal)} == {X}
    assert [entry for entry in entries(effects) if entry.place in {old.place for old in log}] == []


def test_a_crash_between_proposal_and_prevote_proposes_nothing_else():
    log = entries(core(A).first)[:1]
    view = StubView()
    view.current = (head(2),)
    again = core(A, view=view, log=log)
    assert votes_in(again.first) == [(0, PREVOTE, X.id)]
    assert {m.cut for m in said(again.first + again.tick(1000)) if isinstance(m, Proposal)} == {X}


def test_a_restart_gives_back_the_lock_and_its_quorum():
    made = core(B)
    log = entries(made.first + feed(made, propose(X), vote(A, X), vote(C, X)))
    again = core(B, log=log)
    assert again.height.locked == again.height.valid == (0, X)
    (answer,) = again.handle(GetVotes(1, 0, PREVOTE, X.id), D, 0)
    assert answer == Send(D, quorum(X))
    effects = to_round(again, 1)
    (proposal,) = (message for message in said(effects) if isinstance(message, Proposal))
    assert (proposal.cut, proposal.valid_round) == (X, 0)
    assert Broadcast(quorum(X)) in effects


def test_the_log_of_another_height_is_not_taken():
    old = entries(core(A).first)
    later = replace(BASE, k=2, prev_cut=X.id)
    assert core(A, base=later, log=old).height.signed_in(0) == []


def test_abstaining_signs_nothing_until_it_is_over():
    made = core(A, abstain_through=1)
    effects = made.first + feed(made, propose(X), vote(B, X), vote(C, X)) + run_clock(made, 0, 10_000)
    assert of(SyncVoteLog, effects) == []
    effects = feed(made, quorum(X, step=PRECOMMIT, voters=(B, C, D)))
    assert of(Decide, effects)
    proposer = SET.proposers(NETWORK, 2)[0]
    made = core(proposer, abstain_through=1)
    assert entries(made.begin(replace(BASE, k=2, prev_cut=X.id), 0))


# Peers


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (vote(STRANGER, X), RuleError),
        (replace(vote(A, X), cut=Y.id), SignatureError),
        (propose(X, who=B), RuleError),
        (replace(propose(X), cut=Y), SignatureError),
        (propose(X, round=1, valid_round=1), RuleError),
        (propose(cut(1, heads=(head(2), head(1)))), RuleError),
        (quorum(X, voters=(A, B)), RuleError),
        (replace(quorum(X), signatures=quorum(X).signatures[::-1]), RuleError),
        (replace(quorum(X), round=1), SignatureError),
        (quorum(X, voters=(A, B, STRANGER)), RuleError),
    ],
)
def test_a_message_that_proves_its_sender_at_fault(message, error):
    made = core()
    with pytest.raises(error):
        made.handle(message, A, 0)
    assert made.height.ballots(message.round, PREVOTE) is None or not made.height.ballots(message.round, PREVOTE).stake
    assert made.height.cuts == {}


def test_peers_at_other_heights():
    later = replace(BASE, k=5)
    made = core(base=later)
    assert made.handle(vote(A, X, k=3), A, 0) == [SendCuts(A, 3)]
    assert made.handle(InRound(4, 0), A, 0) == [SendCuts(A, 4)]
    assert made.handle(vote(A, X, k=9), A, 0) == [FetchCuts(A, 5)]


def test_votes_of_the_next_height_wait_in_bounds():
    made = core()
    for number in range(100):
        made.handle(vote(A, head(number), k=2), A, 0)
    made.handle(vote(A, X, k=2), A, 0)
    made.handle(vote(STRANGER, X, k=2), STRANGER, 0)
    feed(made, propose(X), quorum(X, step=PRECOMMIT))
    made.begin(replace(BASE, k=2, prev_cut=X.id), 0)
    ballots = made.height.ballots(0, PREVOTE)
    assert [number for number in range(100) if ballots.has(head(number), A)] == [101 - MAX_EARLY, 98, 99]


def test_a_peer_in_an_earlier_round_hears_what_was_said_there_and_answers_end():
    made = core()
    feed(made, propose(X))
    to_round(made, 1)
    assert made.handle(InRound(1, 0), B, 0) == [Send(B, vote(D, X))]
    assert made.handle(InRound(1, 1), B, 0) == []
    assert of(Send, made.handle(vote(B, X), B, 0)) == []  # a vote alone calls for no vote


def test_a_peer_that_asks_after_the_decision_gets_the_cut():
    made = core()
    feed(made, propose(X), quorum(X, step=PRECOMMIT))
    assert made.handle(InRound(1, 0), B, 0) == [SendCuts(B, 1)]
    assert made.handle(quorum(X), B, 0) == []


def test_who_is_absent_is_known():
    made = core()
    feed(made, vote(A, X))
    assert set(made.height.absent()) == {B, C}


def test_log_entries_have_one_place_each():
    assert LogEntry(propose(X, round=4), None, None).place == (1, 4, 0)
    assert LogEntry(None, vote(A, X, round=4, step=PRECOMMIT), None).place == (1, 4, PRECOMMIT)
