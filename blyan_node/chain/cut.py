"""Cuts of the DAG, the votes that decide them, and the certificates that prove the decision.

::

    cut         = [k, prev_cut, heads (sorted, 1..512), prev_state_root, next_validators_hash]
    vote        = [k, round, step, cut id | nil, validator, signature]       step 1 is a prevote, 2 a precommit
    proposal    = [k, round, valid_round | nil, cut, proposer, signature]
    votes       = [k, round, step, cut | nil, [[validator, signature], ...]]  one value's votes, sorted by validator
    certificate = [cut_id, k, round, [[validator, signature], ...]]           precommits by more than 2/3 of stake
    id          = sha256(cut)

Cut 0 is the genesis; the first ``prev_cut`` is the network's id. Signatures are over digests with a domain of their
own that name the network, the height, the round and the step, so none can be used in another place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Protocol

from blyan_node.chain.genesis import MAX_VALIDATORS
from blyan_node.chain.keys import digest, recover_address
from blyan_node.chain.records import Address, Hash, Signature
from blyan_node.chain.validators import ValidatorSet
from blyan_node.codec import Bound, Size, encode, pack
from blyan_node.errors import RuleError, SignatureError

VOTE_DOMAIN = b"blyan/vote/1"
PROPOSAL_DOMAIN = b"blyan/proposal/1"
PREVOTE, PRECOMMIT = 1, 2
MAX_HEADS = 512
MAX_ROUND = 2**31 - 1
MAX_CUT = 64 + MAX_HEADS * 34 + 3 * 34
"""Bytes of an encoded cut."""
MAX_VOTES = MAX_CUT + MAX_VALIDATORS * 96
"""Bytes of the largest message of the consensus: a cut with the votes of all validators."""

Round = Annotated[int, Bound(MAX_ROUND)]
Step = Annotated[int, Bound(PRECOMMIT, PREVOTE)]
RecoverAddress = Callable[[bytes, bytes], bytes]
"""(digest, signature) → address of the signer; raises SignatureError."""


class Signer(Protocol):
    """What signs votes: :class:`blyan_node.chain.keys.Key`, or something faster in a simulation."""

    @property
    def address(self) -> bytes:
        """The validator, 20 bytes."""
        ...

    def sign(self, message_digest: bytes) -> bytes:
        """Sign a 32-byte digest: 65 bytes."""
        ...


@dataclass(frozen=True)
class Cut:
    """A snapshot of the DAG: everything in the past of ``heads``, an antichain.

    ``prev_state_root`` is the root of the state after cut ``k - 1``; ``next_validators_hash`` the hash of the set
    that decides cut ``k + 1``, which that state determines.
    """

    k: Annotated[int, Bound(2**63 - 1, 1)]
    prev_cut: Hash
    heads: Annotated[tuple[Hash, ...], Size(MAX_HEADS, 1)]
    prev_state_root: Hash
    next_validators_hash: Hash

    @cached_property
    def id(self) -> bytes:
        """sha256 of the canonical encoding."""
        return hashlib.sha256(pack(self)).digest()


def check_cut(cut: Cut) -> None:
    """Check a decoded cut by itself. Raises RuleError."""
    if list(cut.heads) != sorted(set(cut.heads)):
        raise RuleError("the heads of a cut are not sorted, or one is named twice")


@dataclass(frozen=True)
class Signed:
    """One validator's signature under something that all signers signed alike."""

    validator: Address
    signature: Signature


Signatures = Annotated[tuple[Signed, ...], Size(MAX_VALIDATORS, 1)]


@dataclass(frozen=True)
class Vote:
    """A vote for a cut by id, or for none (nil)."""

    k: int
    round: Round
    step: Step
    cut: Hash | None
    validator: Address
    signature: Signature


@dataclass(frozen=True)
class Proposal:
    """A cut proposed for a round. ``valid_round`` is the last round in which more than 2/3 prevoted for it."""

    k: int
    round: Round
    valid_round: Round | None
    cut: Cut
    proposer: Address
    signature: Signature


@dataclass(frozen=True)
class Votes:
    """Votes for one value in one step of one round, with the cut itself: what proves that it had a quorum."""

    k: int
    round: Round
    step: Step
    cut: Cut | None
    signatures: Signatures

    @property
    def value(self) -> bytes | None:
        """What the votes are for: the cut's id, None for nil."""
        return None if self.cut is None else self.cut.id


@dataclass(frozen=True)
class Certificate:
    """Precommits that prove a cut final."""

    cut_id: Hash
    k: int
    round: Round
    signatures: Signatures

    def with_cut(self, cut: Cut) -> Votes:
        """Return the same precommits as the message that brings a peer to the decision."""
        return Votes(self.k, self.round, PRECOMMIT, cut, self.signatures)


@dataclass(frozen=True)
class DoubleVote:
    """Proof that a validator voted twice in one step of one round."""

    first: Vote
    second: Vote


def vote_digest(network: bytes, k: int, round: int, step: int, cut: bytes | None) -> bytes:
    """Return the 32 bytes that a vote signs."""
    return digest(VOTE_DOMAIN, vote_payload(network, k, round, step, cut))


