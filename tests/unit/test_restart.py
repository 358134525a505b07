"""Restarting a network from its last final state: nothing is lost, nothing is made, and only the old ones sign."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blyan_node.chain.genesis import MAX_BALANCES, MAX_BARRED, Endorsement, Genesis, Validator, parse_genesis
from blyan_node.chain.keys import digest
from blyan_node.chain.records import Bond, Transfer, Unbond
from blyan_node.chain.restart import check_restart, check_signatures, restart_genesis, sign_genesis
from blyan_node.chain.state import Account, State, Unbonding, genesis_state
from blyan_node.codec import encode
from blyan_node.errors import ConfigError, RuleError, SignatureError
from tests.support.chains import STRANGER
from tests.support.money import PARAMETERS, STAKES, USERS, VALIDATORS, cut, double_vote, put, start

ONE, TWO, CHEAT = VALIDATORS
ALICE, BOB, CAROL, _ = USERS
CUT = b"\7" * 32
GOING_ON = [TWO.address, ONE.address]


def lived() -> State:
    """Three validators of 100 each, two of them bonded to by others; one proven to cheat; money on its way back."""
    state = cut(
        start(),
        put(ALICE, 0, Bond(ONE.address, 40)),
        put(ALICE, 1, Bond(BOB.address, 20)),
        put(BOB, 0, Bond(TWO.address, 30)),
        put(ONE, 0, Unbond(ONE.address, 10)),
        put(CAROL, 0, double_vote(CHEAT)),
    ).state
    return cut(state, put(BOB, 1, Unbond(TWO.address, 5)), put(BOB, 2, Transfer(ONE.address, 7))).state


def restarted(state: State | None = None, **options: object) -> Genesis:
    given = {"name": "again", "created_ms": 1} | options
    return restart_genesis(state or lived(), STAKES, CUT, GOING_ON, **given)


def test_everyone_keeps_what_they_own():
    old = lived()
    assert old.unbonding
    genesis = restarted(old)
    assert {each.address: each.stake for each in genesis.validators} == {ONE.address: 90, TWO.address: 100}
    balances = {each.address: each.amount for each in genesis.balances}
    assert balances[ALICE.address] == 1000
    assert balances[BOB.address] == 993
    assert balances[ONE.address] == 10 + 7
    assert balances[CHEAT.address] == 75  # a quarter was burnt
    assert genesis.supply == old.supply == old.total()
    assert genesis.parameters == old.parameters


def test_what_the_new_genesis_says_of_the_old_network():
    old = lived()
    genesis = restarted(old)
    assert genesis.restart is not None
    assert (genesis.restart.network, genesis.restart.k, genesis.restart.cut) == (STAKES.network, 2, CUT)
    assert genesis.restart.state_root == old.root()
    assert genesis.restart.validators == old.validators
    assert genesis.restart.barred == (CHEAT.address,)
    again = genesis_state(genesis)
    assert again.slashed == {CHEAT.address: 0}
    assert not cut(again, put(ALICE, 0, Bond(CHEAT.address, 50))).state.bonds.get((CHEAT.address, ALICE.address))


ADDRESSES = st.sampled_from([bytes([number]) * 20 for number in range(12)])
AMOUNTS = st.integers(1, 1000)


@st.composite
def states(draw: st.DrawFn) -> tuple[State, list[bytes]]:
    """Any state whose money adds up, and validators of it that can go on."""
    chosen = draw(st.lists(ADDRESSES, min_size=1, max_size=5, unique=True))
    bonds = draw(st.dictionaries(st.tuples(ADDRESSES, ADDRESSES), AMOUNTS))
    bonds |= {(address, address): draw(st.integers(PARAMETERS.min_stake, 1000)) for address in chosen}
    accounts = draw(st.dictionaries(ADDRESSES, st.builds(Account, st.integers(0, 1000), st.integers(0, 9))))
    hashes = st.binary(min_size=32, max_size=32)
    unbonding = draw(st.lists(st.builds(Unbonding, st.integers(1, 99), hashes, ADDRESSES, ADDRESSES, AMOUNTS)))
    state = State(
        replace(PARAMETERS, cap=10**18),
        k=draw(st.integers(0, 2**40)),
        accounts=accounts,
        bonds=bonds,
        unbonding=unbonding,
        minted=draw(st.sets(hashes, max_size=3)),
        slashed=dict.fromkeys(draw(st.sets(ADDRESSES)) - set(chosen), 1),
        validators=tuple(Validator(address, draw(AMOUNTS)) for address in sorted(chosen)),
    )
    return replace(state, supply=state.total()), chosen


@given(states(), st.randoms())
def test_the_supply_is_exact_and_one_state_makes_one_genesis(given, random):
    state, chosen = given
    genesis = restart_genesis(state, STAKES, CUT, chosen, name="again", created_ms=1)
    assert genesis.supply == genesis_state(genesis).total() == state.supply
    random.shuffle(chosen)
    assert restart_genesis(state, STAKES, CUT, chosen, name="again", created_ms=1).network == genesis.network
    again = parse_genesis(genesis.to_toml())
    assert (again, again.network) == (genesis, genesis.network)
    check_restart(again, state, STAKES, CUT)
    owners = {address for address, account in state.accounts.items() if account.balance}
    owners |= {owner for _, owner in state.bonds} | {each.owner for each in state.unbonding}
    assert {each.address for each in genesis.balances} <= owners


def with_bond(amount: int) -> State:
    state = start()
    state.bonds[ONE.address, ONE.address] = amount
    state.bonds[ONE.address, ALICE.address] = 100 - amount
    return state


@pytest.mark.parametrize(
    ("state", "going_on", "told"),
    [
        (start, [ALICE.address], "is no validator"),
        (lambda: replace(start(), slashed={ONE.address: 1}), [ONE.address], "proven to cheat"),
        (lambda: with_bond(9), [ONE.address], "less than the least stake.*goes back"),
        (start, [], "0 is outside 1..100"),
        (
            lambda: replace(start(), slashed={bytes([i, j]) * 10: 1 for i in range(6) for j in range(200)}),
            [],
            "1200 keys",
        ),
        (
            lambda: replace(start(), accounts={i.to_bytes(20): Account(1) for i in range(MAX_BALANCES + 1)}),
            [ONE.address, TWO.address, CHEAT.address],
            f"at most {MAX_BALANCES} balances, not {MAX_BALANCES + 1}",
        ),
    ],
)
def test_who_or_what_cannot_go_on(state, going_on, told):
    with pytest.raises(ConfigError, match=told):
        restart_genesis(state(), STAKES, CUT, going_on, name="again", created_ms=1)
    assert MAX_BARRED < 1200


def test_signatures_stand_outside_the_id_and_survive_the_file():
    genesis = restarted()
    signed = sign_genesis(sign_genesis(genesis, TWO), ONE)
    assert signed.network == genesis.network
    assert signed == genesis
    again = parse_genesis(signed.to_toml())
    assert again.signatures == signed.signatures
    assert [each.address for each in again.signatures] == sorted([ONE.address, TWO.address])
    assert sign_genesis(again, ONE).signatures == again.signatures
    message = digest(b"blyan/restart/1", encode(genesis.network))
    assert Endorsement(ONE.address, ONE.sign(message)) in again.signatures


def test_how_much_of_the_old_stake_signed():
    genesis = restarted()
    total = genesis.restart.stake
    assert total == 300
    assert check_signatures(genesis) == 0
    assert check_signatures(sign_genesis(genesis, ONE)) == 100
    assert check_signatures(sign_genesis(sign_genesis(genesis, ONE), TWO)) == 200


def test_signatures_that_are_none():
    genesis = restarted()
    with pytest.raises(RuleError, match="was no validator"):
        sign_genesis(genesis, STRANGER)
    of_another = sign_genesis(restarted(created_ms=2), ONE).signatures
    with pytest.raises(SignatureError, match="another key or another genesis"):
        check_signatures(replace(genesis, signatures=of_another))
    forged = replace(sign_genesis(genesis, ONE).signatures[0], address=TWO.address)
    with pytest.raises(SignatureError):
        check_signatures(replace(genesis, signatures=(forged,)))
    with pytest.raises(SignatureError):
        check_signatures(replace(genesis, signatures=(Endorsement(ONE.address, b"\xff" * 65),)))
    stranger = replace(forged, address=STRANGER.address)
    with pytest.raises(RuleError, match="was no validator"):
        check_signatures(replace(genesis, signatures=(stranger,)))
    for act in (check_signatures, lambda plain: sign_genesis(plain, ONE)):
        with pytest.raises(RuleError, match="restarts no network"):
            act(STAKES)


def test_a_restart_is_compared_with_ones_own_state():
    state = lived()
    genesis = restarted(state)
    check_restart(genesis, state, STAKES, CUT)
    further = cut(state, put(ALICE, 2, Transfer(BOB.address, 1))).state
    other = state.copy()
    other.accounts[ALICE.address] = Account(1, 5)
    richer = Genesis.make(
        "again",
        {each.address: each.stake for each in genesis.validators},
        created_ms=1,
        parameters=genesis.parameters,
        balances={each.address: each.amount for each in genesis.balances} | {STRANGER.address: 1},
        restart=genesis.restart,
    )
    foreign = replace(STAKES, name="foreign")
    cases = [
        (genesis, further, STAKES, CUT, "from cut 2 .* here is 3"),
        (genesis, state, STAKES, b"\1" * 32, "last final cut here"),
        (genesis, other, STAKES, CUT, "not those of the state here"),
        (richer, state, STAKES, CUT, "not those of the state here"),
        (genesis, state, foreign, CUT, "not this one"),
        (genesis, replace(state, slashed={ONE.address: 1}), STAKES, CUT, "cannot follow"),
        (STAKES, state, STAKES, CUT, "nothing to sign"),
    ]
    for each, known, old, last, told in cases:
        with pytest.raises(RuleError, match=told):
            check_restart(each, known, old, last)
