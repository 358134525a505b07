from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blyan_node.chain.genesis import Parameters, Validator
from blyan_node.chain.keys import digest
from blyan_node.chain.merkle import check_proof, leaf_hash
from blyan_node.chain.records import BlobRef, Bond, Layer, Manifest, Transfer, Unbond
from blyan_node.chain.state import (
    MAX_ROW,
    Account,
    Model,
    State,
    choose_validators,
    genesis_state,
    state_of_rows,
)
from blyan_node.codec import encode, to_value
from blyan_node.errors import ConfigError, RuleError
from tests.support.money import PARAMETERS, STAKES, USERS, VALIDATORS, Receipt, beginning, cut, double_vote, put, start

ALICE, BOB, CAROL, DAVE = USERS
BLOB = BlobRef(bytes([7]) * 32, 7)
MANIFEST = put(DAVE, 0, Manifest("tiny", b"{}", ("embed", "head"), BLOB))


def busy() -> State:
    """A state with rows in every table."""
    state = cut(start(), put(ALICE, 0, Bond(BOB.address, 40)), put(ALICE, 1, Transfer(CAROL.address, 1))).state
    return cut(
        state,
        put(ALICE, 2, Unbond(BOB.address, 10)),
        put(CAROL, 0, double_vote(VALIDATORS[0])),
        MANIFEST,
        put(DAVE, 1, Layer(MANIFEST.record.id, 1, BLOB)),
        receipts=(Receipt(bytes(32), BOB.address, 0, 5),),
    ).state


def test_the_genesis_state():
    state = start()
    assert (state.k, state.supply, state.total()) == (0, 4300, 4300)
    assert state.validators == state.next_validators == STAKES.validators
    assert all(state.may_author(key.address) for key in VALIDATORS)
    assert not state.may_author(ALICE.address)
    assert state.stake() == {key.address: 100 for key in VALIDATORS}


@pytest.mark.parametrize(
    ("changes", "balances", "good"),
    [
        ({"cap": 301}, {ALICE.address: 1}, True),
        ({"cap": 300}, {ALICE.address: 1}, False),
        ({"min_stake": 100}, {}, True),
        ({"min_stake": 101}, {}, False),
        ({}, {ALICE.address: -1}, False),
    ],
)
def test_a_genesis_that_hands_out_too_much_or_stakes_too_little(changes, balances, good):
    if good:
        genesis = beginning(balances, **changes)
        assert genesis_state(genesis).supply == genesis.supply <= genesis.parameters.cap
    else:
        with pytest.raises(ConfigError):
            beginning(balances, **changes)


def test_unbonding_must_outlast_the_power_to_cheat():
    assert replace(PARAMETERS, epoch=4, unbonding=6)
    with pytest.raises(ConfigError, match="nothing at stake"):
        replace(PARAMETERS, epoch=5, unbonding=6)


