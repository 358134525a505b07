"""Brings proofs of cheating to the chain, where the offender loses a part of its stake."""

from __future__ import annotations

import logging

import trio

from blyan_node.chain.evidence import of_blocks, of_votes
from blyan_node.chain.keys import digest, show_address
from blyan_node.chain.records import Evidence
from blyan_node.errors import BlyanError
from blyan_node.relay.blocks import Relay
from blyan_node.relay.finality import Finality
from blyan_node.relay.records import Submissions

log = logging.getLogger(__name__)

TURN = 2.0  # seconds that each validator in turn gets to bring a proof, before the next one does
DOMAIN = b"blyan/accuser/1"


class Accuser:
    """Watches for double votes and double blocks. Of the validators one after the other reports, until it is done."""

    def __init__(self, relay: Relay, finality: Finality, submissions: Submissions, address: bytes) -> None:
        self._relay, self._finality, self._submissions, self._address = relay, finality, submissions, address
        self._replica = relay.replica
        self._noticed: dict[bytes, float] = {}

    async def run(self) -> None:
        """Watch until cancelled."""
        while True:
            seen = self._relay.changed.count
            proofs = self._proofs()
            for offender, proof in proofs.items():
                noticed = self._noticed.setdefault(offender, trio.current_time())
                if trio.current_time() >= noticed + TURN * self._rank(offender):
                    await self._report(offender, proof)
            await self._relay.changed.after(seen, most=TURN if proofs else float("inf"))

    def _proofs(self) -> dict[bytes, Evidence]:
        """Return what can be proven against validators that have something at stake and were not slashed yet."""
        if not self._replica.final.state.may_author(self._address):
            return {}
        state, network = self._replica.view().tentative, self._replica.genesis.network
        at_stake = {validator for validator, _ in state.bonds} - state.slashed.keys()
        proofs = {
            author: of_blocks(*fork)
            for author in sorted(at_stake)
            if self._replica.is_equivocator(author) and (fork := self._replica.fork_of(author))
        }
        for double in self._finality.double_votes:
            if double.first.validator in at_stake:
                proofs[double.first.validator] = of_votes(double, network)
        return proofs

    def _rank(self, offender: bytes) -> int:
        """Return this node's place in the line of those who may report an offender."""
        members = {validator.address for validator in self._replica.final.state.validators}
        line = sorted(members - {offender}, key=lambda address: digest(DOMAIN, offender + address))
        return line.index(self._address) if self._address in line else len(line)

    async def _report(self, offender: bytes, proof: Evidence) -> None:
        try:
            await self._submissions.originate(proof)
        except BlyanError as error:
            log.error("could not bring the proof against %s to the chain: %s", show_address(offender), error)
        else:
            log.warning("%s cheated (%s): the proof is on its way", show_address(offender), proof.fault)
        self._noticed[offender] = trio.current_time() + TURN  # if it does not take effect, try again
