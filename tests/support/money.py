"""Ledgers for tests: parameters of a small test net, signed records in their places, and a proof of double voting."""

from __future__ import annotations

from dataclasses import replace

from blyan_node.chain.evidence import VOTE_DOMAIN
from blyan_node.chain.genesis import Genesis, Parameters
from blyan_node.chain.keys import Key, digest
from blyan_node.chain.ledger import Folded, Receipt, fold
from blyan_node.chain.order import Carried
from blyan_node.chain.records import Arguments, Evidence, Record, Signed, make_record
from blyan_node.chain.state import State, genesis_state
from blyan_node.codec import encode
from tests.support.chains import KEYS, NETWORK, Forge

VALIDATORS, USERS = KEYS[:3], KEYS[3:7]
CARRIER = KEYS[7]
PARAMETERS = Parameters(
    cap=10_000,
    epoch=3,
    unbonding=6,
    min_stake=10,
    slash_millionths=250_000,
    faucet_per_record=50,
    faucet_per_cut=80,
    fee_per_byte=0,
)
BALANCES = {key.address: 1000 for key in USERS}


def beginning(balances: dict[bytes, int] = BALANCES, **parameters: int) -> Genesis:
    """Three validators with 100 each; four users with 1,000 each."""
    stakes = {key.address: 100 for key in VALIDATORS}
    return Genesis.make("money", stakes, created_ms=0, parameters=replace(PARAMETERS, **parameters), balances=balances)


STAKES = beginning()


def start(**parameters: int) -> State:
    """Cut 0 of :func:`beginning`."""
    return genesis_state(beginning(**parameters))


def put(key: Key, nonce: int, arguments: Arguments, *, fee: int = 0, **options: int) -> Carried:
    """A record of ``key``, carried by CARRIER."""
    return carry(make_record(key, NETWORK, arguments, nonce=nonce, fee=fee, **options))


def carry(record: Record, *, lost_to: bytes | None = None) -> Carried:
    return Carried(record, bytes(32), CARRIER.address, lost_to)


def cut(state: State, *records: Carried, receipts: tuple[Receipt, ...] = ()) -> Folded:
    return fold(state, records, network=NETWORK, receipts=receipts)


def signed_vote(
    key: Key, k: int = 5, in_round: int = 0, step: int = 2, value: bytes | None = b"\1" * 32, network=NETWORK
) -> Signed:
    payload = encode([network, k, in_round, step, value])
    return Signed(payload, key.sign(digest(VOTE_DOMAIN, payload)))


def double_vote(key: Key) -> Evidence:
    return Evidence("double-vote", signed_vote(key), signed_vote(key, value=None))


def signed_header(key: Key, **changes) -> Signed:
    block = Forge().block(key, **changes)
    return Signed(block.header_bytes, block.signature)


def double_block(key: Key) -> Evidence:
    return Evidence("double-block", signed_header(key), signed_header(key, type="other"))
