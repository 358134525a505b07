"""What consensus signs is what the ledger punishes: the two halves of the chain agree on a vote, byte for byte."""

from __future__ import annotations

import pytest

from blyan_node.chain.cut import Vote, sign_vote, vote_payload
from blyan_node.chain.evidence import check_evidence
from blyan_node.chain.keys import Key
from blyan_node.chain.records import Evidence, Signed
from blyan_node.errors import RuleError

KEY, NETWORK = Key(bytes([9] * 32)), bytes([1] * 32)
ONE, OTHER = bytes([2] * 32), bytes([3] * 32)


def shown(vote: Vote) -> Signed:
    return Signed(vote_payload(NETWORK, vote.k, vote.round, vote.step, vote.cut), vote.signature)


def test_two_votes_of_one_validator_in_one_step_convict_it() -> None:
    votes = [sign_vote(KEY, NETWORK, k=4, round=1, step=2, cut=cut) for cut in (ONE, OTHER)]
    assert check_evidence(Evidence("double-vote", *map(shown, votes)), NETWORK) == KEY.address


@pytest.mark.parametrize("change", [{"k": 5}, {"round": 2}, {"step": 1}, {"cut": ONE}])
def test_votes_that_one_may_cast_convict_nobody(change: dict[str, object]) -> None:
    place: dict[str, object] = {"k": 4, "round": 1, "step": 2}
    first = sign_vote(KEY, NETWORK, **place, cut=ONE)  # type: ignore[arg-type]
    second = sign_vote(KEY, NETWORK, **{**place, "cut": OTHER, **change})  # type: ignore[arg-type]
    with pytest.raises(RuleError):
        check_evidence(Evidence("double-vote", shown(first), shown(second)), NETWORK)
