"""Finality: one instance of Tendermint per cut, one after the other, and what passes between peers. Sans-IO.

The shell calls :meth:`Tendermint.begin` with the final cut that stands, then feeds messages, arrivals of blocks and
the clock, and executes the effects that come back, in order. After :class:`~blyan_node.chain.effects.Decide` it
commits the cut, folds the state, and calls ``begin`` again. ``now`` is any monotonic clock in milliseconds.

Equal inputs give equal effects, so a run can be replayed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from blyan_node.chain.cut import (
    PREVOTE,
    Certificate,
    Cut,
    Proposal,
    RecoverAddress,
    Signer,
    Vote,
    Votes,
    check_proposal,
    check_vote,
    check_votes,
    double_vote,
)
from blyan_node.chain.effects import (
    Effect,
    Evidence,
    FetchCuts,
    GetVotes,
    InRound,
    LogEntry,
    Majority,
    Message,
    Send,
    SendCuts,
)
from blyan_node.chain.height import Base, Height, Timing, View
from blyan_node.chain.keys import recover_address
from blyan_node.chain.validators import ValidatorSet
from blyan_node.errors import RuleError

MAX_EARLY = 4
"""Messages of the next height that are kept for each source; its latest displace its oldest."""
MAX_EARLY_SOURCES = 256


class Tendermint:
    """See the module. Memory is bounded: by the validators, the rounds of one height, and ``MAX_EARLY``."""

    def __init__(
        self,
        network: bytes,
        view: View,
        *,
        signer: Signer | None,
        log: Iterable[LogEntry] = (),
        abstain_through: int = 0,
        timing: Timing | None = None,
        recover: RecoverAddress = recover_address,
    ) -> None:
        """Take the vote log as it was read back after a restart; without a signer, follow and never vote.

        Nothing is signed at heights up to ``abstain_through``: see :func:`abstain_after_loss`.
        """
        self.abstain_through = abstain_through
        self._network, self._view, self._signer, self._recover = network, view, signer, recover
        self._timing = Timing() if timing is None else timing
        self._log = tuple(log)
        self._early: dict[bytes, list[Vote | Proposal]] = {}
        self._height: Height | None = None
        self._told: set[bytes] = set()

    @property
    def height(self) -> Height | None:
        """The height that is being decided, or was decided last: for tests and for ``status``."""
        return self._height

    def begin(self, base: Base, now: int) -> list[Effect]:
        """Go on to the height that ``base`` describes, which the shell has committed and folded up to."""
        signer = self._signer
        if signer is not None and (base.k <= self.abstain_through or signer.address not in base.validators.stakes):
            signer = None
        log = [entry for entry in self._log if entry.place[0] == base.k]
        self._log = tuple(entry for entry in self._log if entry.place[0] > base.k)
        self._height = Height(self._network, base, self._view, signer=signer, timing=self._timing, log=log)
        self._height.advance(now)
        self._told = set()
        early, self._early = self._early, {}
        effects = self._drain()
        for source, messages in early.items():
            for message in messages:
                try:
                    effects += self.handle(message, source, now)
                except RuleError:
                    break  # its sender could not be judged when it came; what else it sent is not worth more
        return effects

    def handle(self, message: Message, source: bytes, now: int) -> list[Effect]:
        """Take a message from a peer; answers go back to ``source``.

        Raises RuleError or SignatureError where the message proves ``source`` at fault; nothing has changed then.
        """
        height = self._height
        if height is None:
            return []
        k = height.base.k
        if message.k > k:
            self._keep_early(message, source, k)
            return [FetchCuts(source, k)]
        if message.k < k or height.decided:
            return [] if isinstance(message, Votes) else [SendCuts(source, message.k)]
        replies: list[Effect]
        match message:
            case Vote():
                replies = self._on_vote(height, message, now)
            case Proposal():
                replies = self._on_proposal(height, message, source, now)
            case Votes():
                replies = self._on_votes(height, message, source, now)
            case Majority():
                replies = self._on_majority(height, message, source)
            case GetVotes():
                proof = height.proof(message.round, message.step, message.cut)
                replies = [] if proof is None else [Send(source, proof)]
            case InRound():
                mine = height.signed_in(message.round) if message.round < height.round else []
                replies = [Send(source, vote) for vote in mine]
        return replies + self._drain()

    def on_certificate(self, cut: Cut, certificate: Certificate, source: bytes, now: int) -> list[Effect]:
        """Take a cut that a peer says is final, from sync; one of another height than the current is ignored.

        Decided like any other: Decide follows once all blocks are here. Raises RuleError or SignatureError.
        """
        height = self._height
        if height is None or height.decided or cut.k != height.base.k:
            return []
        if (certificate.cut_id, certificate.k) != (cut.id, cut.k):
            raise RuleError("the certificate of another cut")
        return self.handle(certificate.with_cut(cut), source, now)

    def blocks_arrived(self, now: int) -> list[Effect]:
        """Tell that blocks joined the DAG, or that a deadline of the state machines moved."""
        if self._height is not None:
            self._height.on_blocks(now)
        return self._drain()

    def tick(self, now: int) -> list[Effect]:
        """Run the time-outs that are due."""
        if self._height is not None:
            self._height.tick(now)
        return self._drain()

    def _drain(self) -> list[Effect]:
        if self._height is None:
            return []
        effects, self._height.effects = self._height.effects, []
        return effects

    def _keep_early(self, message: Message, source: bytes, k: int) -> None:
        if message.k != k + 1 or not isinstance(message, Vote | Proposal):
            return
        if source in self._early or len(self._early) < MAX_EARLY_SOURCES:
            kept = self._early.setdefault(source, [])
            kept.append(message)
            del kept[:-MAX_EARLY]

    def _on_vote(self, height: Height, vote: Vote, now: int) -> list[Effect]:
        if vote.validator not in height.base.validators.stakes:
            raise RuleError("a vote by no validator of this height")
        ballots = height.ballots(vote.round, vote.step)
        if ballots is not None and ballots.has(vote.cut, vote.validator):
            return []
        check_vote(vote, self._network, self._recover)
        height.on_vote(vote, now)
        return self._evidence(height, vote)

    def _on_proposal(self, height: Height, proposal: Proposal, source: bytes, now: int) -> list[Effect]:
        if proposal.proposer != height.proposer(proposal.round):
            raise RuleError("a proposal by another validator than the round's proposer")
        check_proposal(proposal, self._network, self._recover)
        height.on_proposal(proposal, source, now)
        replies: list[Effect] = []
        if (since := proposal.valid_round) is not None and proposal.round == height.round:
            ballots = height.ballots(since, PREVOTE)
            if ballots is None or not ballots.has_quorum(proposal.cut.id):
                replies.append(Send(source, GetVotes(proposal.k, since, PREVOTE, proposal.cut.id)))
        return replies

    def _on_votes(self, height: Height, votes: Votes, source: bytes, now: int) -> list[Effect]:
        ballots = height.ballots(votes.round, votes.step)
        known = () if ballots is None else ballots.signatures(votes.value)
        check_votes(votes, height.base.validators, self._network, self._recover, known=known)
        before = None if ballots is None else {signed.validator for signed in known}
        height.on_votes(votes, source, now)
        replies: list[Effect] = []
        for signed in votes.signatures:
            if before is None or signed.validator not in before:
                vote = Vote(votes.k, votes.round, votes.step, votes.value, signed.validator, signed.signature)
                replies += self._evidence(height, vote)
        return replies

    def _on_majority(self, height: Height, claim: Majority, source: bytes) -> list[Effect]:
        if height.proof(claim.round, claim.step, claim.cut) is not None:
            return []
        return [Send(source, GetVotes(claim.k, claim.round, claim.step, claim.cut))]

    def _evidence(self, height: Height, vote: Vote) -> list[Effect]:
        ballots = height.ballots(vote.round, vote.step)
        rival = None if ballots is None else ballots.rival(vote.cut, vote.validator)
        if rival is None or vote.validator in self._told:
            return []
        self._told.add(vote.validator)
        other = Vote(vote.k, vote.round, vote.step, rival[0], vote.validator, rival[1])
        return [Evidence(double_vote(vote, other))]


def abstain_after_loss(final: Mapping[bytes, int], validators: ValidatorSet, lost: bytes) -> int | None:
    """Return through which height the validator ``lost``, whose vote log is lost, must abstain; None: ask more others.

    ``final`` has, by validator, the number of the last cut that it proved final to this node, with its certificate.
    Answers of more than 2/3 of stake are needed, or of all others. Let H be the highest height at which the lost log
    may hold a vote: cut H - 1 was final here, so more than 2/3 of stake precommitted at height H - 1, and at least one
    honest validator among those who answered did. It knew cut H - 2. So the highest height that they are at, K = 1 +
    the highest final cut, is at least H - 1, and abstaining through K + 1 is enough. A liar cannot raise K: it needs
    certificates. Where nothing is final yet nobody abstains, or a network could never begin.
    """
    answers = {address: k for address, k in final.items() if address in validators.stakes and address != lost}
    if not validators.is_quorum(validators.stake_of(answers)) and len(answers) < len(set(validators.stakes) - {lost}):
        return None
    last = max(answers.values(), default=0)
    return last + 2 if last else 0
