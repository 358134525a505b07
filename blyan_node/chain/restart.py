"""Restarting a network that lost more than 1/3 of its stake for good: a new genesis from the state at the last cut.

Without 2/3 of the stake no cut is decided, and no rule of the network can change that: only people can. They agree on
the last final cut and on who goes on, each makes the same genesis from their own copy of the state, and the old
validators sign it. Whoever joins sees how much of the old stake stands behind it. Nothing can keep two groups from
restarting apart; the stake that signed tells people which one to follow.

What is carried over, so that the supply stays the same to the last nano-BLY:

* each validator that goes on keeps what it had bonded to itself, as its stake;
* all other money becomes balances of its owners: accounts, everything that others had bonded to anybody, what the
  validators that go on had bonded to others, and money on its way back from a bond (at once: the evidence that it was
  kept within reach for names the old network, and proves nothing in the new one);
* keys that were proven to cheat stay barred from validating;
* the parameters.

What is not: blocks, records and receipts, the paid ones included, since all of them name the old network and none can
be replayed in the new one; nonces, which begin at 0 again for the same reason; and models, which their owners publish
again: the weights lie on the nodes' disks under the same names, so nothing is sent twice. Delegators bond again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace

from blyan_node.chain.genesis import MAX_BARRED, Endorsement, Genesis, Restart
from blyan_node.chain.keys import Key, address_of, digest, recover, show_address
from blyan_node.chain.money import show_bly
from blyan_node.chain.state import State
from blyan_node.codec import encode
from blyan_node.errors import ConfigError, RuleError, SignatureError

RESTART_DOMAIN = b"blyan/restart/1"


def restart_genesis(
    state: State, old: Genesis, cut: bytes, validators: Iterable[bytes], *, name: str, created_ms: int
) -> Genesis:
    """Make the genesis that continues ``old`` from its state after the final cut of id ``cut``, without signatures.

    ``validators`` are the old ones that go on. Raises ConfigError where one of them cannot, and where the genesis would
    break a bound: of more than MAX_BALANCES owners of money not all fit.
    """
    stakes = {address: _stake_of(state, address) for address in validators}
    balances: defaultdict[bytes, int] = defaultdict(int)
    for address, account in state.accounts.items():
        balances[address] += account.balance
    for (validator, owner), amount in state.bonds.items():
        if validator != owner or owner not in stakes:
            balances[owner] += amount
    for unbonding in state.unbonding:
        balances[unbonding.owner] += unbonding.amount
    if len(state.slashed) > MAX_BARRED:
        raise ConfigError(f"{len(state.slashed)} keys were proven to cheat; a genesis bars at most {MAX_BARRED}")
    return Genesis.make(
        name,
        stakes,
        created_ms=created_ms,
        parameters=state.parameters,
        balances={address: amount for address, amount in balances.items() if amount},
        restart=Restart(old.network, state.k, cut, state.root(), state.validators, tuple(sorted(state.slashed))),
    )


def check_restart(genesis: Genesis, state: State, old: Genesis, cut: bytes) -> None:
    """Check that a genesis is what :func:`restart_genesis` makes of one's own copy of the state.

    Raises RuleError that names the difference: what nobody compared is not worth a signature.
    """
    if (restart := genesis.restart) is None:
        raise RuleError("this genesis restarts no network: there is nothing to sign")
    if restart.network != old.network:
        raise RuleError(f"it restarts network {restart.network.hex()}, not this one, {old.network.hex()}")
    if (restart.k, restart.cut) != (state.k, cut):
        raise RuleError(
            f"it restarts from cut {restart.k} ({restart.cut.hex()}); the last final cut here is {state.k} "
            f"({cut.hex()}). From an earlier cut it would undo final payments; if yours is the earlier one, let your "
            "node catch up first"
        )
    going_on = [validator.address for validator in genesis.validators]
    try:
        expected = restart_genesis(state, old, cut, going_on, name=genesis.name, created_ms=genesis.created_ms)
    except ConfigError as error:
        raise RuleError(f"it cannot follow from the state here: {error}") from error
    if expected.network != genesis.network:
        raise RuleError("its stakes, balances or parameters are not those of the state here")


def sign_genesis(genesis: Genesis, key: Key) -> Genesis:
    """Return the genesis with the signature of an old validator added.

    Raises RuleError where the genesis restarts no network, or not one of the key's.
    """
    if key.address not in _old_stakes(genesis):
        raise RuleError(f"{show_address(key.address)} was no validator of the old network at its last cut")
    signatures = {each.address: each for each in genesis.signatures}
    signatures[key.address] = Endorsement(key.address, key.sign(_message(genesis)))
    return replace(genesis, signatures=tuple(signatures[address] for address in sorted(signatures)))


def check_signatures(genesis: Genesis) -> int:
    """Return how much of the old stake, ``genesis.restart.stake``, has signed, in nano-BLY.

    Raises RuleError for a genesis without a restart and for a signer that was no validator, SignatureError for a
    signature that is not its signer's. The old stakes are what the genesis claims; whoever has the old network's state
    compares them by :func:`check_restart`.
    """
    stakes, signed = _old_stakes(genesis), 0
    for each in genesis.signatures:
        if each.address not in stakes:
            raise RuleError(f"{show_address(each.address)} signed the restart and was no validator of the old network")
        if address_of(recover(_message(genesis), each.signature)) != each.address:
            raise SignatureError(f"the signature of {show_address(each.address)} is of another key or another genesis")
        signed += stakes[each.address]
    return signed


def _message(genesis: Genesis) -> bytes:
    """What is signed: digest("blyan/restart/1", id of the new network)."""
    return digest(RESTART_DOMAIN, encode(genesis.network))


def _old_stakes(genesis: Genesis) -> dict[bytes, int]:
    if genesis.restart is None:
        raise RuleError("this genesis restarts no network")
    return {validator.address: validator.stake for validator in genesis.restart.validators}


def _stake_of(state: State, address: bytes) -> int:
    """Return what a validator that goes on had bonded to itself. Raises ConfigError where it cannot go on."""
    shown, least = show_address(address), state.parameters.min_stake
    if address not in {validator.address for validator in state.validators}:
        raise ConfigError(f"{shown} is no validator of this network: only its validators can go on")
    if address in state.slashed:
        raise ConfigError(f"{shown} was proven to cheat and cannot go on")
    if (stake := state.bonds.get((address, address), 0)) < least:
        raise ConfigError(
            f"{shown} has bonded {show_bly(stake)} BLY of its own, less than the least stake, {show_bly(least)}; what "
            "others bonded to it goes back to them"
        )
    return stake