def test_the_validators_are_those_with_the_most_stake():
    bonds = {(number.to_bytes(20, "big"), ALICE.address): 10 + number // 2 for number in range(1, 131)}
    bonds[bytes(20), ALICE.address] = 9
    bonds[bytes(20), BOB.address] = 200  # bonds of several owners add up
    bonds[b"\xff" * 20, ALICE.address] = 9  # below the least stake
    bonds = dict(reversed(bonds.items()))
    cheat = (128).to_bytes(20, "big")
    state = State(PARAMETERS, bonds=bonds, slashed={cheat: 1})
    chosen = choose_validators(state)
    assert len(chosen) == 100
    assert chosen[0] == Validator(bytes(20), 209)
    # Above them 130 … 32 without the cheat; of the equals 30 and 31 the lower address takes the last place.
    assert [int.from_bytes(validator.address, "big") for validator in chosen[1:]] == [
        number for number in range(30, 131) if number not in (31, 128)
    ]
    assert list(chosen) == sorted(chosen, key=lambda validator: validator.address)


def test_where_nobody_is_left_the_old_set_stays():
    state = replace(start(), bonds={})
    assert choose_validators(state) == STAKES.validators


def test_the_root_is_that_of_the_tree_over_sorted_rows():
    state = State(PARAMETERS, accounts={b"\2" * 20: Account(7, 1), b"\1" * 20: Account(3, 0)}, supply=10)
    head = encode([0, [0, 10, [10_000, 3, 6, 10, 250_000, 50, 80, 0]]])
    one, two = encode([1, [b"\1" * 20, 3, 0]]), encode([1, [b"\2" * 20, 7, 1]])
    assert state.rows() == [head, one, two]
    leaves = [hashlib.sha256(b"\0" + row).digest() for row in (head, one, two)]
    pair = hashlib.sha256(b"\1" + leaves[0] + leaves[1]).digest()
    tree = hashlib.sha256(b"\1" + pair + leaves[2]).digest()
    assert state.root() == digest(b"blyan/state/1", encode([3, tree]))
    check_proof(leaf_hash(two), 2, 3, [pair], tree)


def test_every_part_of_the_state_is_under_its_root():
    state = busy()
    changes = [
        {"k": 9},
        {"supply": 1},
        {"parameters": replace(PARAMETERS, epoch=1)},
        {"accounts": {**state.accounts, ALICE.address: Account(1, 3)}},
        {"bonds": {}},
        {"unbonding": []},
        {"minted": set()},
        {"slashed": {}},
        {"validators": ()},
        {"next_validators": ()},
        {"models": {}},
        {"models": {id: replace(model, owner=BOB.address) for id, model in state.models.items()}},
        {"layers": {}},
        {"layers": {slot: replace(layer, blob=replace(layer.blob, size=8)) for slot, layer in state.layers.items()}},
        {"layers": {slot: replace(layer, beacon=b"other") for slot, layer in state.layers.items()}},
    ]
    roots = {state.root(), *(replace(state, **change).root() for change in changes)}
    assert len(roots) == 1 + len(changes)
    assert state.copy().root() == state.root()


def test_a_snapshot_is_the_state():
    state = busy()
    rows = state.rows()
    assert {row[1] for row in rows} == set(range(10))
    again = state_of_rows(rows)
    assert again == state
    assert again.root() == state.root()
    assert (
        cut(again, put(BOB, 0, Transfer(ALICE.address, 1))).state
        == cut(state, put(BOB, 0, Transfer(ALICE.address, 1))).state
    )


def broken(change):
    rows = busy().rows()
    change(rows)
    return rows


@pytest.mark.parametrize(
    "rows",
    [
        [],
        broken(lambda rows: rows.pop(0)),
        broken(lambda rows: rows.reverse()),
        broken(lambda rows: rows.append(rows[-1])),
        broken(lambda rows: rows.append(b"\xc0")),
        broken(lambda rows: rows.append(encode([10, []]))),
        broken(lambda rows: rows.append(encode([1, [bytes(20), 1]]))),
        broken(lambda rows: rows.append(encode([True, []]))),
        broken(lambda rows: rows.pop(1)),
        broken(lambda rows: rows.__setitem__(0, encode([0, [0, 10, [10_000, 9, 6, 10, 250_000, 50, 80]]]))),
        broken(lambda rows: rows.insert(1, rows[0])),
        broken(lambda rows: rows.pop(-2)),  # a layer without its model
        broken(lambda rows: rows.__setitem__(-1, encode([9, [MANIFEST.record.id, 2, to_value(BLOB)]]))),
        broken(lambda rows: rows.__setitem__(-2, rows[-2].replace(b"\x08\x93\0", b"\x08\x93\1"))),  # not the first
        [bytes(MAX_ROW + 1)],
    ],
)
def test_what_are_not_the_rows_of_a_state(rows):
    with pytest.raises(RuleError):
        state_of_rows(rows)


HASHES = st.binary(min_size=32, max_size=32)
BLOBS = st.builds(BlobRef, HASHES, st.integers(0, 2**40))
NAMES = st.text("aé☃", min_size=1, max_size=20)
MANIFESTS = st.builds(
    Manifest, NAMES, st.binary(max_size=99), st.lists(NAMES, min_size=1, max_size=4).map(tuple), BLOBS
)
MODELS = st.builds(Model, st.binary(min_size=20, max_size=20), MANIFESTS)


@given(st.dictionaries(HASHES, MODELS, max_size=6), st.data())
@settings(deadline=None)
def test_models_and_layers_survive_a_snapshot_in_their_order(models, data):
    slots = [(id, unit) for id, model in models.items() for unit in range(len(model.manifest.units))]
    drawn = data.draw(st.dictionaries(st.sampled_from(slots), st.tuples(BLOBS, st.binary(max_size=4)))) if slots else {}
    layers = {slot: Layer(*slot, *weights) for slot, weights in drawn.items()}
    state = replace(start(), models=models, layers=layers)
    again = state_of_rows(state.rows())
    assert again == state
    assert list(again.models) == list(models)
    assert again.root() == state.root()
    if len(models) > 1:
        assert replace(state, models=dict(reversed(models.items()))).root() != state.root(), "the order is agreed on"


def test_more_models_than_one_byte_counts_keep_their_order():
    model = Model(ALICE.address, MANIFEST.record.parsed())
    models = {hashlib.sha256(bytes([n % 256, n // 256])).digest(): model for n in range(300)}
    assert list(state_of_rows(replace(start(), models=models).rows()).models) == list(models)


def test_a_row_holds_the_largest_manifest():
    largest = Manifest("m" * 128, bytes(8 * 1024), tuple(f"{n:064}" for n in range(1024)), BLOB)
    state = replace(start(), models={bytes(32): Model(ALICE.address, largest)})
    assert max(map(len, state.rows())) <= MAX_ROW
    assert state_of_rows(state.rows()) == state


def test_a_copy_shares_no_models():
    state = busy()
    other = state.copy()
    other.models.clear()
    other.layers.clear()
    assert state == busy()


def test_parameters_read_back():
    assert Parameters(**{name: getattr(PARAMETERS, name) for name in Parameters.__annotations__}) == PARAMETERS
