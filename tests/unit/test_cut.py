"""Cuts, votes and certificates as bytes, and what is checked of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blyan_node.chain.cut import (
    MAX_CUT,
    MAX_HEADS,
    MAX_VOTES,
    PRECOMMIT,
    PREVOTE,
    Certificate,
    Cut,
    DoubleVote,
    Proposal,
    Signed,
    Vote,
    Votes,
    check_certificate,
    check_double_vote,
    check_proposal,
    check_vote,
    check_votes,
    double_vote,
    sign_proposal,
    sign_vote,
)
from blyan_node.chain.effects import GetVotes, InRound, LogEntry, Majority
from blyan_node.chain.genesis import MAX_VALIDATORS, Validator
from blyan_node.chain.keys import digest
from blyan_node.chain.records import MAX_MONEY
from blyan_node.chain.tendermint import abstain_after_loss
from blyan_node.chain.validators import ValidatorSet
from blyan_node.codec import MAX_INT, encode, pack, unpack
from blyan_node.errors import CodecError, RuleError, SignatureError
from tests.support.chains import KEYS, NETWORK, STRANGER

VECTORS = json.loads((Path(__file__).parent / "vectors" / "finality.json").read_text())
KEYS4 = sorted(KEYS[:4], key=lambda key: key.address)
SET = ValidatorSet.of(Validator(key.address, 10) for key in KEYS4)
CUT = Cut(1, NETWORK, (bytes([1]) * 32, bytes([2]) * 32), bytes([3]) * 32, SET.hash)


def sign(key=KEYS4[0], cut=CUT.id, *, k=1, round=0, step=PRECOMMIT, network=NETWORK):
    return sign_vote(key, network, k=k, round=round, step=step, cut=cut)


def certificate(keys=KEYS4[:3], cut=CUT, **changes):
    votes = [sign(key, cut.id, **changes) for key in keys]
    return Certificate(cut.id, 1, 0, tuple(Signed(vote.validator, vote.signature) for vote in votes))


def vectors() -> dict[str, str]:
    """What this version makes of fixed input; printed by ``python -m tests.unit.test_cut``."""
    proposal = sign_proposal(KEYS4[0], NETWORK, round=2, valid_round=0, cut=CUT)
    made = {
        "validators": pack(SET),
        "validators hash": SET.hash,
        "cut": pack(CUT),
        "cut id": CUT.id,
        "prevote": pack(sign(step=PREVOTE, round=3)),
        "precommit for nil": pack(sign(cut=None)),
        "proposal": pack(proposal),
        "votes": pack(certificate().with_cut(CUT)),
        "certificate": pack(certificate()),
        "double vote": pack(double_vote(sign(), sign(cut=None))),
        "proposers of height 7": b"".join(SET.proposers(NETWORK, 7)),
    }
    return {name: value.hex() for name, value in made.items()}


@pytest.mark.parametrize("name", sorted(VECTORS))
def test_pinned_vectors(name):
    assert vectors()[name] == VECTORS[name]


HASHES = st.binary(min_size=32, max_size=32)
ADDRESSES = st.binary(min_size=20, max_size=20)
SIGNATURES = st.binary(min_size=65, max_size=65)
INTS, ROUNDS, STEPS = st.integers(0, MAX_INT), st.integers(0, 2**31 - 1), st.integers(1, 2)
CUTS = st.builds(
    Cut, st.integers(1, MAX_INT), HASHES, st.lists(HASHES, min_size=1, max_size=4).map(tuple), HASHES, HASHES
)
SIGNED = st.lists(st.builds(Signed, ADDRESSES, SIGNATURES), min_size=1, max_size=4).map(tuple)
VOTES = st.builds(Vote, INTS, ROUNDS, STEPS, st.none() | HASHES, ADDRESSES, SIGNATURES)
PROPOSALS = st.builds(Proposal, INTS, ROUNDS, st.none() | ROUNDS, CUTS, ADDRESSES, SIGNATURES)
QUORUMS = st.builds(Votes, INTS, ROUNDS, STEPS, st.none() | CUTS, SIGNED)
MESSAGES = st.one_of(
    CUTS,
    VOTES,
    PROPOSALS,
    QUORUMS,
    st.builds(Certificate, HASHES, INTS, ROUNDS, SIGNED),
    st.builds(Majority, INTS, ROUNDS, STEPS, st.none() | HASHES),
    st.builds(GetVotes, INTS, ROUNDS, STEPS, st.none() | HASHES),
    st.builds(InRound, INTS, ROUNDS),
    st.builds(DoubleVote, VOTES, VOTES),
    st.builds(LogEntry, st.none() | PROPOSALS, st.none() | VOTES, st.none() | QUORUMS),
)


@given(MESSAGES)
@settings(max_examples=150, deadline=None)
def test_what_is_packed_unpacks(message):
    assert unpack(type(message), pack(message), most=MAX_VOTES) == message


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_garbage_is_refused(garbage):
    for kind in (Cut, Vote, Proposal, Votes, Certificate, LogEntry):
        with pytest.raises(CodecError):
            unpack(kind, garbage, most=MAX_VOTES)


def test_the_largest_messages_fit_their_bounds():
    largest = replace(CUT, k=MAX_INT, heads=tuple(bytes([i // 256, i % 256]) * 16 for i in range(MAX_HEADS)))
    signed = tuple(Signed(bytes([i]) * 20, bytes(65)) for i in range(MAX_VALIDATORS))
    assert len(pack(largest)) <= MAX_CUT
    assert len(pack(Votes(MAX_INT, 2**31 - 1, 2, largest, signed))) <= MAX_VOTES


@pytest.mark.parametrize(
    "broken",
    [
        replace(CUT, k=0),
        replace(CUT, heads=()),
        replace(CUT, heads=tuple(bytes([i // 256, i % 256]) * 16 for i in range(MAX_HEADS + 1))),
        replace(CUT, prev_cut=bytes(31)),
    ],
)
def test_a_cut_out_of_bounds_does_not_decode(broken):
    with pytest.raises(CodecError):
        unpack(Cut, pack(broken), most=2 * MAX_CUT)


@pytest.mark.parametrize(
    ("total", "enough"), [(1, 1), (2, 2), (3, 3), (4, 3), (6, 5), (7, 5), (10, 7), (MAX_MONEY, None)]
)
def test_a_quorum_is_more_than_two_thirds(total, enough):
    enough = enough or 2 * total // 3 + 1
    validators = ValidatorSet.of([Validator(bytes(20), total)])
    assert validators.is_quorum(enough)
    assert not validators.is_quorum(enough - 1)


def test_stake_counts_each_validator_once_and_no_stranger():
    a, b = KEYS4[0].address, STRANGER.address
    assert SET.stake_of([a, a, b]) == 10
    assert SET.has_honest(14)
    assert not SET.has_honest(13)


def test_the_hash_of_a_set_covers_its_members_and_their_stakes():
    one, two = SET.members[:2]
    assert ValidatorSet((one,)).hash == digest(b"blyan/validators/1", encode([[[one.address, one.stake]]]))
    sets = [ValidatorSet(members) for members in ((), (one,), (two,), (one, two), (replace(one, stake=11),))]
    assert len({each.hash for each in sets}) == 5
    assert ValidatorSet.of((two, one)).hash == ValidatorSet.of((one, two)).hash


def test_proposers_are_all_validators_and_weighted_by_stake():
    heavy = ValidatorSet.of([Validator(KEYS4[0].address, 970), *(Validator(key.address, 10) for key in KEYS4[1:])])
    first = [heavy.proposers(NETWORK, k)[0] for k in range(200)]
    assert all(sorted(heavy.proposers(NETWORK, k)) == list(heavy.stakes) for k in range(20))
    assert first.count(KEYS4[0].address) > 180
    assert len({SET.proposers(NETWORK, k) for k in range(50)}) > 5


def test_a_vote_is_bound_to_its_place():
    vote = sign()
    check_vote(vote, NETWORK)
    for changes in ({"k": 2}, {"round": 1}, {"step": PREVOTE}, {"cut": None}, {"validator": STRANGER.address}):
        with pytest.raises(SignatureError):
            check_vote(replace(vote, **changes), NETWORK)
    with pytest.raises(SignatureError):
        check_vote(vote, bytes(32))


def test_a_proposal_is_bound_to_its_place():
    proposal = sign_proposal(KEYS4[0], NETWORK, round=2, valid_round=1, cut=CUT)
    check_proposal(proposal, NETWORK)
    check_proposal(sign_proposal(KEYS4[0], NETWORK, round=0, valid_round=None, cut=CUT), NETWORK)
    for changes in ({"round": 3}, {"valid_round": 0}, {"valid_round": None}, {"cut": replace(CUT, prev_cut=bytes(32))}):
        with pytest.raises(SignatureError):
            check_proposal(replace(proposal, **changes), NETWORK)
    with pytest.raises(RuleError, match="valid_round"):
        check_proposal(sign_proposal(KEYS4[0], NETWORK, round=1, valid_round=1, cut=CUT), NETWORK)
    with pytest.raises(RuleError, match="another height"):
        check_proposal(replace(proposal, k=2), NETWORK)
    unsorted = replace(CUT, heads=CUT.heads[::-1])
    with pytest.raises(RuleError, match="sorted"):
        check_proposal(sign_proposal(KEYS4[0], NETWORK, round=0, valid_round=None, cut=unsorted), NETWORK)


def test_a_certificate_takes_more_than_two_thirds():
    check_certificate(certificate(), CUT, SET, NETWORK)
    check_certificate(certificate(KEYS4), CUT, SET, NETWORK)
    with pytest.raises(RuleError, match="no more than 2/3"):
        check_certificate(certificate(KEYS4[:2]), CUT, SET, NETWORK)


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        (lambda good: replace(good, k=2), "another cut"),
        (lambda good: replace(good, cut_id=bytes(32)), "another cut"),
        (lambda good: replace(good, round=1), "did not sign"),
        (lambda good: replace(good, signatures=good.signatures[::-1]), "sorted"),
        (lambda good: replace(good, signatures=(good.signatures[0], *good.signatures)), "twice"),
        (lambda good: certificate(sorted([*KEYS4[:3], STRANGER], key=lambda key: key.address)), "no validator"),
        (lambda good: certificate(step=PREVOTE), "did not sign"),
        (lambda good: certificate(network=bytes(32)), "did not sign"),
    ],
)
def test_a_broken_certificate_is_refused(broken, why):
    with pytest.raises(RuleError, match=why):
        check_certificate(broken(certificate()), CUT, SET, NETWORK)


def test_signatures_that_are_known_are_not_checked_again():
    good = certificate().with_cut(CUT)
    asked = []

    def recover(message_digest, signature):
        asked.append(signature)
        return next(signed.validator for signed in good.signatures if signed.signature == signature)

    check_votes(good, SET, NETWORK, recover, known=good.signatures[:2])
    assert asked == [good.signatures[2].signature]


def test_a_double_vote_is_two_votes_in_one_place():
    proof = double_vote(sign(), sign(cut=None))
    check_double_vote(proof, NETWORK)
    assert proof == double_vote(sign(cut=None), sign())
    for first, second in [
        (proof.second, proof.first),
        (sign(), sign()),
        (sign(cut=None), sign(round=1)),
        (sign(cut=None), sign(KEYS4[1])),
        (sign(cut=None, step=PREVOTE), sign()),
    ]:
        with pytest.raises(RuleError):
            check_double_vote(DoubleVote(first, second), NETWORK)
    with pytest.raises(SignatureError):
        check_double_vote(DoubleVote(proof.first, replace(proof.second, cut=bytes([9]) * 32)), NETWORK)


def test_a_lost_vote_log_is_answered_by_abstaining():
    a, b, c, lost = (key.address for key in KEYS4)
    assert abstain_after_loss({a: 7, b: 7}, SET, lost) is None
    assert abstain_after_loss({a: 7, b: 5, c: 6}, SET, lost) == 9
    for own in (lost, STRANGER.address):  # neither its own word counts nor that of one without stake
        assert abstain_after_loss({a: 7, b: 7, own: 50}, SET, lost) is None
        assert abstain_after_loss({a: 7, b: 5, c: 6, own: 50}, SET, lost) == 9


def test_a_lost_vote_log_in_a_small_or_new_network():
    a, b, c, lost = (key.address for key in KEYS4)
    assert abstain_after_loss({a: 0, b: 0, c: 0}, SET, lost) == 0, "or a network could never begin"
    pair = ValidatorSet(SET.members[:2])
    assert abstain_after_loss({}, pair, b) is None
    assert abstain_after_loss({a: 3}, pair, b) == 5, "half of stake, but all others that there are"
    assert abstain_after_loss({}, ValidatorSet(SET.members[:1]), a) == 0, "nobody else could have heard its votes"


if __name__ == "__main__":
    print(json.dumps(vectors(), indent=1))  # noqa: T201 printing is its purpose