def vote_payload(network: bytes, k: int, round: int, step: int, cut: bytes | None) -> bytes:
    """Return what a vote says, byte for byte as it is signed: what evidence of a double vote carries."""
    return encode([network, k, round, step, cut])


def proposal_digest(network: bytes, k: int, round: int, valid_round: int | None, cut: bytes) -> bytes:
    """Return the 32 bytes that a proposal signs."""
    return digest(PROPOSAL_DOMAIN, encode([network, k, round, valid_round, cut]))


def sign_vote(signer: Signer, network: bytes, *, k: int, round: int, step: int, cut: bytes | None) -> Vote:
    """Make a vote."""
    return Vote(k, round, step, cut, signer.address, signer.sign(vote_digest(network, k, round, step, cut)))


def sign_proposal(signer: Signer, network: bytes, *, round: int, valid_round: int | None, cut: Cut) -> Proposal:
    """Make a proposal."""
    signature = signer.sign(proposal_digest(network, cut.k, round, valid_round, cut.id))
    return Proposal(cut.k, round, valid_round, cut, signer.address, signature)


def check_vote(vote: Vote, network: bytes, recover: RecoverAddress = recover_address) -> None:
    """Check a vote's signature. Raises SignatureError."""
    if recover(vote_digest(network, vote.k, vote.round, vote.step, vote.cut), vote.signature) != vote.validator:
        raise SignatureError("a vote that its validator did not sign")


def check_proposal(proposal: Proposal, network: bytes, recover: RecoverAddress = recover_address) -> None:
    """Check a proposal by itself: its cut, its rounds, its signature. Raises RuleError or SignatureError."""
    check_cut(proposal.cut)
    if proposal.cut.k != proposal.k:
        raise RuleError("a proposal for another height than its cut's")
    if proposal.valid_round is not None and proposal.valid_round >= proposal.round:
        raise RuleError("a proposal's valid_round is not before its round")
    signed = proposal_digest(network, proposal.k, proposal.round, proposal.valid_round, proposal.cut.id)
    if recover(signed, proposal.signature) != proposal.proposer:
        raise SignatureError("a proposal that its proposer did not sign")


def check_votes(
    votes: Votes,
    validators: ValidatorSet,
    network: bytes,
    recover: RecoverAddress = recover_address,
    *,
    known: Iterable[Signed] = (),
) -> None:
    """Check that votes are a quorum of ``validators``; the ``known`` were checked before and are not again.

    Raises RuleError, or SignatureError for a vote that its validator did not sign.
    """
    if votes.cut is not None:
        check_cut(votes.cut)
        if votes.cut.k != votes.k:
            raise RuleError("votes for another height than their cut's")
    _check_quorum(votes.k, votes.round, votes.step, votes.value, votes.signatures, validators, network, recover, known)


def check_certificate(
    certificate: Certificate,
    cut: Cut,
    validators: ValidatorSet,
    network: bytes,
    recover: RecoverAddress = recover_address,
) -> None:
    """Check that a certificate proves ``cut`` final, decided by ``validators``. Raises RuleError or SignatureError."""
    if (certificate.cut_id, certificate.k) != (cut.id, cut.k):
        raise RuleError("the certificate of another cut")
    check_votes(certificate.with_cut(cut), validators, network, recover)


def check_double_vote(evidence: DoubleVote, network: bytes, recover: RecoverAddress = recover_address) -> None:
    """Check that two votes prove a fault. Raises RuleError or SignatureError.

    The pair has one order, nil first and then by cut id, so that one fault has one encoding.
    """
    first, second = evidence.first, evidence.second
    places = [(vote.validator, vote.k, vote.round, vote.step) for vote in (first, second)]
    if places[0] != places[1]:
        raise RuleError("two votes of different validators, heights, rounds or steps contradict nothing")
    if (first.cut or b"") >= (second.cut or b""):
        raise RuleError("the votes of a double vote are two, ordered by cut id with nil first")
    check_vote(first, network, recover)
    check_vote(second, network, recover)


def double_vote(one: Vote, other: Vote) -> DoubleVote:
    """Put two contradicting votes in the order that :func:`check_double_vote` asks for."""
    first, second = sorted((one, other), key=lambda vote: vote.cut or b"")
    return DoubleVote(first, second)


def _check_quorum(
    k: int,
    round: int,
    step: int,
    value: bytes | None,
    signatures: tuple[Signed, ...],
    validators: ValidatorSet,
    network: bytes,
    recover: RecoverAddress,
    known: Iterable[Signed],
) -> None:
    addresses = [signed.validator for signed in signatures]
    if addresses != sorted(set(addresses)):
        raise RuleError("the signers are not sorted, or one is named twice")
    if strangers := [address for address in addresses if address not in validators.stakes]:
        raise RuleError(f"{strangers[0].hex()} signed, but is no validator of this height")
    if not validators.is_quorum(validators.stake_of(addresses)):
        raise RuleError("the signers hold no more than 2/3 of stake")
    signed_digest, checked = vote_digest(network, k, round, step, value), set(known)
    for signed in signatures:
        if signed not in checked and recover(signed_digest, signed.signature) != signed.validator:
            raise SignatureError("a vote that its validator did not sign")
