"""What a node answers about its chain, over a real replica with cuts and without a network."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from blyan_node.chain.block import Block
from blyan_node.chain.cut import PRECOMMIT, Certificate, Cut, Signed, sign_vote
from blyan_node.chain.genesis import Genesis
from blyan_node.chain.keys import Key
from blyan_node.chain.ledger import Void
from blyan_node.chain.records import Arguments, Bond, Record, Transfer, Unbond, make_record
from blyan_node.chain.replica import Replica
from blyan_node.chain.validators import ValidatorSet
from blyan_node.chain.view import Standing, View
from blyan_node.chain_service import NodeChainService
from tests.support.chains import STRANGER
from tests.support.money import PARAMETERS, USERS, VALIDATORS, beginning

HERE, OTHER, THIRD = VALIDATORS
ALICE, BOB = USERS[:2]


@dataclass
class FakeRelay:
    """What the service asks a relay: the replica, and what neighbours have told."""

    replica: Replica
    told: dict[bytes, int] = field(default_factory=dict)

    def final_of(self, address: bytes) -> int | None:
        return self.told.get(address)


class FakeMempool(set[bytes]):
    def next_nonce(self, sender: bytes, view: View) -> int:
        return view.next_nonce(sender) + len(self)


@dataclass
class FakeSubmissions:
    mempool: FakeMempool = field(default_factory=FakeMempool)

    async def submit(self, record: Record) -> None:
        self.mempool.add(record.id)


@dataclass
class Node:
    """A replica that a test writes into, and the service over it."""

    replica: Replica
    relay: Any
    submissions: Any
    service: NodeChainService

    def record(self, arguments: Arguments, *, key: Key = ALICE, **options: int) -> Record:
        nonce = options.pop("nonce", self.replica.view().next_nonce(key.address))
        return make_record(key, self.replica.genesis.network, arguments, nonce=nonce, **options)

    def write(self, *arguments: Arguments, key: Key = HERE, chain: str = "T", sender: Key = ALICE) -> Block:
        first = self.replica.view().next_nonce(sender.address)
        records = tuple(self.record(each, key=sender, nonce=first + n) for n, each in enumerate(arguments))
        return self.replica.author(key, records, chain=chain, type="data", now_ms=1)

    def finalise(self) -> Cut:
        base = self.replica.final.base()
        following = ValidatorSet(self.replica.final.state.next_validators)
        cut = Cut(base.k, base.prev_cut, self.replica.heads(), self.replica.final.root, following.hash)
        keys = sorted(VALIDATORS, key=lambda key: key.address)
        network = self.replica.genesis.network
        votes = [sign_vote(key, network, k=cut.k, round=0, step=PRECOMMIT, cut=cut.id) for key in keys]
        signatures = tuple(Signed(vote.validator, vote.signature) for vote in votes)
        self.replica.commit(cut, Certificate(cut.id, cut.k, 0, signatures))
        return cut


def open_node(folder: Path, genesis: Genesis) -> Node:
    replica = Replica.open(folder, genesis)
    relay: Any = FakeRelay(replica)
    submissions: Any = FakeSubmissions()
    return Node(replica, relay, submissions, NodeChainService(HERE.address, relay, submissions))


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = open_node(tmp_path / "chain", beginning())
    with node.replica:
        yield node


def pay(amount: int) -> Transfer:
    return Transfer(BOB.address, amount)


def test_blocks_are_read_backwards_a_page_at_a_time(node: Node) -> None:
    blocks = [node.write(chain="TBA"[number % 3], key=VALIDATORS[number % 2]) for number in range(20)]
    concurrent = node.replica.author(
        THIRD, (), chain="T", type="data", now_ms=1, parents=(blocks[4].id,)
    )  # of the height of another
    written = {chain: [block for block in [*blocks, concurrent] if block.chain == chain] for chain in "ABT"}
    for chain, expected in written.items():
        expected.sort(key=lambda block: (block.height, block.id), reverse=True)
        for limit in (1, 2, 3, 100):
            found: list[Block] = []
            before = None
            while page := node.service.blocks(chain, before=before, limit=limit):
                assert len(page) <= limit
                found += [info.block for info in page]
                before = (found[-1].height, found[-1].id)
            assert found == expected
    everything = node.replica.blocks(limit=100)
    assert node.replica.blocks(limit=100, reverse=True) == everything[::-1]


def test_a_block_is_tentative_until_a_cut_covers_it(node: Node) -> None:
    first = node.write(pay(1))
    assert [info.cut for info in node.service.blocks("T", before=None, limit=9)] == [None]
    node.finalise()
    second = node.write(pay(2))
    assert [(info.block, info.cut) for info in node.service.blocks("T", before=None, limit=9)] == [
        (second, None),
        (first, 1),
    ]
    assert node.service.block(first.id) == node.service.blocks("T", before=None, limit=9)[1]
    assert node.service.block(bytes(32)) is None
    assert node.service.block(node.replica.genesis.network) is None


def test_cuts_newest_first_with_who_decided_them(node: Node) -> None:
    assert node.service.cuts(before=None, limit=9) == []
    cuts = []
    for amount in range(1, 8):
        node.write(Bond(OTHER.address, amount))
        cuts.append(node.finalise())
    told = node.service.cuts(before=None, limit=9)
    assert [info.cut for info in told] == cuts[::-1]
    assert [info.cut.k for info in node.service.cuts(before=4, limit=2)] == [3, 2]
    assert node.service.cuts(before=1, limit=2) == node.service.cuts(before=0, limit=2) == []
    assert [info.cut.k for info in node.service.cuts(before=99, limit=2)] == [7, 6]
    # Bonds of the first epoch's cuts count when the next epoch's validators take over.
    totals = [info.validators.total for info in told[::-1]]
    first = PARAMETERS.epoch
    assert totals[: first + 1] == [300] * (first + 1)
    assert totals[first + 1] == 300 + sum(range(1, first + 1))
    for info in told:
        assert info.validators.is_quorum(
            info.validators.stake_of(each.validator for each in info.certificate.signatures)
        )


def test_what_an_address_owns(node: Node) -> None:
    node.write(pay(5), Bond(OTHER.address, 30), Bond(THIRD.address, 7))
    node.finalise()
    node.write(Unbond(OTHER.address, 10))
    owned = node.service.holdings(ALICE.address)
    assert (owned.final.k, owned.final.balance, owned.final.bonded, owned.final.unbonding) == (1, 958, 37, 0)
    assert (owned.tentative.k, owned.tentative.balance, owned.tentative.bonded) == (2, 958, 27)
    assert (owned.tentative.unbonding, owned.tentative.nonce) == (10, 4)
    assert owned.bonds == {OTHER.address: 20, THIRD.address: 7}
    assert node.service.holdings(STRANGER.address).bonds == {}


def test_a_history_goes_on_from_the_tentative_into_the_final(node: Node) -> None:
    amounts = list(range(1, 12))
    for amount in amounts:
        node.write(pay(amount))
        if amount in (4, 8):
            node.finalise()
    node.write(Transfer(ALICE.address, 100), sender=BOB)
    whole = node.service.movements(BOB.address, before=None, limit=100)
    assert [entry.movement.amount for entry in whole] == [100, *amounts[::-1]]
    assert [entry.word for entry in whole] == ["tentative"] * 4 + ["final"] * 8
    assert {entry.movement.k for entry in whole if entry.word == "tentative"} == {3}
    for limit in (1, 2, 3, 4, 5, 12):
        found: list[Any] = []
        before = None
        while page := node.service.movements(BOB.address, before=before, limit=limit):
            assert len(page) <= limit
            found += page
            before = (page[-1].movement.k, page[-1].movement.index)
        assert found == whole
    assert node.service.movements(STRANGER.address, before=None, limit=5) == []


def test_a_cut_between_two_pages_neither_loses_nor_doubles(node: Node) -> None:
    for amount in range(1, 7):
        node.write(pay(amount))
    first = node.service.movements(BOB.address, before=None, limit=3)
    node.finalise()
    node.write(pay(99))
    last = first[-1].movement
    rest = node.service.movements(BOB.address, before=(last.k, last.index), limit=100)
    assert [entry.movement.amount for entry in first + rest] == [6, 5, 4, 3, 2, 1]
    assert {entry.word for entry in rest} == {"final"}


async def test_where_records_stand(node: Node) -> None:
    block = node.write(pay(1), pay(5000))
    good, void = (record.id for record in block.records)
    assert node.service.standing(good) == Standing("tentative", None)
    node.finalise()
    assert node.service.standing(good) == Standing("final", None)
    assert node.service.standing(void) == Standing("final", Void.INSUFFICIENT)
    waiting = node.record(pay(3))
    assert not node.service.is_pending(waiting.id)
    await node.service.submit(waiting)
    assert node.service.standing(waiting.id) is None
    assert node.service.is_pending(waiting.id)
    assert node.service.network().pending == 1


def test_validators_of_now_and_of_the_next_epoch(node: Node) -> None:
    node.write(Bond(STRANGER.address, 50), Bond(OTHER.address, 5))
    node.relay.told = {OTHER.address: 1, BOB.address: 9}
    for _ in range(PARAMETERS.epoch):
        node.finalise()
        node.write(pay(1))
    told = node.service.validators()
    assert told.k == PARAMETERS.epoch
    assert told.deciding.total == 300
    assert [seat.address for seat in told.seats] == sorted(key.address for key in (HERE, OTHER, THIRD, STRANGER))
    seats = {seat.address: seat for seat in told.seats}
    assert (seats[STRANGER.address].stake, seats[STRANGER.address].next_stake) == (0, 50)
    assert (seats[OTHER.address].stake, seats[OTHER.address].next_stake) == (100, 105)
    assert {seat.address for seat in told.seats if seat.here} == {HERE.address}
    assert seats[HERE.address].final == told.k
    assert (seats[OTHER.address].final, seats[THIRD.address].final) == (1, None)
    assert told.slashed == ()


def test_the_network(node: Node) -> None:
    genesis = node.replica.genesis
    told = node.service.network()
    assert (told.genesis, told.k, told.cut, told.pending) == (genesis, 0, genesis.network, 0)
    node.write(pay(1))
    cut = node.finalise()
    told = node.service.network()
    assert (told.k, told.cut, told.supply) == (1, cut.id, genesis.supply)
    assert told.state_root == node.replica.final.state.root()
