"""A chain that a test has written: three validators' blocks, cuts over most of them, and payments on both sides."""

from __future__ import annotations

from dataclasses import dataclass, field

from blyan_node.api.chain_service import BlockInfo, CutInfo, Entry, Holdings, NetworkInfo, Seat, Validators
from blyan_node.chain.cut import PRECOMMIT, Certificate, Cut, Signed, sign_vote
from blyan_node.chain.ledger import Folded, Movement, Result
from blyan_node.chain.records import Record, Transfer, check_record
from blyan_node.chain.state import State
from blyan_node.chain.validators import ValidatorSet
from blyan_node.chain.view import Standing, View
from blyan_node.errors import BlyanError
from tests.support.chains import GENESIS, NETWORK, Forge
from tests.support.money import USERS, VALIDATORS, cut, put, start

PAYER, PAYEE = USERS[0], USERS[1]
CUTS = 3
PAYMENTS = 4
"""In each cut, and as many tentative ones."""


@dataclass
class ScriptedChain:
    """Keeps what a test puts into it. ``refusal`` is raised on submitting; what is submitted waits for ever."""

    view: View
    written: list[BlockInfo] = field(default_factory=list)
    decided: list[CutInfo] = field(default_factory=list)
    history: list[Movement] = field(default_factory=list)
    submitted: list[Record] = field(default_factory=list)
    refusal: BlyanError | None = None
    heard: dict[bytes, int] = field(default_factory=dict)

    def blocks(self, chain: str, *, before: tuple[int, bytes] | None, limit: int) -> list[BlockInfo]:
        places = {(info.block.height, info.block.id): info for info in self.written if info.block.chain == chain}
        older = [place for place in sorted(places, reverse=True) if before is None or place < before]
        return [places[place] for place in older[:limit]]

    def block(self, id: bytes) -> BlockInfo | None:
        return next((info for info in self.written if info.block.id == id), None)

    def cuts(self, *, before: int | None, limit: int) -> list[CutInfo]:
        return [info for info in reversed(self.decided) if before is None or info.cut.k < before][:limit]

    def holdings(self, address: bytes) -> Holdings:
        final, tentative = self.view.holdings(address)
        return Holdings(final, tentative, self.view.tentative.bonded_by(address), tentative.nonce)

    def movements(self, address: bytes, *, before: tuple[int, int] | None, limit: int) -> list[Entry]:
        entries = [Entry("final", each) for each in self.history if each.address == address]
        entries += [Entry("tentative", each) for each in self.view.movements(address)]
        places = {(entry.movement.k, entry.movement.index): entry for entry in entries}
        older = [place for place in sorted(places, reverse=True) if before is None or place < before]
        return [places[place] for place in older[:limit]]

    def standing(self, record: bytes) -> Standing | None:
        return self.view.standing(record)

    def is_pending(self, record: bytes) -> bool:
        return any(each.id == record for each in self.submitted)

    async def submit(self, record: Record) -> None:
        check_record(record, NETWORK)
        if self.refusal is not None:
            raise self.refusal
        self.submitted.append(record)

    def validators(self) -> Validators:
        state, here = self.view.final, VALIDATORS[0].address
        coming = {validator.address: validator.stake for validator in state.next_validators}
        seats = tuple(
            Seat(address, stake, coming.get(address, 0), address == here, self.heard.get(address))
            for address, stake in state.stake().items()
        )
        return Validators(state.k, ValidatorSet(state.validators), seats, tuple(sorted(state.slashed)))

    def network(self) -> NetworkInfo:
        final = self.view.final
        return NetworkInfo(GENESIS, final.k, self.decided[-1].cut.id, final.root(), final.supply, len(self.submitted))


def scripted_chain() -> ScriptedChain:
    """Write a chain: in each cut, and then tentatively, a block of each validator; the first one carries payments.

    The last of the tentative payments is void: it is more than the payer has.
    """
    forge, state, chain = Forge(), start(), ScriptedChain(View(start(), Folded(start(), (), ()), lambda _id: None))
    settled: dict[bytes, Result] = {}
    for k in range(1, CUTS + 1):
        infos, folded = _step(forge, state, k)
        chain.written += infos
        chain.decided.append(_decide(chain, state, infos))
        chain.history += folded.movements
        settled |= {result.id: result for result in folded.results}
        state = folded.state
    infos, pending = _step(forge, state, None)
    chain.written += infos
    chain.view = View(state, pending, settled.get)
    chain.heard = {VALIDATORS[0].address: CUTS, VALIDATORS[1].address: CUTS - 2}
    return chain


def _step(forge: Forge, state: State, k: int | None) -> tuple[list[BlockInfo], Folded]:
    nonce = state.account(PAYER.address).nonce
    carried = [put(PAYER, nonce + each, Transfer(PAYEE.address, 10 + each)) for each in range(PAYMENTS)]
    if k is None:
        carried.append(put(PAYER, nonce + PAYMENTS, Transfer(PAYEE.address, 10**6), expires_at_cut=99))
    records = tuple(each.record for each in carried)
    blocks = [forge.block(VALIDATORS[0], records=records)]
    blocks += [forge.block(key) for key in VALIDATORS[1:]]
    return [BlockInfo(block, k) for block in blocks], cut(state, *carried)


def _decide(chain: ScriptedChain, state: State, infos: list[BlockInfo]) -> CutInfo:
    validators = ValidatorSet(state.validators)
    heads = tuple(sorted(info.block.id for info in infos))
    prev = chain.decided[-1].cut.id if chain.decided else NETWORK
    decided = Cut(state.k + 1, prev, heads, state.root(), validators.hash)
    keys = sorted(VALIDATORS, key=lambda key: key.address)
    votes = [sign_vote(key, NETWORK, k=decided.k, round=1, step=PRECOMMIT, cut=decided.id) for key in keys]
    signatures = tuple(Signed(vote.validator, vote.signature) for vote in votes)
    return CutInfo(decided, Certificate(decided.id, decided.k, 1, signatures), validators)
