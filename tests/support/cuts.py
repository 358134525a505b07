"""Final cuts without a network: proposed as a validator would, decided by the keys that a test holds."""

from __future__ import annotations

from collections.abc import Sequence

from blyan_node.chain.block import Anchor
from blyan_node.chain.candidates import Candidates
from blyan_node.chain.cut import PRECOMMIT, Certificate, Cut, Signed, sign_vote
from blyan_node.chain.keys import Key
from blyan_node.chain.outcome import Committed
from blyan_node.chain.replica import Replica
from tests.support.chains import KEYS


def next_cut(replica: Replica, heads: tuple[bytes, ...] = ()) -> Cut:
    """The cut over what is here, or over some ``heads``."""
    base = replica.final.base()
    heads = tuple(sorted(heads)) or Candidates(replica).heads(base)
    return Cut(base.k, base.prev_cut, heads, base.state_root, base.next_validators_hash)


def certify(cut: Cut, network: bytes, keys: Sequence[Key] = KEYS) -> Certificate:
    """Precommits for a cut by all who hold ``keys``."""
    votes = [sign_vote(key, network, k=cut.k, round=0, step=PRECOMMIT, cut=cut.id) for key in keys]
    return Certificate(cut.id, cut.k, 0, tuple(sorted((Signed(v.validator, v.signature) for v in votes), key=_by)))


def _by(signed: Signed) -> bytes:
    return signed.validator


def finalise(replica: Replica, heads: tuple[bytes, ...] = (), keys: Sequence[Key] | None = None) -> Committed:
    """Decide the next cut and commit it. ``keys``: who signs; of KEYS, by default, those who have a seat."""
    seats = replica.final.state.stake()
    signers = [key for key in KEYS if key.address in seats] if keys is None else keys
    cut = next_cut(replica, heads)
    return replica.commit(cut, certify(cut, replica.genesis.network, signers))


def pass_on(source: Replica, target: Replica) -> None:
    """Make final in ``target`` what is so in ``source``: the cuts, and what lies under them."""
    for k in range(target.final.k + 1, source.final.k + 1):
        for _, id in source.window_of(k):
            target.accept(source.get(id) or b"")
        if (stored := source.finals.stored(k)) is not None:
            target.commit(stored.cut, stored.certificate)


def anchor(replica: Replica) -> Anchor:
    """The anchor that a block written now has."""
    return Anchor(replica.final.k, replica.final.id)
