"""A replica with real cuts: four validators whose keys a test holds, what they wrote, forked, decided and voted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from blyan_node.chain.block import Anchor, Block, make_block
from blyan_node.chain.cut import (
    PRECOMMIT,
    PREVOTE,
    Certificate,
    Cut,
    Signed,
    Vote,
    Votes,
    sign_proposal,
    sign_vote,
)
from blyan_node.chain.effects import LogEntry
from blyan_node.chain.evidence import of_blocks
from blyan_node.chain.genesis import Genesis
from blyan_node.chain.keys import Key
from blyan_node.chain.outcome import Accepted
from blyan_node.chain.records import (
    Arguments,
    BlobRef,
    Bond,
    Faucet,
    Layer,
    Manifest,
    Record,
    Transfer,
    Unbond,
    make_record,
)
from blyan_node.chain.replica import Replica
from blyan_node.chain.retention import Retention
from blyan_node.chain.validators import ValidatorSet
from tests.support.chains import KEYS
from tests.support.money import PARAMETERS

VALIDATORS, USERS = KEYS[:4], KEYS[4:8]
CHEAT = VALIDATORS[3]
GENESIS = Genesis.make(
    "decided",
    {key.address: 100 for key in VALIDATORS},
    created_ms=0,
    parameters=replace(PARAMETERS, faucet_per_record=50, faucet_per_cut=80),
    balances={key.address: 1000 for key in USERS},
)
NETWORK = GENESIS.network


class Decided:
    """Writes into a replica as any of the validators, and decides cuts as all of them."""

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        self.nonces = {key.address: 0 for key in KEYS}

    def record(self, key: Key, arguments: Arguments, *, fee: int = 0, nonce: int | None = None) -> Record:
        """The next record of a key; with a nonce, a rival of an older one."""
        if nonce is None:
            nonce = self.nonces[key.address]
            self.nonces[key.address] += 1
        return make_record(key, NETWORK, arguments, nonce=nonce, fee=fee)

    def write(self, key: Key, *records: Record, parents: tuple[Block, ...] = (), chain: str = "T") -> Block:
        ids = tuple(parent.id for parent in parents) or None
        return self.replica.author(key, records, chain=chain, type="data", now_ms=1, parents=ids)

    def fork(self, key: Key, beside: Block, now_ms: int = 2) -> Block:
        """Write a second block of an author in the place of another."""
        header = beside.header
        anchor = Anchor(self.replica.final.k, self.replica.final.id)
        block = make_block(
            key,
            NETWORK,
            (),
            chain="B",
            type="data",
            seq=header.seq,
            prev=header.prev,
            parents=header.parents,
            height=header.height,
            anchor=anchor,
            timestamp_ms=now_ms,
        )
        assert isinstance(self.replica.accept(block.raw), Accepted)
        return block

    def acknowledge(self) -> None:
        """Every validator but an equivocator writes on the last cut."""
        for validator in self.replica.final.state.validators:
            if not self.replica.is_equivocator(validator.address):
                self.write(next(key for key in KEYS if key.address == validator.address))

    def votes(self, cut: Cut, step: int, round: int = 0) -> list[Vote]:
        members = {member.address for member in self.replica.final.state.validators}
        keys = sorted((key for key in KEYS if key.address in members), key=lambda key: key.address)
        return [sign_vote(key, NETWORK, k=cut.k, round=round, step=step, cut=cut.id) for key in keys]

    def propose(self) -> Cut:
        """The cut of all that is here."""
        base = self.replica.final.base()
        return Cut(base.k, base.prev_cut, self.replica.heads(), base.state_root, base.next_validators_hash)

    def decide(self) -> None:
        self.acknowledge()
        cut = self.propose()
        signatures = tuple(Signed(vote.validator, vote.signature) for vote in self.votes(cut, PRECOMMIT))
        self.log(cut, VALIDATORS[0])
        self.replica.commit(cut, Certificate(cut.id, cut.k, 0, signatures))

    def log(self, cut: Cut, key: Key) -> None:
        """Write to the vote log what a validator signs on the way to a decision."""
        proposal = sign_proposal(key, NETWORK, round=0, valid_round=None, cut=cut)
        prevotes = self.votes(cut, PREVOTE)
        polka = Votes(cut.k, 0, PREVOTE, cut, tuple(Signed(vote.validator, vote.signature) for vote in prevotes))
        (prevote,) = (vote for vote in prevotes if vote.validator == key.address)
        (precommit,) = (vote for vote in self.votes(cut, PRECOMMIT) if vote.validator == key.address)
        for entry in (LogEntry(proposal, None, None), LogEntry(None, prevote, None), LogEntry(None, precommit, polka)):
            self.replica.finals.log_vote(entry)


def write_chain(directory: Path, retention: Retention | None = None) -> None:
    """Nine cuts over three epochs and a tail: payments, double spends, a slashed equivocator, a model, a release."""
    with Replica.open(directory, GENESIS, retention=retention) as replica:
        chain = Decided(replica)
        one, two, three, cheat = VALIDATORS
        alice, bob, carol, dave = USERS
        first = chain.write(one, chain.record(alice, Transfer(bob.address, 100), fee=3))
        # both sides of a double spend, each seen first by another validator
        paid = chain.write(one, chain.record(bob, Transfer(alice.address, 5)), parents=(first,))
        rival = chain.write(two, chain.record(bob, Transfer(carol.address, 5), nonce=0), parents=(first,))
        chain.write(three, parents=(paid,))
        # an equivocator, with a branch under each of two honest validators
        left = chain.write(cheat, parents=(first,))
        right = chain.fork(cheat, left)
        chain.write(one, parents=(paid, left))
        chain.write(two, parents=(rival, right))
        chain.decide()
        chain.write(one, chain.record(dave, of_blocks(left, right)), chain="A")
        chain.decide()
        manifest = Manifest("tiny", b"{}", ("layer.0", "layer.1"), BlobRef(bytes(32), 7))
        published = chain.record(carol, manifest, fee=1)
        layer = chain.record(carol, Layer(published.id, 1, BlobRef(b"\1" * 32, 9)))
        chain.write(two, published, layer, chain="A")
        chain.write(three, chain.record(alice, Bond(two.address, 50)), chain.record(dave, Faucet(bob.address, 50)))
        chain.decide()
        chain.write(one, chain.record(alice, Unbond(two.address, 20)), chain.record(alice, Bond(alice.address, 60)))
        # void here, and in another cut again, where it takes effect
        early = chain.record(bob, Transfer(dave.address, 1), nonce=2)
        chain.write(two, early)
        chain.decide()
        chain.nonces[bob.address] = 1
        chain.write(three, chain.record(bob, Transfer(dave.address, 1)), early)
        chain.decide()
        for _ in range(4):
            chain.write(one, chain.record(carol, Transfer(dave.address, 1)))
            chain.decide()
        chain.write(one, chain.record(dave, Transfer(alice.address, 2)))
        chain.write(two, chain.record(dave, Transfer(alice.address, 10**6)), chain="B")
        chain.acknowledge()
        chain.log(chain.propose(), VALIDATORS[0])
        assert len(replica.final.state.slashed) == 1
        assert replica.final.state.validators != ValidatorSet.of(GENESIS.validators).members
        assert replica.final.k == 9
