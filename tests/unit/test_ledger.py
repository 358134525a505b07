from __future__ import annotations

from dataclasses import replace

import pytest

from blyan_node.chain.keys import Key
from blyan_node.chain.ledger import Receipt, Result, Void
from blyan_node.chain.records import (
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
    sign_record,
)
from blyan_node.chain.state import Model
from tests.support.chains import KEYS, NETWORK, STRANGER
from tests.support.money import (
    CARRIER,
    USERS,
    VALIDATORS,
    carry,
    cut,
    double_block,
    double_vote,
    put,
    signed_header,
    signed_vote,
    start,
)

ALICE, BOB, CAROL, DAVE = USERS
VALIDATOR = VALIDATORS[0]


def voids(folded) -> list[Void | None]:
    return [result.void for result in folded.results]


def balance(state, key: Key) -> int:
    return state.account(key.address).balance


def run(state, cuts: int):
    for _ in range(cuts):
        state = cut(state).state
        assert state.total() == state.supply
    return state


# What records do


def test_a_transfer_moves_money_and_its_fee_goes_to_the_carrier():
    before = start()
    folded = cut(before, put(ALICE, 0, Transfer(BOB.address, 300), fee=7))
    state = folded.state
    assert voids(folded) == [None]
    assert (balance(state, ALICE), balance(state, BOB), balance(state, CARRIER)) == (693, 1300, 7)
    assert state.account(ALICE.address).nonce == 1
    assert (state.k, state.supply, state.total()) == (1, 4300, 4300)
    assert (before.k, balance(before, ALICE)) == (0, 1000), "the state before stays as it was"


def test_a_transfer_to_oneself_and_one_carried_by_its_sender_change_nothing():
    state = cut(start(), put(ALICE, 0, Transfer(ALICE.address, 1000))).state
    assert balance(state, ALICE) == 1000
    own = replace(put(ALICE, 1, Transfer(BOB.address, 1), fee=999), author=ALICE.address)
    folded = cut(state, own)
    assert voids(folded) == [None]
    assert balance(folded.state, ALICE) == 999


