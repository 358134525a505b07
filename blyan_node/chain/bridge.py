"""The two chains and the bridge of the project's test plan: thin shapes over the ledger, for those who follow the plan.

On a real network no relayer exists: the machine that judges deltas grants receipts, and the cut that accepts a delta
mints them. Here a test authority takes the judges' place, and relaying closes a cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal

from blyan_node.chain.genesis import DEVNET, Genesis
from blyan_node.chain.keys import ADDRESS_SIZE, Key, digest
from blyan_node.chain.ledger import Folded, Receipt, fold
from blyan_node.chain.money import NANO, parse_bly
from blyan_node.chain.order import Carried
from blyan_node.chain.state import State, genesis_state
from blyan_node.errors import RequestError, RuleError

PROOF_DOMAIN = b"blyan/test-proof/1"
AUTHORITY = Key(digest(b"blyan/test-authority/1", b""))
PARAMETERS = replace(DEVNET, faucet_per_record=0, faucet_per_cut=0)


class TransactionChain:
    """A ledger by itself, in memory, whose one validator is the test authority."""

    def __init__(self, state: State | None = None) -> None:
        """Start from a state, or from one in which nobody owns anything."""
        self.genesis = Genesis.make("private T", {AUTHORITY.address: 1}, created_ms=0, parameters=PARAMETERS)
        self.state = genesis_state(self.genesis) if state is None else state

    def close_cut(self, records: Sequence[Carried] = (), receipts: Sequence[Receipt] = ()) -> Folded:
        """Fold one cut."""
        folded = fold(self.state, records, network=self.genesis.network, receipts=receipts)
        self.state = folded.state
        return folded

    def get_balance(self, address: str) -> Decimal:
        """Return a balance in BLY, exactly."""
        return Decimal(self.state.account(_parse(address)).balance) / NANO


class PoLChain:
    """Proof of learning: grants receipts. Here every proof is believed; one proof pays one address once."""

    def __init__(self) -> None:
        self._receipts: dict[bytes, Receipt] = {}

    def create_reward_receipt(self, address: str, amount: float | str | Decimal, proof: str) -> Receipt:
        """Grant ``amount`` BLY for a proof. Raises RequestError where it is no amount, or was granted differently."""
        text = format(Decimal(str(amount)), "f") if isinstance(amount, float) else str(amount)
        if not (nano := parse_bly(text)):
            raise RequestError("a reward is more than nothing")
        receipt = Receipt(digest(PROOF_DOMAIN, proof.encode()), _parse(address), 0, nano)
        if self._receipts.setdefault(receipt.id, receipt) != receipt:
            raise RequestError("this proof has earned this address another amount already")
        return receipt

    def granted(self, receipt: Receipt) -> bool:
        """Tell whether a receipt is one of this chain's."""
        return self._receipts.get(receipt.id) == receipt


class CrossChainBridge:
    """From receipts to money."""

    def __init__(self, tx_chain: TransactionChain, pol_chain: PoLChain) -> None:
        self._tx_chain = tx_chain
        self._pol_chain = pol_chain

    def relay_reward(self, receipt: Receipt) -> str:
        """Return the receipt's id as 64 hex digits, once it is paid. Relaying it again changes nothing.

        Raises RuleError where the receipt was never granted, or no money is left to make.
        """
        if not self._pol_chain.granted(receipt):
            raise RuleError("no accepted work stands behind this receipt")
        if receipt.id not in self._tx_chain.state.minted:
            (result,) = self._tx_chain.close_cut(receipts=[receipt]).results
            if result.void is not None:
                raise RuleError(f"the reward was not paid: {result.void.value}")
        return receipt.id.hex()


def _parse(address: str) -> bytes:
    """Return the 20 bytes of an address; short ones, as the test plan has them, are padded on the left with zeros."""
    digits = address.removeprefix("0x")
    if not digits or len(digits) > 2 * ADDRESS_SIZE or set(digits) - set("0123456789abcdefABCDEF"):
        raise RequestError(f"{address!r} is not an address: 0x and at most 40 hex digits")
    return bytes.fromhex(digits.rjust(2 * ADDRESS_SIZE, "0"))
