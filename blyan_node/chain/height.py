"""One height of Tendermint (Buchman, Kwon, Milosevic, arXiv 1807.04938, algorithm 1), which decides one cut. Sans-IO.

The comments ``L28`` and the like name the lines of that algorithm. What differs, and why:

- A round's clock starts only while there is something to decide: a valid cut that was proposed, or that could be. A
  quiet net runs no rounds, so idleness cannot inflate the time-outs of later rounds.
- A value with a quorum in a round counts as proposed there, whoever brought it: an equivocating proposer cannot keep
  those who heard its other proposal from following the rest.
- f + 1 validators in rounds of at least ``r`` suffice to skip to ``r`` (L55 wants them in the same round): one honest
  validator is there, and every one that lags behind catches up however far the others are spread.
- Messages are sent again while the height is undecided: the algorithm assumes that what one honest process has
  received, all receive in the end.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from blyan_node.chain.ballots import Ballots
from blyan_node.chain.cut import (
    PRECOMMIT,
    PREVOTE,
    Certificate,
    Cut,
    Proposal,
    Signed,
    Signer,
    Vote,
    Votes,
    sign_proposal,
    sign_vote,
)
from blyan_node.chain.effects import (
    Broadcast,
    Decide,
    Diverged,
    Effect,
    FetchBlocks,
    InRound,
    LogEntry,
    Majority,
    ScheduleTimeout,
    SyncVoteLog,
)
from blyan_node.chain.validators import ValidatorSet

PROPOSE = 0
RESEND = -1
ROUNDS_KEPT = 16
"""Rounds behind the current one whose votes are kept; a quorum in an older one still comes as ``Votes``."""


@dataclass(frozen=True)
class Base:
    """What the cut of height ``k`` stands on: the final cut before it, the state there, and who decides.

    ``state_root`` is that of the state after cut ``k - 1``; ``next_validators_hash`` follows from that state.
    """

    k: int
    prev_cut: bytes
    prev_heads: tuple[bytes, ...]
    state_root: bytes
    next_validators_hash: bytes
    validators: ValidatorSet


@dataclass(frozen=True)
class Window:
    """What the DAG says of a proposed cut: W is the past of its heads without the past of the previous cut.

    Where ``missing`` names blocks that are not here the rest means nothing. ``ordered``: the heads are an antichain,
    and their past contains that of the previous heads. ``content``: a block that carries records lies in W, or a
    deadline of the state machines falls due at this cut. ``anchored``: the authors of blocks in W that are anchored
    at the previous cut.
    """

    missing: tuple[bytes, ...] = ()
    ordered: bool = False
    content: bool = False
    anchored: frozenset[bytes] = frozenset()


class View(Protocol):
    """What consensus asks of the DAG and the state. Pure: the same DAG, base and heads give the same answer."""

    def heads(self, base: Base) -> tuple[bytes, ...]:
        """Return the heads of the cut to propose now: sorted, at most 512, an antichain above the previous cut."""
        ...

    def window(self, base: Base, heads: tuple[bytes, ...]) -> Window:
        """Examine the heads of a cut; never changes once nothing is missing."""
        ...


@dataclass(frozen=True)
class Timing:
    """Milliseconds. The time-outs of round ``r`` are longer by ``r`` times ``step``, so some round is long enough."""

    propose: int = 1500
    prevote: int = 750
    precommit: int = 750
    step: int = 500
    resend: int = 1000

    def of(self, step: int, round: int) -> int:
        """Return the time-out of a step in a round."""
        base = {PROPOSE: self.propose, PREVOTE: self.prevote, PRECOMMIT: self.precommit}[step]
        return base + round * self.step


@dataclass
class RoundState:
    """What was heard in one round. ``waiting`` are the steps whose time-outs run or ran."""

    prevotes: Ballots
    precommits: Ballots
    proposal: Proposal | None = None
    waiting: set[int] = field(default_factory=set)
    polka_seen: bool = False


class Height:
    """See the module. Takes messages whose signatures were checked; gathers effects in ``effects``."""

    def __init__(
        self,
        network: bytes,
        base: Base,
        view: View,
        *,
        signer: Signer | None,
        timing: Timing,
        log: Iterable[LogEntry] = (),
    ) -> None:
        """Start, or go on from what the log says was signed at this height. Without a signer, only follow."""
        self.base = base
        self.round = 0
        self.step = PROPOSE
        self.decided = False
        self.locked: tuple[int, Cut] | None = None
        self.valid: tuple[int, Cut] | None = None
        self.effects: list[Effect] = []
        self.cuts: dict[bytes, Cut] = {}
        self.proposers = base.validators.proposers(network, base.k)
        self._network, self._view, self._signer, self._timing = network, view, signer, timing
        self._rounds: dict[int, RoundState] = {}
        self._mine: dict[tuple[int, int], Vote] = {}
        self._highest: dict[bytes, int] = {}
        self._sources: dict[bytes, bytes] = {}
        self._verdicts: dict[bytes, bool | None] = {}
        self._candidate: tuple[Cut, bool] | None = None
        self._timeouts: list[tuple[int, int, int]] = []
        self._resending = False
        for entry in sorted(log, key=lambda entry: entry.place):
            self._restore(entry)

    # What is known

    def proposer(self, round: int) -> bytes:
        """Return whose turn it is to propose."""
        return self.proposers[round % len(self.proposers)]

    def ballots(self, round: int, step: int) -> Ballots | None:
        """Return the votes heard in a step of a round, None where there are none."""
        state = self._rounds.get(round)
        if state is None:
            return None
        return state.prevotes if step == PREVOTE else state.precommits

    def proof(self, round: int, step: int, value: bytes | None) -> Votes | None:
        """Return the votes of a quorum for a value, None where there is no quorum or the cut is not known."""
        ballots = self.ballots(round, step)
        if ballots is None or not ballots.has_quorum(value):
            return None
        cut = None if value is None else self.cuts.get(value)
        if value is not None and cut is None:
            return None
        return Votes(self.base.k, round, step, cut, ballots.signatures(value))

    def signed_in(self, round: int) -> list[Vote]:
        """Return this validator's own votes of a round."""
        return [vote for (number, _), vote in sorted(self._mine.items()) if number == round]

    def absent(self) -> tuple[bytes, ...]:
        """Return the validators from whom nothing was heard in this round or later."""
        heard = {address for address, round in self._highest.items() if round >= self.round}
        if self._signer is not None:
            heard.add(self._signer.address)
        return tuple(address for address in self.base.validators.stakes if address not in heard)

    # What happens

    def on_proposal(self, proposal: Proposal, source: bytes, now: int) -> None:
        """Take a proposal of the round's proposer."""
        self._hear(proposal.proposer, proposal.round)
        if proposal.round <= self.round + 1 and self._is_kept(proposal.round):
            state = self._state(proposal.round)
            if state.proposal is None:
                state.proposal = proposal
                self._learn(proposal.cut, source)
        self.advance(now)

    def on_vote(self, vote: Vote, now: int) -> None:
        """Take a vote of a validator of this height."""
        self._hear(vote.validator, vote.round)
        if vote.round <= self.round + 1 and self._is_kept(vote.round):
            self._ballots(vote.round, vote.step).add(vote.cut, Signed(vote.validator, vote.signature))
        self.advance(now)

    def on_votes(self, votes: Votes, source: bytes, now: int) -> None:
        """Take a proven quorum, of any round: all of it counts, whatever else its voters voted for."""
        if votes.cut is not None:
            self._learn(votes.cut, source)
        ballots = self._ballots(votes.round, votes.step)
        for signed in votes.signatures:
            self._hear(signed.validator, votes.round)
            ballots.add(votes.value, signed, of_quorum=True)
        self.advance(now)

    def on_blocks(self, now: int) -> None:
        """Blocks joined the DAG."""
        self._look_again()
        self.advance(now)

    def tick(self, now: int) -> None:
        """Run the time-outs that are due."""
        due = sorted(timeout for timeout in self._timeouts if timeout[0] <= now)
        self._timeouts = [timeout for timeout in self._timeouts if timeout[0] > now]
        for _, step, round in due:
            if self.decided:
                return
            if step == RESEND:
                self._resend(now)
            elif round == self.round:
                self._on_timeout(step)
        self.advance(now)

    def advance(self, now: int) -> None:
        """Apply the rules until none applies."""
        while not self.decided and (
            self._decide() or self._skip() or self._open(now) or self._prevote() or self._precommit() or self._wait(now)
        ):
            pass
        if not self.decided and not self._resending and (self._mine or self._state(self.round).waiting):
            self._resending = True
            self._schedule(now + self._timing.resend, RESEND, self.round)

    # The rules

    def _decide(self) -> bool:  # L49
        for number in sorted(self._rounds):
            for value in self._rounds[number].precommits.majorities():
                if value is None or (cut := self.cuts.get(value)) is None:
                    continue
                verdict = self._judge(cut)
                if verdict is None:
                    continue
                certificate = Certificate(value, cut.k, number, self._rounds[number].precommits.signatures(value))
                self.decided = True
                self.effects.append(Decide(cut, certificate) if verdict else Diverged(cut, certificate))
                return True
        return False

    def _skip(self) -> bool:  # L55
        ahead = sorted(((round, address) for address, round in self._highest.items() if round > self.round))
        stake = 0
        for round, address in reversed(ahead):
            stake += self.base.validators.stakes[address]
            if self.base.validators.has_honest(stake):
                self._start(round)
                return True
        return False

    def _start(self, round: int) -> None:  # L11
        self.round, self.step = round, PROPOSE
        for number in [number for number in self._rounds if not self._is_kept(number)]:
            del self._rounds[number]
        known = {held[1].id for held in (self.locked, self.valid) if held is not None}
        for state in self._rounds.values():
            known |= {value for value in state.prevotes.majorities() + state.precommits.majorities() if value}
            known |= {state.proposal.cut.id} if state.proposal is not None else set()
        self.cuts = {id: cut for id, cut in self.cuts.items() if id in known}
        self._sources = {id: source for id, source in self._sources.items() if id in known}
        self._verdicts = {id: verdict for id, verdict in self._verdicts.items() if id in known}

    def _open(self, now: int) -> bool:  # L14 to L21
        state = self._state(self.round)
        if self.step != PROPOSE or PROPOSE in state.waiting or not self._has_something():
            return False
        self._wait_for(PROPOSE, now)
        if self._signer is not None and self.proposer(self.round) == self._signer.address and state.proposal is None:
            round, cut = self._to_propose()
            proposal = sign_proposal(self._signer, self._network, round=self.round, valid_round=round, cut=cut)
            state.proposal = proposal
            self._learn(cut, self._signer.address)
            self.effects += [SyncVoteLog(LogEntry(proposal, None, None)), Broadcast(proposal)]
            if round is not None and (polka := self.proof(round, PREVOTE, cut.id)):
                self.effects.append(Broadcast(polka))
        return True

    def _prevote(self) -> bool:  # L22, L28
        state = self._state(self.round)
        proposal = state.proposal
        if self.step != PROPOSE or proposal is None:
            return False
        verdict, value, since = self._judge(proposal.cut), proposal.cut.id, proposal.valid_round
        if verdict is None or (not verdict and PROPOSE not in state.waiting):
            return False  # what is missing may come; and with nothing to decide, a bad proposal is no reason to vote
        if verdict and since is not None:
            polka = self.ballots(since, PREVOTE)
            if polka is None or not polka.has_quorum(value):
                return False
        free = self.locked is None or self.locked[1].id == value or (since is not None and self.locked[0] <= since)
        self._vote(PREVOTE, value if verdict and free else None)
        return True

    def _precommit(self) -> bool:  # L36, L44
        state = self._state(self.round)
        if self.step == PROPOSE:
            return False
        for value in state.prevotes.majorities():
            if value is None:
                if self.step == PREVOTE:
                    self._vote(PRECOMMIT, None)
                    return True
            elif not state.polka_seen and (cut := self.cuts.get(value)) is not None and self._judge(cut):
                state.polka_seen = True
                self.valid = (self.round, cut)
                if self.step == PREVOTE:
                    self.locked = self.valid
                    self._vote(PRECOMMIT, value)
                return True
        return False

    def _wait(self, now: int) -> bool:  # L34, L47
        state = self._state(self.round)
        is_quorum = self.base.validators.is_quorum
        if self.step == PREVOTE and PREVOTE not in state.waiting and is_quorum(state.prevotes.stake):
            self._wait_for(PREVOTE, now)
            return True
        if PRECOMMIT not in state.waiting and is_quorum(state.precommits.stake):
            self._wait_for(PRECOMMIT, now)
            return True
        return False

    def _on_timeout(self, step: int) -> None:  # L57 to L67
        if step == PRECOMMIT:
            self._start(self.round + 1)
        elif step == self.step:
            self._vote(PREVOTE if step == PROPOSE else PRECOMMIT, None)

    # Cuts

    def _has_something(self) -> bool:
        """Tell whether there is something to decide: a valid cut that somebody proposed, or that could be now."""
        return self.valid is not None or self._fresh()[1] or self._known_valid() is not None

    def _known_valid(self) -> Cut | None:
        """Return a cut that others proposed and that is valid here, the first by id; asks for what is missing."""
        return next((cut for _, cut in sorted(self.cuts.items()) if self._judge(cut)), None)

    def _to_propose(self) -> tuple[int | None, Cut]:
        """Return the cut for an own proposal, and the round in which it had a quorum of prevotes."""
        if self.valid is not None:
            return self.valid
        cut, is_valid = self._fresh()
        return None, cut if is_valid else self._known_valid() or cut

    def _fresh(self) -> tuple[Cut, bool]:
        """Return the cut of all that is here, and whether it would be valid."""
        if self._candidate is None:
            base = self.base
            heads = self._view.heads(base)
            cut = Cut(base.k, base.prev_cut, heads, base.state_root, base.next_validators_hash)
            self._candidate = cut, self._is_valid(self._view.window(base, heads))
        return self._candidate

    def _judge(self, cut: Cut) -> bool | None:
        """Tell whether a cut is valid; None while blocks are missing, which are asked for."""
        if cut.id not in self._verdicts:
            base = self.base
            stands = (cut.prev_cut, cut.prev_state_root, cut.next_validators_hash)
            if stands != (base.prev_cut, base.state_root, base.next_validators_hash):
                self._verdicts[cut.id] = False
                return False
            window = self._view.window(base, cut.heads)
            if window.missing:
                self.effects.append(FetchBlocks(window.missing, self._sources[cut.id]))
            self._verdicts[cut.id] = None if window.missing else self._is_valid(window)
        return self._verdicts[cut.id]

    def _is_valid(self, window: Window) -> bool:
        return not window.missing and window.ordered and window.content and self._is_covered(window)

    def _is_covered(self, window: Window) -> bool:
        """Tell whether so many wrote since the last cut that no leader can cut around what the honest acknowledge."""
        return self.base.validators.is_quorum(self.base.validators.stake_of(window.anchored))

    def _look_again(self) -> None:
        self._candidate = None
        self._verdicts = {id: verdict for id, verdict in self._verdicts.items() if verdict is not None}

    def _learn(self, cut: Cut, source: bytes) -> None:
        self.cuts.setdefault(cut.id, cut)
        self._sources[cut.id] = source

    # Bookkeeping

    def _vote(self, step: int, value: bytes | None) -> None:
        """Go on to a step, and sign its vote: the log must hold it before anybody else does."""
        self.step = step
        if self._signer is None:
            return
        vote = sign_vote(self._signer, self._network, k=self.base.k, round=self.round, step=step, cut=value)
        polka = self.proof(self.round, PREVOTE, value) if step == PRECOMMIT and value is not None else None
        self._mine[self.round, step] = vote
        self._ballots(self.round, step).add(value, Signed(vote.validator, vote.signature))
        self.effects += [SyncVoteLog(LogEntry(None, vote, polka)), Broadcast(vote)]

    def _resend(self, now: int) -> None:
        self._look_again()  # what was asked for may have been lost
        state = self._state(self.round)
        self.effects.append(Broadcast(InRound(self.base.k, self.round)))
        if state.proposal is not None:
            self.effects.append(Broadcast(state.proposal))
        self.effects += [Broadcast(vote) for vote in self.signed_in(self.round)]
        places = [(self.round, PREVOTE), (self.round, PRECOMMIT)]
        if self.valid is not None and self.valid[0] != self.round:
            places.insert(0, (self.valid[0], PREVOTE))
        for round, step in places:
            ballots = self.ballots(round, step)
            for value in ballots.majorities() if ballots else ():
                self.effects.append(Broadcast(Majority(self.base.k, round, step, value)))
        self._schedule(now + self._timing.resend, RESEND, self.round)

    def _wait_for(self, step: int, now: int) -> None:
        self._state(self.round).waiting.add(step)
        self._schedule(now + self._timing.of(step, self.round), step, self.round)

    def _schedule(self, at: int, step: int, round: int) -> None:
        self._timeouts.append((at, step, round))
        self.effects.append(ScheduleTimeout(at))

    def _hear(self, validator: bytes, round: int) -> None:
        if round > self._highest.get(validator, -1):
            self._highest[validator] = round

    def _is_kept(self, round: int) -> bool:
        pinned = [held[0] for held in (self.locked, self.valid) if held is not None]
        return round > self.round - ROUNDS_KEPT or round in pinned

    def _state(self, round: int) -> RoundState:
        if round not in self._rounds:
            self._rounds[round] = RoundState(Ballots(self.base.validators), Ballots(self.base.validators))
        return self._rounds[round]

    def _ballots(self, round: int, step: int) -> Ballots:
        state = self._state(round)
        return state.prevotes if step == PREVOTE else state.precommits

    def _restore(self, entry: LogEntry) -> None:
        """Take back what this validator signed before it stopped; entries come in the order of signing."""
        _, self.round, self.step = entry.place
        state = self._state(self.round)
        if entry.proposal is not None:
            state.proposal = entry.proposal
            self._learn(entry.proposal.cut, entry.proposal.proposer)
        if entry.vote is not None:
            vote = entry.vote
            self._mine[vote.round, vote.step] = vote
            self._ballots(vote.round, vote.step).add(vote.cut, Signed(vote.validator, vote.signature))
            if entry.polka is not None and entry.polka.cut is not None:
                self._learn(entry.polka.cut, vote.validator)
                for signed in entry.polka.signatures:
                    state.prevotes.add(entry.polka.value, signed, of_quorum=True)
                self.locked = self.valid = (vote.round, entry.polka.cut)