def test_records_of_one_sender_count_by_nonce_wherever_they_stand():
    records = [put(ALICE, nonce, Transfer(BOB.address, 10**nonce)) for nonce in range(3)]
    expected = cut(start(), *records)
    for one, two, three in [(0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]:
        folded = cut(start(), records[one], records[two], records[three])
        assert folded.state == expected.state
        assert voids(folded) == [None] * 3


def test_a_bond_counts_two_cuts_after_the_end_of_its_epoch():
    state = cut(start(), put(ALICE, 0, Bond(DAVE.address, 200)), put(BOB, 0, Bond(DAVE.address, 50))).state
    assert state.bonded_by(ALICE.address) == {DAVE.address: 200}
    assert balance(state, ALICE) == 800
    assert not state.may_author(DAVE.address)
    state = run(state, 2)  # cut 3 ends the epoch
    assert DAVE.address not in state.stake()
    assert state.may_author(DAVE.address), "it may write as soon as it is sure to validate"
    state = run(state, 1)
    assert state.stake()[DAVE.address] == 250


def test_unbonded_money_comes_back_when_the_period_is_over():
    folded = cut(start(), put(VALIDATOR, 0, Unbond(VALIDATOR.address, 60)))
    state = folded.state
    assert voids(folded) == [None]
    assert state.bonds[VALIDATOR.address, VALIDATOR.address] == 40
    for _ in range(5):
        assert balance(state, VALIDATOR) == 0
        assert not state.is_due()
        state = run(state, 1)
    assert state.is_due()
    state = run(state, 1)
    assert (state.k, balance(state, VALIDATOR)) == (7, 60)
    assert not state.is_due()
    assert state.stake()[VALIDATOR.address] == 40


def test_who_unbonds_all_leaves_the_set_and_until_then_can_be_slashed():
    state = cut(start(), put(VALIDATOR, 0, Unbond(VALIDATOR.address, 100))).state
    assert VALIDATOR.address in run(state, 2).stake()
    assert VALIDATOR.address not in run(state, 3).stake()
    folded = cut(run(state, 4), put(ALICE, 0, double_block(VALIDATOR)))
    assert voids(folded) == [None]
    assert balance(run(folded.state, 1), VALIDATOR) == 75


def test_a_faucet_makes_money_up_to_its_limit_in_each_cut():
    folded = cut(
        start(),
        put(STRANGER, 0, Faucet(STRANGER.address, 50)),
        put(ALICE, 0, Faucet(BOB.address, 31)),
        put(CAROL, 0, Faucet(BOB.address, 30)),
    )
    assert voids(folded) == [None, Void.FAUCET_LIMIT, None]
    assert (folded.state.supply, folded.state.total()) == (4380, 4380)
    again = cut(folded.state, put(STRANGER, 1, Faucet(STRANGER.address, 50)))
    assert voids(again) == [None]
    assert balance(again.state, STRANGER) == 100


@pytest.mark.parametrize("prove", [double_vote, double_block])
def test_a_proven_cheat_loses_a_part_of_its_stake_and_its_place(prove):
    state = cut(start(), put(ALICE, 0, Bond(VALIDATOR.address, 43))).state
    state = cut(state, put(ALICE, 1, Unbond(VALIDATOR.address, 2))).state
    folded = cut(state, put(BOB, 0, prove(VALIDATOR)))
    assert voids(folded) == [None]
    state = folded.state
    assert state.supply == state.total() == 4300 - 25 - 10  # a quarter of 100 and of 41, rounded down; of 2, nothing
    assert not state.may_author(VALIDATOR.address)
    assert VALIDATOR.address not in {validator.address for validator in state.next_validators}
    state = run(state, 6)
    assert (balance(state, VALIDATOR), balance(state, ALICE)) == (75, 957 + 2 + 31)
    assert voids(cut(state, put(BOB, 1, prove(VALIDATOR)))) == [Void.NO_STAKE]


BLOBS = [BlobRef(bytes([number]) * 32, number) for number in range(3)]
MANIFEST = put(ALICE, 0, Manifest("m", b"{}", ("a", "b"), BLOBS[0]), fee=5)
MODEL = MANIFEST.record.id


def test_a_manifest_makes_a_model_and_its_owner_gives_it_layers():
    folded = cut(start(), MANIFEST, put(ALICE, 1, Layer(MODEL, 1, BLOBS[1]), fee=5))
    assert voids(folded) == [None, None]
    state = folded.state
    assert state.models == {MODEL: Model(ALICE.address, MANIFEST.record.parsed())}
    assert state.layers == {(MODEL, 1): Layer(MODEL, 1, BLOBS[1])}
    assert (balance(state, ALICE), balance(state, CARRIER)) == (990, 10)
    assert [(line.kind, line.amount, line.fee) for line in folded.movements if line.address == ALICE.address] == [
        ("manifest", 0, 5),
        ("layer", 0, 5),
    ]


def test_the_owner_s_later_layer_replaces_the_earlier_wherever_they_stand():
    layers = [put(ALICE, 1 + number, Layer(MODEL, 0, blob)) for number, blob in enumerate(BLOBS)]
    for records in ([MANIFEST, *layers], [*reversed(layers), MANIFEST], [layers[1], MANIFEST, layers[2], layers[0]]):
        folded = cut(start(), *records)
        assert voids(folded) == [None] * 4
        assert folded.state.layers == {(MODEL, 0): Layer(MODEL, 0, BLOBS[2])}
    state = cut(start(), MANIFEST, layers[0]).state
    folded = cut(cut(state, layers[1]).state, layers[0])
    assert voids(folded) == [Void.NONCE_USED], "an old record, carried in again, takes nothing back"
    assert folded.state.layers == {(MODEL, 0): Layer(MODEL, 0, BLOBS[1])}


def test_two_owners_cannot_publish_each_other_s_layers():
    """Of two models with one manifest, each stays its sender's: whoever copies a manifest gains nothing by it."""
    copy = put(BOB, 0, MANIFEST.record.parsed())
    state = cut(start(), MANIFEST, copy).state
    assert [model.owner for model in state.models.values()] == [ALICE.address, BOB.address]
    models = {ALICE: MODEL, BOB: copy.record.id}
    for key, other in ((ALICE, BOB), (BOB, ALICE)):
        assert voids(cut(state, put(key, 1, Layer(models[other], 0, BLOBS[1])))) == [Void.NOT_OWNER]
        folded = cut(state, put(key, 1, Layer(models[key], 0, BLOBS[1])))
        assert voids(folded) == [None]
        assert folded.state.layers == {(models[key], 0): Layer(models[key], 0, BLOBS[1])}


def test_models_stand_in_the_order_in_which_their_manifests_took_effect():
    first, second = (put(key, nonce, MANIFEST.record.parsed()) for key, nonce in ((BOB, 1), (ALICE, 0)))
    before = put(BOB, 0, Transfer(ALICE.address, 1))
    assert list(cut(start(), first, second, before).state.models) == [second.record.id, first.record.id]
    assert list(cut(start(), before, first, second).state.models) == [first.record.id, second.record.id]


def test_a_layer_before_its_manifest_is_void():
    later = make_record(ALICE, NETWORK, MANIFEST.record.parsed(), nonce=1)
    folded = cut(start(), put(ALICE, 0, Layer(later.id, 0, BLOBS[1])), carry(later))
    assert voids(folded) == [Void.NO_MODEL, Void.NONCE_GAP]
    assert (folded.state.models, folded.state.layers) == ({}, {})


# What makes a record void: each with its neighbour that is not


PAY = Transfer(BOB.address, 100)
BROKEN = carry(sign_record(ALICE, NETWORK, "transfer", b"\x90", nonce=0, fee=1))
UNKNOWN = carry(sign_record(ALICE, NETWORK, "perpetuum", b"", nonce=0, fee=1))


@pytest.mark.parametrize(
    ("void", "good", "bad", "parameters"),
    [
        (Void.TWIN_UNITS, MANIFEST, put(ALICE, 0, Manifest("m", b"{}", ("a", "a"), BLOBS[0])), {}),
        (Void.LOST, put(ALICE, 0, PAY), carry(put(ALICE, 0, PAY).record, lost_to=bytes(32)), {}),
        (Void.EXPIRED, put(ALICE, 0, PAY, expires_at_cut=1), put(ALICE, 0, PAY, expires_at_cut=0), {}),
        (Void.NONCE_GAP, put(ALICE, 0, PAY), put(ALICE, 1, PAY), {}),
        (Void.NO_FEE, put(ALICE, 0, PAY, fee=900), put(ALICE, 0, PAY, fee=1001), {}),
        (
            Void.NO_FEE,
            put(VALIDATOR, 0, Unbond(VALIDATOR.address, 10)),
            put(VALIDATOR, 0, Unbond(VALIDATOR.address, 10), fee=1),
            {},
        ),
        (
            Void.NO_FEE,
            put(ALICE, 0, double_vote(VALIDATOR), fee=1000),
            put(ALICE, 0, double_vote(VALIDATOR), fee=1001),
            {},
        ),
        (Void.MALFORMED, put(ALICE, 0, PAY), BROKEN, {}),
        (Void.MALFORMED, put(ALICE, 0, PAY), UNKNOWN, {}),
        (
            Void.INSUFFICIENT,
            put(ALICE, 0, Transfer(BOB.address, 990), fee=10),
            put(ALICE, 0, Transfer(BOB.address, 991), fee=10),
            {},
        ),
        (
            Void.INSUFFICIENT,
            put(ALICE, 0, Bond(VALIDATOR.address, 1000)),
            put(ALICE, 0, Bond(VALIDATOR.address, 1001)),
            {},
        ),
        (
            Void.NOT_BONDED,
            put(VALIDATOR, 0, Unbond(VALIDATOR.address, 100)),
            put(VALIDATOR, 0, Unbond(VALIDATOR.address, 101)),
            {},
        ),
        (Void.NOT_BONDED, put(VALIDATOR, 0, Unbond(VALIDATOR.address, 1)), put(ALICE, 0, Unbond(ALICE.address, 1)), {}),
        (
            Void.FAUCET_LIMIT,
            put(ALICE, 0, Faucet(ALICE.address, 50)),
            put(ALICE, 0, Faucet(ALICE.address, 51)),
            {},
        ),
        (
            Void.CAP,
            put(ALICE, 0, Faucet(ALICE.address, 5)),
            put(ALICE, 0, Faucet(ALICE.address, 6)),
            {"cap": 4305},
        ),
        (
            Void.NO_PROOF,
            put(ALICE, 0, double_vote(VALIDATOR)),
            put(ALICE, 0, Evidence("double-vote", signed_vote(VALIDATOR), signed_vote(VALIDATOR))),
            {},
        ),
        (Void.NO_STAKE, put(ALICE, 0, double_vote(VALIDATOR)), put(ALICE, 0, double_vote(BOB)), {}),
    ],
)
def test_what_makes_a_record_void(void, good, bad, parameters):
    state = start(**parameters)
    assert voids(cut(state, good)) == [None]
    folded = cut(state, bad)
    assert voids(folded) == [void]
    assert void.value[0].islower()
    assert folded.movements == ()
    assert folded.state == cut(state).state, "what is void changes nothing"


@pytest.mark.parametrize(
    ("void", "bad"),
    [
        (Void.NO_MODEL, put(ALICE, 1, Layer(bytes(32), 0, BLOBS[1]))),
        (Void.NOT_OWNER, put(BOB, 0, Layer(MODEL, 0, BLOBS[1]))),
        (Void.NO_UNIT, put(ALICE, 1, Layer(MODEL, 2, BLOBS[1]))),
        (Void.NO_FEE, put(ALICE, 1, Layer(MODEL, 1, BLOBS[1]), fee=996)),
    ],
)
def test_what_makes_a_layer_void(void, bad):
    state = cut(start(), MANIFEST).state
    assert voids(cut(state, put(ALICE, 1, Layer(MODEL, 1, BLOBS[1]), fee=995))) == [None]
    folded = cut(state, bad)
    assert voids(folded) == [void]
    assert folded.movements == ()
    assert folded.state == cut(state).state


def test_reasons_keep_their_places():
    """Results are stored by the number of their reason: new ones go to the end."""
    assert [void.name for void in Void] == [
        *("LOST", "EXPIRED", "NONCE_USED", "NONCE_GAP", "NO_FEE", "MALFORMED", "INSUFFICIENT", "NOT_BONDED", "CHEATED"),
        *("NO_FAUCET", "FAUCET_LIMIT", "CAP", "NO_PROOF", "NO_STAKE", "MINTED"),
        *("TWIN_UNITS", "NO_MODEL", "NOT_OWNER", "NO_UNIT"),
    ]


def test_a_used_nonce_is_void_and_makes_no_history():
    pay = put(ALICE, 0, PAY)
    state = cut(start(), pay).state
    folded = cut(state, pay)
    assert folded.results == (Result(pay.record.id, Void.NONCE_USED),)
    assert folded.movements == ()
    assert folded.state == cut(state).state
    assert voids(cut(state, put(ALICE, 1, PAY))) == [None]


def test_a_cheat_takes_no_more_bonds():
    bond = put(ALICE, 0, Bond(VALIDATOR.address, 10))
    assert voids(cut(start(), bond)) == [None]
    assert voids(cut(start(), put(BOB, 0, double_vote(VALIDATOR)), bond)) == [None, Void.CHEATED]


def test_there_is_no_faucet_but_on_test_nets():
    ask = put(ALICE, 0, Faucet(ALICE.address, 1))
    assert voids(cut(start(faucet_per_cut=0, faucet_per_record=0), ask)) == [Void.NO_FAUCET]
    assert voids(cut(start(), ask)) == [None]


# Money that comes later in the cut, and copies that stand too early


def test_a_payment_waits_within_the_cut_for_the_money_it_spends():
    late = [put(STRANGER, 0, Transfer(BOB.address, 90), fee=10), put(ALICE, 0, Transfer(STRANGER.address, 100))]
    folded = cut(start(), *late)
    assert voids(folded) == [None, None]
    assert (balance(folded.state, STRANGER), balance(folded.state, BOB)) == (0, 1090)
    assert folded.state == cut(start(), *reversed(late)).state
    assert voids(cut(start(), late[0])) == [Void.NO_FEE]
    bond = put(CARRIER, 0, Bond(VALIDATOR.address, 5))
    fee = put(ALICE, 0, PAY, fee=5)
    assert voids(cut(start(), bond, fee)) == [None, None], "a carrier can spend the fees of the cut"
    assert voids(cut(start(), bond)) == [Void.INSUFFICIENT]


def test_a_copy_in_a_cut_without_the_money_does_not_spoil_the_payment():
    """Whoever brings a payment's record into an earlier cut than the money for it delays it at most."""
    payment, money = put(STRANGER, 0, Transfer(BOB.address, 100)), put(ALICE, 0, Transfer(STRANGER.address, 100))
    folded = cut(start(), payment)
    assert voids(folded) == [Void.INSUFFICIENT]
    folded = cut(folded.state, money, payment)
    assert voids(folded) == [None, None]
    assert balance(folded.state, BOB) == 1100


def test_a_cheat_is_punished_once():
    folded = cut(start(), put(ALICE, 0, double_vote(VALIDATOR)), put(ALICE, 1, double_block(VALIDATOR)))
    assert voids(folded) == [None, Void.NO_STAKE]
    assert folded.state.supply == folded.state.total() == 4275


def test_a_record_behind_one_that_cannot_pay_waits_in_vain():
    folded = cut(start(), put(ALICE, 1, PAY), put(ALICE, 0, PAY, fee=2000))
    assert sorted(void.name for void in voids(folded)) == ["NONCE_GAP", "NO_FEE"]


# Evidence


@pytest.mark.parametrize(
    "evidence",
    [
        Evidence("double-nothing", signed_vote(VALIDATOR), signed_vote(VALIDATOR, value=None)),
        Evidence("double-vote", signed_vote(VALIDATOR), signed_vote(VALIDATORS[1], value=None)),
        Evidence("double-vote", signed_vote(VALIDATOR), signed_vote(VALIDATOR, k=6, value=None)),
        Evidence("double-vote", signed_vote(VALIDATOR), signed_vote(VALIDATOR, in_round=1, value=None)),
        Evidence("double-vote", signed_vote(VALIDATOR), signed_vote(VALIDATOR, step=1, value=None)),
        Evidence(
            "double-vote",
            signed_vote(VALIDATOR, network=bytes(32)),
            signed_vote(VALIDATOR, network=bytes(32), value=None),
        ),
        Evidence("double-vote", signed_vote(VALIDATOR), Signed(b"\x90", bytes(65))),
        Evidence("double-vote", signed_vote(VALIDATOR), Signed(signed_vote(VALIDATOR, value=None).payload, bytes(65))),
        Evidence("double-block", signed_header(VALIDATOR), signed_header(VALIDATOR)),
        Evidence("double-block", signed_header(VALIDATOR), signed_header(VALIDATOR, seq=1, prev=None)),
        Evidence("double-block", signed_header(VALIDATOR), signed_header(VALIDATORS[1])),
        Evidence(
            "double-block",
            signed_header(VALIDATOR, author=VALIDATORS[1].address),
            signed_header(VALIDATOR, author=VALIDATORS[1].address, type="other"),
        ),
        Evidence(
            "double-block",
            signed_header(VALIDATOR, network=bytes(32)),
            signed_header(VALIDATOR, network=bytes(32), type="other"),
        ),
    ],
)
def test_evidence_that_proves_nothing_harms_nobody(evidence):
    folded = cut(start(), put(ALICE, 0, evidence))
    assert voids(folded) == [Void.NO_PROOF]
    assert folded.state.slashed == {}
    assert folded.state.supply == 4300


# Receipts


def test_a_receipt_mints_once_and_never_above_the_cap():
    receipt = Receipt(b"\1" * 32, BOB.address, 0, 500)
    folded = cut(start(cap=5000), receipts=(receipt, receipt))
    assert voids(folded) == [None, Void.MINTED]
    state = folded.state
    assert (state.supply, state.total(), balance(state, BOB)) == (4800, 4800, 1500)
    assert voids(cut(state, receipts=(receipt,))) == [Void.MINTED]
    assert voids(cut(state, receipts=(replace(receipt, amount=1),))) == [Void.MINTED], "the amount is no part of the id"
    assert voids(cut(state, receipts=(replace(receipt, index=1, amount=201),))) == [Void.CAP]
    assert voids(cut(state, receipts=(replace(receipt, index=1, amount=200),))) == [None]


def test_the_parts_of_a_receipt_s_id():
    receipt = Receipt(b"\1" * 32, BOB.address, 0, 500)
    others = [
        replace(receipt, delta=b"\2" * 32),
        replace(receipt, payee=ALICE.address),
        replace(receipt, index=1),
    ]
    assert len({each.id for each in [receipt, *others]}) == 4
    assert receipt.id.hex() == "fa6dc279744dcb1e15d028fc2faecab01b8db5c7c7986a7c4c71d9604b7ae129"


# Histories


def test_a_history_tells_what_happened_and_the_balance_after():
    folded = cut(
        start(),
        put(ALICE, 0, Transfer(BOB.address, 300), fee=7),
        put(BOB, 0, Bond(VALIDATOR.address, 100)),
        put(CAROL, 0, Transfer(BOB.address, 2000), fee=1),
        put(DAVE, 7, Transfer(BOB.address, 1)),
        put(BOB, 1, Faucet(DAVE.address, 5)),
        put(BOB, 2, double_vote(VALIDATOR)),
        receipts=(Receipt(bytes(32), ALICE.address, 0, 9),),
    )
    lines = [(m.address, m.kind, m.other, m.amount, m.fee, m.balance) for m in folded.movements]
    a, b, d, v = (key.address for key in (ALICE, BOB, DAVE, VALIDATOR))
    assert lines == [
        (b, "received", a, 300, 0, 1300),
        (a, "transfer", b, 300, 7, 693),
        (CARRIER.address, "fee", a, 7, 0, 7),
        (b, "bond", v, 100, 0, 1200),
        (d, "received", b, 5, 0, 1005),
        (b, "faucet", d, 5, 0, 1200),
        *sorted([(b, "slashed", v, 25, 0, 1200), (v, "slashed", v, 25, 0, 0)]),
        (b, "evidence", None, 0, 0, 1200),
        (a, "reward", None, 9, 0, 702),
    ]
    assert [(m.k, m.index) for m in folded.movements] == [(1, index) for index in range(10)]
    released = run(folded.state, 5)
    lines = [(m.address, m.kind, m.other, m.amount, m.balance) for m in cut(released).movements]
    assert lines == sorted([(v, "released", v, 75, 75), (b, "released", v, 75, 1275)])


def test_all_keys_of_these_tests_differ():
    assert len({key.address for key in KEYS} | {STRANGER.address}) == 9
