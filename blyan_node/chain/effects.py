"""What consensus says to its peers, and what it asks of the shell that runs it. Values only.

The shell executes effects in order. One rule matters to safety: what follows a :class:`SyncVoteLog` may leave only
once its entry is on the disk.
"""

from __future__ import annotations

from dataclasses import dataclass

from blyan_node.chain.cut import MAX_VOTES, Certificate, Cut, DoubleVote, Proposal, Round, Step, Vote, Votes
from blyan_node.chain.records import Hash
from blyan_node.codec import decode, encode, from_value, to_value
from blyan_node.errors import CodecError


@dataclass(frozen=True)
class Majority:
    """MAJ23: the sender holds votes of more than 2/3 of stake for a value. A hint, so unsigned."""

    k: int
    round: Round
    step: Step
    cut: Hash | None


@dataclass(frozen=True)
class GetVotes:
    """GET_VOTES: asks for those votes; answered with :class:`blyan_node.chain.cut.Votes`."""

    k: int
    round: Round
    step: Step
    cut: Hash | None


@dataclass(frozen=True)
class InRound:
    """IN_ROUND: the sender is still in this round. Whoever is in a later one answers with its own votes of this one.

    An explicit question, asked at the pace of sending again: if votes alone called for votes, two peers that moved on
    would answer each other for ever.
    """

    k: int
    round: Round


Message = Proposal | Vote | Majority | GetVotes | Votes | InRound
MESSAGES: tuple[type[Message], ...] = (Proposal, Vote, Majority, GetVotes, Votes, InRound)
"""Their places are their numbers on the wire."""
MAX_MESSAGE = MAX_VOTES + 16


def pack_message(message: Message) -> bytes:
    """Encode a message: ``[number of its kind, its fields]``."""
    return encode([MESSAGES.index(type(message)), to_value(message)])


def unpack_message(data: bytes) -> Message:
    """Decode a message. Raises CodecError."""
    value = decode(data, most=MAX_MESSAGE)
    if type(value) is not list or len(value) != 2 or type(value[0]) is not int or value[0] >= len(MESSAGES):
        raise CodecError("not a message of the consensus")
    return from_value(MESSAGES[value[0]], value[1])


@dataclass(frozen=True)
class LogEntry:
    """What this validator signed: a proposal or a vote. With a precommit for a cut: the cut, and what it rests on.

    Replayed after a restart it keeps the validator from signing anything that contradicts it, and gives back its
    lock with the prevotes that others need to follow it, though all validators crashed at once.
    """

    proposal: Proposal | None
    vote: Vote | None
    polka: Votes | None

    @property
    def place(self) -> tuple[int, int, int]:
        """(k, round, step), where a proposal is step 0: at most one entry each, so a key for the store."""
        signed = self.proposal or self.vote
        if signed is None:
            return (0, 0, 0)
        return (signed.k, signed.round, 0 if self.vote is None else self.vote.step)


@dataclass(frozen=True)
class Broadcast:
    """Send to all validators, and tell nobody else's failure apart from loss: it is sent again while it matters."""

    message: Message


@dataclass(frozen=True)
class Send:
    """Send to the peer from which a message came; ``to`` is the ``source`` that ``handle`` was given."""

    to: bytes
    message: Message


@dataclass(frozen=True)
class SyncVoteLog:
    """Write this to the vote log and wait for the disk before executing the effects that follow."""

    entry: LogEntry


@dataclass(frozen=True)
class ScheduleTimeout:
    """Call ``tick`` at this time, in milliseconds of the clock that ``now`` is read from, or soon after."""

    at: int


@dataclass(frozen=True)
class Decide:
    """The cut is final. Commit it with its certificate (synced), fold the state, then call ``begin`` with the next
    base.
    """  # noqa: D205

    cut: Cut
    certificate: Certificate


@dataclass(frozen=True)
class FetchBlocks:
    """These blocks lie under a proposed or decided cut and are not here; ``source`` sent that cut."""

    ids: tuple[bytes, ...]
    source: bytes


@dataclass(frozen=True)
class FetchCuts:
    """``source`` is at a later height: ask it for the cuts from ``k`` on."""

    source: bytes
    k: int


@dataclass(frozen=True)
class SendCuts:
    """The peer is at height ``k``, which is decided here: send it the cuts from ``k`` on, with certificates."""

    to: bytes
    k: int


@dataclass(frozen=True)
class Evidence:
    """A validator voted twice. Told once per validator and height."""

    proof: DoubleVote


@dataclass(frozen=True)
class Diverged:
    """More than 2/3 of stake decided a cut that is invalid here: this node's state is damaged, or 1/3 is Byzantine.

    Nothing may be concluded from this node's ledger any more; stop, and verify the chain.
    """

    cut: Cut
    certificate: Certificate


Effect = (
    Broadcast | Send | SyncVoteLog | ScheduleTimeout | Decide | FetchBlocks | FetchCuts | SendCuts | Evidence | Diverged
)
