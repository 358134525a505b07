"""The ledger as bytes: pinned vectors, so that no encoding and no rule of the fold can change unnoticed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blyan_node.chain.ledger import Receipt
from blyan_node.chain.records import (
    KINDS,
    MAX_MONEY,
    BlobRef,
    Bond,
    Evidence,
    Faucet,
    Layer,
    Manifest,
    Signed,
    Transfer,
    Unbond,
    make_record,
)
from blyan_node.codec import pack
from blyan_node.errors import CodecError
from tests.support.chains import KEYS, NETWORK
from tests.support.money import CARRIER, USERS, VALIDATORS, carry, cut, double_block, double_vote, start

VECTORS = json.loads((Path(__file__).parent / "vectors" / "ledger.json").read_text())


def vectors() -> dict[str, str | list[str]]:
    """What this version makes of fixed input; printed by ``python -m tests.unit.test_ledger_vectors``."""
    alice, bob, carol, dave = USERS
    manifest = make_record(dave, NETWORK, Manifest("tiny", b"{}", ("embed", "head"), BlobRef(bytes(32), 7)), nonce=0)
    records = {
        "transfer": make_record(alice, NETWORK, Transfer(bob.address, 300), nonce=0, fee=7, expires_at_cut=9),
        "bond": make_record(alice, NETWORK, Bond(bob.address, 40), nonce=1),
        "unbond": make_record(alice, NETWORK, Unbond(bob.address, 10), nonce=2),
        "faucet": make_record(carol, NETWORK, Faucet(carol.address, 50), nonce=0),
        "double-vote evidence": make_record(bob, NETWORK, double_vote(VALIDATORS[0]), nonce=0),
        "double-block evidence": make_record(bob, NETWORK, double_block(VALIDATORS[1]), nonce=1),
        "manifest": manifest,
        "layer": make_record(dave, NETWORK, Layer(manifest.id, 1, BlobRef(bytes([1]) * 32, 8), b"beacon"), nonce=1),
    }
    receipt = Receipt(bytes([1]) * 32, bob.address, 2, 500)
    state = start()
    made: dict[str, bytes | list[bytes]] = {}
    for name, record in records.items():
        made |= {f"{name} record": pack(record), f"{name} record id": record.id}
    made |= {"receipt id": receipt.id, "genesis rows": state.rows(), "genesis root": state.root()}
    state = cut(state, *map(carry, records.values()), receipts=(receipt,)).state
    made |= {"carrier": CARRIER.address, "cut 1 rows": state.rows(), "cut 1 root": state.root()}
    for _ in range(9):
        state = cut(state).state
    made |= {"cut 10 rows": state.rows(), "cut 10 root": state.root()}
    return {
        name: value.hex() if isinstance(value, bytes) else [row.hex() for row in value] for name, value in made.items()
    }


@pytest.mark.parametrize("name", sorted(VECTORS))
def test_pinned_vectors(name):
    assert vectors()[name] == VECTORS[name]


def test_nothing_is_left_unpinned():
    assert set(vectors()) == set(VECTORS)


ADDRESSES = st.binary(min_size=20, max_size=20)
AMOUNTS = st.integers(1, MAX_MONEY)
SIGNED = st.builds(Signed, st.binary(max_size=4096), st.binary(min_size=65, max_size=65))
PLAIN = st.sampled_from([Transfer, Bond, Unbond, Faucet]).flatmap(lambda cls: st.builds(cls, ADDRESSES, AMOUNTS))
EVIDENCE = st.builds(Evidence, st.text("abc-", min_size=1, max_size=32), SIGNED, SIGNED)


@given(st.one_of(PLAIN, EVIDENCE), st.integers(0, 9))
def test_arguments_survive_a_record(arguments, nonce):
    record = make_record(KEYS[0], NETWORK, arguments, nonce=nonce)
    assert record.parsed() == arguments
    assert KINDS[record.kind] is type(arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        Transfer(bytes(19), 1),
        Transfer(bytes(20), 0),
        Transfer(bytes(20), -1),
        Transfer(bytes(20), MAX_MONEY + 1),
        Bond(bytes(20), 0),
        Unbond(bytes(20), 0),
        Faucet(bytes(20), 0),
        Evidence("", Signed(b"", bytes(65)), Signed(b"", bytes(65))),
        Evidence("x", Signed(bytes(4097), bytes(65)), Signed(b"", bytes(65))),
        Evidence("x", Signed(b"", bytes(64)), Signed(b"", bytes(65))),
    ],
)
def test_what_nobody_could_read_is_not_signed(arguments):
    with pytest.raises(CodecError):
        make_record(KEYS[0], NETWORK, arguments, nonce=0)


if __name__ == "__main__":
    print(json.dumps(vectors(), indent=1))  # noqa: T201
