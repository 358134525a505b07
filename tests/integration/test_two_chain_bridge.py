"""The test plan's two chains and the bridge between them."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal

import pytest

from blyan_node.chain.bridge import CrossChainBridge, PoLChain, TransactionChain
from blyan_node.chain.genesis import Genesis
from blyan_node.chain.keys import parse_address
from blyan_node.chain.ledger import Receipt
from blyan_node.chain.order import Carried
from blyan_node.chain.records import Transfer, make_record
from blyan_node.chain.state import genesis_state
from blyan_node.errors import RequestError, RuleError
from tests.support.chains import KEYS
from tests.support.money import PARAMETERS

ADDRESS = "0x123"


@pytest.fixture
def chains():
    tx_chain, pol_chain = TransactionChain(), PoLChain()
    return tx_chain, pol_chain, CrossChainBridge(tx_chain, pol_chain)


def test_two_chain_bridge(chains):
    tx_chain, pol_chain, bridge = chains
    receipt = pol_chain.create_reward_receipt(address="0x123", amount=100.0, proof="training_proof")
    tx_hash = bridge.relay_reward(receipt)
    assert tx_chain.get_balance("0x123") >= 100.0
    assert tx_chain.get_balance("0x123") == Decimal(100)
    assert len(bytes.fromhex(tx_hash)) == 32


def test_a_receipt_pays_once_however_often_and_wherever_it_is_relayed(chains):
    tx_chain, pol_chain, bridge = chains
    receipt = pol_chain.create_reward_receipt(ADDRESS, "0.5", "proof")
    hashes = {bridge.relay_reward(receipt) for _ in range(3)}
    again = pol_chain.create_reward_receipt(ADDRESS, 0.5, "proof")
    hashes.add(CrossChainBridge(tx_chain, pol_chain).relay_reward(again))
    assert hashes == {receipt.id.hex()}
    assert tx_chain.get_balance(ADDRESS) == Decimal("0.5")
    assert tx_chain.state.supply == tx_chain.state.total() == 500_000_001


def test_each_proof_and_each_address_has_a_reward_of_its_own(chains):
    tx_chain, pol_chain, bridge = chains
    for address, proof in [("0x1", "a"), ("0x1", "b"), ("0x2", "a")]:
        bridge.relay_reward(pol_chain.create_reward_receipt(address, 1, proof))
    assert (tx_chain.get_balance("0x1"), tx_chain.get_balance("0x2")) == (2, 1)


def test_nobody_is_paid_for_a_receipt_that_was_never_granted(chains):
    tx_chain, pol_chain, bridge = chains
    receipt = pol_chain.create_reward_receipt(ADDRESS, 1, "proof")
    for forged in [replace(receipt, amount=2), replace(receipt, index=1), Receipt(bytes(32), receipt.payee, 0, 1)]:
        with pytest.raises(RuleError, match="no accepted work"):
            bridge.relay_reward(forged)
    assert tx_chain.get_balance(ADDRESS) == 0


def test_no_reward_is_paid_above_the_cap():
    genesis = Genesis.make("small", {KEYS[0].address: 10}, created_ms=0, parameters=PARAMETERS)
    tx_chain, pol_chain = TransactionChain(genesis_state(genesis)), PoLChain()
    bridge = CrossChainBridge(tx_chain, pol_chain)
    with pytest.raises(RuleError, match="all the money"):
        bridge.relay_reward(pol_chain.create_reward_receipt(ADDRESS, "0.000009991", "proof"))
    bridge.relay_reward(pol_chain.create_reward_receipt(ADDRESS, "0.00000999", "another proof"))
    assert tx_chain.state.supply == PARAMETERS.cap


def test_rewards_can_be_spent(chains):
    tx_chain, pol_chain, bridge = chains
    key = KEYS[0]
    bridge.relay_reward(pol_chain.create_reward_receipt("0x" + key.address.hex(), 3, "proof"))
    transfer = Transfer(parse_address("0x" + "0" * 39 + "1"), 2_000_000_000)
    record = make_record(key, tx_chain.genesis.network, transfer, nonce=0)
    tx_chain.close_cut([Carried(record, bytes(32), key.address)])
    assert (tx_chain.get_balance("0x" + key.address.hex()), tx_chain.get_balance("0x1")) == (1, 2)


@pytest.mark.parametrize(
    ("address", "amount"), [("0x", 1), ("0xg", 1), ("0x" + "1" * 41, 1), (ADDRESS, 0), (ADDRESS, -1), (ADDRESS, 1e-10)]
)
def test_what_no_receipt_is_made_for(chains, address, amount):
    with pytest.raises(RequestError):
        chains[1].create_reward_receipt(address, amount, "proof")


def test_one_proof_earns_one_amount(chains):
    chains[1].create_reward_receipt(ADDRESS, 1, "proof")
    with pytest.raises(RequestError, match="another amount"):
        chains[1].create_reward_receipt(ADDRESS, 2, "proof")
