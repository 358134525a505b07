from __future__ import annotations

from blyan_node.chain.ledger import Result, Void
from blyan_node.chain.order import Item
from blyan_node.chain.records import Bond, Transfer
from blyan_node.chain.view import Holding, Standing, make_view
from tests.support.chains import NETWORK
from tests.support.money import CARRIER, USERS, VALIDATORS, cut, put, start

ALICE, BOB, _, _ = USERS
PAID = put(ALICE, 0, Transfer(BOB.address, 100), fee=1).record
NEXT = put(ALICE, 1, Transfer(BOB.address, 50)).record
RIVAL = put(ALICE, 1, Transfer(CARRIER.address, 50)).record
TOO_MUCH = put(BOB, 0, Transfer(ALICE.address, 10**6)).record
GAP = put(BOB, 9, Transfer(ALICE.address, 1)).record


def view(*blocks, settled=(), ancestors=frozenset()):
    """A final state in which PAID is final; ``blocks`` are (author, records) one after the other, in no relation."""
    folded = cut(start(), put(ALICE, 0, Transfer(BOB.address, 100), fee=1))
    items = [Item(bytes([n]) * 32, 1 + n, key.address, 0, records) for n, (key, records) in enumerate(blocks)]
    known = {result.id: result for result in (*folded.results, *settled)}
    return make_view(
        folded.state,
        items,
        network=NETWORK,
        reaches=lambda one, other: one == other or (one, other) in ancestors,
        equivocators=frozenset(),
        lookup=known.get,
    )


def test_answers_are_marked_final_or_tentative():
    now = view((VALIDATORS[0], (NEXT, put(ALICE, 2, Bond(BOB.address, 9)).record)))
    assert now.holdings(ALICE.address) == (
        Holding("final", 1, 899, 1, 0, 0),
        Holding("tentative", 2, 840, 3, 9, 0),
    )
    assert now.holdings(BOB.address)[0].balance == 1100
    assert now.holdings(BOB.address)[1].balance == 1150
    assert now.next_nonce(ALICE.address) == 3
    assert now.standing(PAID.id) == Standing("final", None)
    assert now.standing(NEXT.id) == Standing("tentative", None)
    assert now.standing(RIVAL.id) is None
    assert [(line.kind, line.balance) for line in now.movements(BOB.address)] == [("received", 1150)]


def test_where_nothing_is_pending_both_words_say_the_same():
    now = view()
    final, tentative = now.holdings(ALICE.address)
    assert (final.balance, final.nonce) == (tentative.balance, tentative.nonce)
    assert now.movements(ALICE.address) == []


def test_a_double_spend_shows_who_leads():
    blocks = ((VALIDATORS[0], (NEXT,)), (VALIDATORS[1], (RIVAL,)), (VALIDATORS[2], ()))
    now = view(*blocks)
    assert now.standing(NEXT.id) == Standing("tentative", None)
    assert now.standing(RIVAL.id) == Standing("tentative", Void.LOST)
    now = view(*blocks, ancestors={(b"\2" * 32, b"\1" * 32)})
    assert now.standing(RIVAL.id) == Standing("tentative", None)
    assert now.standing(NEXT.id) == Standing("tentative", Void.LOST)


def test_what_is_final_stays_so_though_copies_come():
    now = view((VALIDATORS[0], (PAID,)))
    assert now.standing(PAID.id) == Standing("final", None)
    # lost to a rival: a copy finds the nonce used, and the better reason stands
    old = put(ALICE, 0, Transfer(CARRIER.address, 1)).record
    lost = Result(old.id, Void.LOST)
    assert view((VALIDATORS[0], (old,))).standing(old.id) == Standing("tentative", Void.NONCE_USED)
    assert view((VALIDATORS[0], (old,)), settled=(lost,)).standing(old.id) == Standing("final", Void.LOST)


def test_what_was_void_may_come_again():
    early = Result(NEXT.id, Void.NONCE_GAP)
    assert view(settled=(early,)).standing(NEXT.id) == Standing("final", Void.NONCE_GAP)
    assert view((VALIDATORS[0], (NEXT,)), settled=(early,)).standing(NEXT.id) == Standing("tentative", None)


def test_void_shows_at_once():
    now = view((VALIDATORS[0], (TOO_MUCH, GAP)))
    assert now.standing(TOO_MUCH.id) == Standing("tentative", Void.INSUFFICIENT)
    assert now.standing(GAP.id) == Standing("tentative", Void.NONCE_GAP)
    assert now.next_nonce(BOB.address) == 0, "a void record leaves its nonce to one that is better"
