"""Records on their way to validators: handed to several, carried in turn, and never lost with one node."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import pytest
import trio
from trio.testing import MockClock

from blyan_node.chain.genesis import Genesis
from blyan_node.chain.keys import Key
from blyan_node.chain.mempool import Mempool
from blyan_node.chain.records import Faucet, Record, Transfer, make_record, sign_record
from blyan_node.chain.state import State, genesis_state
from blyan_node.chain.view import View
from blyan_node.errors import Overloaded, PeerError, Refused, RequestError, Unreachable
from blyan_node.p2p import rpc
from blyan_node.p2p.memory import MemoryHub
from blyan_node.p2p.peers import Peers
from blyan_node.p2p.transport import Network, PeerId
from blyan_node.relay.messages import SUBMIT, Submit, Submitted
from blyan_node.relay.records import BURST, COPIES, LOST_AFTER, Submissions, now_ms, rank_carriers
from tests.support.chains import NETWORK
from tests.support.mempools import Books
from tests.support.money import BALANCES, PARAMETERS, USERS
from tests.support.network import Shape, eventually, network_group, secret

ALICE, BOB, CAROL, DAVE = USERS


def pay(key: Key = ALICE, nonce: int = 0, *, amount: int = 1, **options: int) -> Record:
    return make_record(key, NETWORK, Transfer(BOB.address, amount), nonce=nonce, **options)


def state_of(bonded: int, **parameters: int) -> State:
    """The first ``bonded`` nodes validate."""
    stakes = {Key(secret(number)).address: 100 for number in range(bonded)}
    limits = replace(PARAMETERS, **parameters)
    return genesis_state(Genesis.make("money", stakes, created_ms=0, parameters=limits, balances=BALANCES))


@dataclass
class Node:
    """One node: its network, its ledger (which others may share) and its mempool."""

    number: int
    network: Network
    books: Books
    submissions: Submissions = field(init=False)
    peers: Peers = field(init=False)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)

    def __post_init__(self) -> None:
        self.key = Key(secret(self.number))
        self.peers = Peers(self.network)
        self.submissions = Submissions(self.network, self.peers, self, Mempool(NETWORK), self.key)

    def view(self) -> View:
        return self.books.view()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        with self.scope:
            await self.submissions.run(task_status=task_status)

    async def submit(self, record: Record) -> None:
        await self.submissions.submit(record)

    def has(self, record: Record) -> bool:
        return record.id in self.submissions.mempool

    def pick(self) -> tuple[Record, ...]:
        return self.submissions.mempool.pick(self.view(), chain="T", now_ms=now_ms())


class Net(list[Node]):
    """Nodes of one network; ``hub`` kills and stalls them."""

    def __init__(self, nodes: list[Node], hub: MemoryHub) -> None:
        super().__init__(nodes)
        self.hub, self.books = hub, nodes[0].books

    def kill(self, node: Node) -> None:
        node.scope.cancel()
        self.hub.kill(node.network.peer_id)

    def holders(self, record: Record) -> set[int]:
        return {node.number for node in self if node.has(record)}

    def ranked(self, sender: Key) -> list[Node]:
        """The carriers of a sender's records, the first one first."""
        by_address = {node.key.address: node for node in self}
        return [by_address[address] for address in rank_carriers(sender.address, self.books.state)]


@asynccontextmanager
async def net(count: int, *, bonded: int, shape: Shape = "full", **parameters: int) -> AsyncIterator[Net]:
    """Connected nodes with one ledger. Those without a bond come last."""
    hub, books = MemoryHub(latency=0.01), Books(state_of(bonded, **parameters))
    async with network_group(count, shape=shape, hub=hub) as networks, trio.open_nursery() as nursery:
        nodes = [Node(number, network, books) for number, network in enumerate(networks)]
        for node in nodes:
            await nursery.start(node.run)
        yield Net(nodes, hub)
        nursery.cancel_scope.cancel()


async def hand_in(source: Network, target: Node, record: Record) -> Submitted:
    return await rpc.call(source, target.network.peer_id, SUBMIT, Submit(record))


async def test_a_node_without_a_bond_hands_its_record_to_the_first_carriers(autojump_clock: MockClock) -> None:
    async with net(7, bonded=6) as nodes:
        user, record = nodes[6], pay()
        carriers = nodes.ranked(ALICE)[:COPIES]
        beats = [node.submissions.changed.count for node in carriers]
        await user.submit(record)
        await eventually(lambda: nodes.holders(record) == {6, *(node.number for node in carriers)})
        assert [node.submissions.changed.count for node in carriers] == [count + 1 for count in beats]


async def test_senders_differ_in_their_carriers(autojump_clock: MockClock) -> None:
    async with net(5, bonded=4) as nodes:
        orders = {tuple(node.number for node in nodes.ranked(user)) for user in USERS}
        assert len(orders) > 1
        assert {frozenset(order) for order in orders} == {frozenset(range(4))}


async def test_all_records_of_a_sender_go_to_the_same_carriers(autojump_clock: MockClock) -> None:
    async with net(7, bonded=6) as nodes:
        records = [pay(nonce=nonce) for nonce in range(4)]
        for record in records:
            await nodes[6].submit(record)
        await eventually(lambda: all(len(nodes.holders(record)) == 1 + COPIES for record in records))
        assert len({frozenset(nodes.holders(record)) for record in records}) == 1
        assert nodes.ranked(ALICE)[0].pick() == tuple(records)


@pytest.mark.parametrize("asked", [0, 5], ids=["a validator", "a node without a bond"])
async def test_a_record_outlives_the_node_that_was_asked(asked: int, autojump_clock: MockClock) -> None:
    async with net(6, bonded=5) as nodes:
        record = pay()
        await nodes[asked].submit(record)
        nodes.kill(nodes[asked])
        others = nodes.holders(record) - {asked}
        assert others
        await eventually(lambda: any(nodes[number].pick() == (record,) for number in others))


async def test_ranks_are_staggered(autojump_clock: MockClock) -> None:
    async with net(7, bonded=6) as nodes:
        record = pay()
        began = trio.current_time()
        await nodes[6].submit(record)
        for rank, node in enumerate(nodes.ranked(ALICE)[:COPIES]):
            await eventually(lambda node=node: bool(node.pick()))
            assert trio.current_time() - began == pytest.approx(rank, abs=0.2)


async def test_one_block_carries_it_though_many_could(autojump_clock: MockClock) -> None:
    async with net(7, bonded=6) as nodes:
        record = pay()
        await nodes[6].submit(record)
        first = nodes.ranked(ALICE)[0]
        await eventually(lambda: bool(first.pick()))
        nodes.books.carry(*first.pick(), author=first.key)
        for _ in range(40):
            await trio.sleep(0.1)
            assert not any(node.pick() for node in nodes)
        assert nodes.holders(record) == set(), "and the mempools have forgotten it"


async def test_a_validator_that_was_asked_carries_at_once_and_its_backups_wait(autojump_clock: MockClock) -> None:
    async with net(5, bonded=5) as nodes:
        first, *_, last = nodes.ranked(ALICE)
        record = pay()
        began, seen = trio.current_time(), last.submissions.changed.count
        await last.submit(record)
        assert last.submissions.changed.count > seen
        assert last.pick() == (record,)
        assert trio.current_time() - began < 0.2
        await eventually(lambda: bool(first.pick()))
        assert trio.current_time() - began >= 1, "though it is the first of the ranks"


async def test_a_validator_alone_keeps_its_record(autojump_clock: MockClock) -> None:
    async with net(1, bonded=1) as nodes:
        await nodes[0].submit(pay())
        assert nodes[0].pick() == (pay(),)
        await nodes[0].submit(pay())


async def test_a_record_that_took_effect_is_sent_in_vain_but_without_error(autojump_clock: MockClock) -> None:
    async with net(2, bonded=1) as nodes:
        nodes.books.carry(pay())
        for node in nodes:
            await node.submit(pay())
        assert nodes.holders(pay()) == set()


async def test_the_reason_of_this_nodes_refusal_comes_back(autojump_clock: MockClock) -> None:
    async with net(2, bonded=1) as nodes:
        for record, reason in (
            (pay(amount=1001), "balance is too small"),
            (make_record(ALICE, bytes(32), Transfer(BOB.address, 1), nonce=0), "another network"),
            (replace(pay(), sender=CAROL.address), "did not sign"),
        ):
            with pytest.raises(RequestError, match=reason) as raised:
                await nodes[1].submit(record)
            assert raised.value.param == "record"
            assert nodes.holders(record) == set()


async def test_the_reason_of_the_carriers_refusal_comes_back(autojump_clock: MockClock) -> None:
    async with net(4, bonded=3) as nodes:
        nodes[3].books = Books(state_of(3))
        for node in nodes[:3]:
            node.books = Books(state_of(3, fee_per_byte=1))
        with pytest.raises(RequestError, match="this network asks") as raised:
            await nodes[3].submit(pay())
        assert raised.value.param == "record"
        assert nodes.holders(pay()) == set(), "an error means that nothing of it is here"


async def test_one_carrier_that_takes_it_is_enough(autojump_clock: MockClock) -> None:
    async with net(4, bonded=3) as nodes:
        for node in nodes.ranked(ALICE)[:2]:
            node.books = Books(state_of(3, fee_per_byte=1))
        await nodes[3].submit(pay())
        assert nodes.ranked(ALICE)[2].has(pay())


async def test_a_carriers_reason_is_shown_without_control_characters(autojump_clock: MockClock) -> None:
    async with net(2, bonded=1) as nodes:

        async def refuse(_peer: PeerId, _request: Submit) -> Submitted:
            await trio.lowlevel.checkpoint()
            return Submitted("no\x1b[2J\nnever")

        rpc.serve(nodes[0].network, SUBMIT, refuse, concurrency=1)
        with pytest.raises(RequestError, match=r"^no \[2J never$"):
            await nodes[1].submit(pay())


async def test_without_validators_in_reach_the_error_says_how_many_there_are(autojump_clock: MockClock) -> None:
    async with net(3, bonded=2, shape="none") as nodes:
        with pytest.raises(Unreachable, match="no validator can be reached: of 2 this node knows where 0 are"):
            await nodes[2].submit(pay())
        nodes[2].peers.learn(nodes[0].network.peer_id, nodes[0].network.addresses())
        nodes.kill(nodes[0])
        with pytest.raises(Unreachable, match="of 2 this node knows where 1 are"):
            await nodes[2].submit(pay())
        assert nodes.holders(pay()) == set()


async def test_carriers_that_are_known_but_no_neighbours_are_dialled(autojump_clock: MockClock) -> None:
    async with net(3, bonded=2, shape="none") as nodes:
        nodes[2].peers.learn(nodes[1].network.peer_id, nodes[1].network.addresses())
        await nodes[2].submit(pay())
        assert nodes[1].has(pay())


async def test_dead_carriers_are_passed_over(autojump_clock: MockClock) -> None:
    async with net(7, bonded=6) as nodes:
        *dead, last = nodes.ranked(ALICE)
        for node in dead[:4]:
            nodes.hub.stall(node.network.peer_id)
        for node in dead[4:]:
            nodes.kill(node)
        await nodes[6].submit(pay())
        assert nodes.holders(pay()) == {6, last.number}


async def test_a_lost_record_is_handed_to_other_carriers(autojump_clock: MockClock) -> None:
    async with net(8, bonded=7) as nodes:
        record, carriers = pay(), nodes.ranked(ALICE)
        await nodes[7].submit(record)
        await trio.sleep(1)
        for node in carriers[:COPIES]:
            assert node.has(record)
            nodes.kill(node)
        await trio.sleep(LOST_AFTER - 2)
        assert not any(node.has(record) for node in carriers[COPIES:])
        await trio.sleep(4)
        assert all(node.has(record) for node in carriers[COPIES : 2 * COPIES])
        nodes.books.carry(record)
        await trio.sleep(2)
        assert nodes.holders(record) <= {node.number for node in carriers[:COPIES]}, "the dead know nothing of it"


async def test_carriers_that_keep_a_record_to_themselves_are_not_all_there_are(autojump_clock: MockClock) -> None:
    async with net(8, bonded=7) as nodes:
        record, carriers = pay(), nodes.ranked(ALICE)
        await nodes[7].submit(record)
        for asked in (2 * COPIES, 2 * COPIES, 7):
            await trio.sleep(LOST_AFTER + 2)
            assert nodes.holders(record) == {7, *(node.number for node in carriers[:asked])}


async def test_what_is_in_a_block_is_not_lost(autojump_clock: MockClock) -> None:
    async with net(8, bonded=7) as nodes:
        early = pay(nonce=1)
        await nodes[7].submit(early)
        nodes.books.carry(early)
        await trio.sleep(3 * LOST_AFTER)
        assert len(nodes.holders(early)) == 1 + COPIES, "it waits for its predecessor, and so do its carriers"


async def test_what_expires_is_handed_out_no_more(autojump_clock: MockClock) -> None:
    async with net(2, bonded=1) as nodes:
        record = pay(expires_at_cut=1)
        await nodes[1].submit(record)
        nodes.books.close()
        await trio.sleep(2)
        assert nodes.holders(record) == set()


async def test_nodes_without_a_bond_take_nothing_in(autojump_clock: MockClock) -> None:
    async with net(3, bonded=1) as nodes:
        with pytest.raises(Refused, match="no validator"):
            await hand_in(nodes[2].network, nodes[1], pay())
        assert nodes.holders(pay()) == set()


async def test_garbage_costs_points(autojump_clock: MockClock) -> None:
    async with net(2, bonded=1) as nodes:
        victim, villain = nodes
        bad = [
            replace(pay(), sender=CAROL.address),
            make_record(ALICE, bytes(32), Transfer(BOB.address, 1), nonce=0),
        ]
        for _ in range(3):
            for record in bad:
                with pytest.raises(PeerError):
                    await hand_in(villain.network, victim, record)
        await eventually(lambda: victim.network.peer_id not in villain.network.neighbours())
        assert len(victim.submissions.mempool) == 0


async def test_what_is_merely_refused_costs_nothing(autojump_clock: MockClock) -> None:
    async with net(2, bonded=1) as nodes:
        for _ in range(50):
            answer = await hand_in(nodes[1].network, nodes[0], sign_record(ALICE, NETWORK, "later", b"", nonce=0))
            assert answer.reason is not None
            assert "kind is unknown" in answer.reason
        assert nodes[0].network.peer_id in nodes[1].network.neighbours()


async def test_a_flood_is_bounded_and_costs_points(autojump_clock: MockClock) -> None:
    async with net(2, bonded=1) as nodes:
        victim, villain = nodes
        answers: list[str] = []

        async def pour(begin: int) -> None:
            for number in range(begin, 4 * BURST, 16):
                key = Key((number + 1).to_bytes(32))
                record = make_record(key, NETWORK, Faucet(key.address, 1), nonce=0)
                try:
                    await hand_in(villain.network, victim, record)
                    answers.append("taken")
                except PeerError as error:
                    answers.append(type(error).__name__)

        async with trio.open_nursery() as nursery:
            for begin in range(16):
                nursery.start_soon(pour, begin)
        assert "Refused" in answers
        assert answers[-1] == "Unreachable"
        assert BURST <= answers.count("taken") <= len(victim.submissions.mempool) < 2 * BURST
        assert victim.network.peer_id not in villain.network.neighbours()


async def test_a_steady_stream_is_no_flood(autojump_clock: MockClock) -> None:
    async with net(2, bonded=1) as nodes:
        for number in range(2 * BURST):
            key = Key((number + 1).to_bytes(32))
            await hand_in(nodes[1].network, nodes[0], make_record(key, NETWORK, Faucet(key.address, 1), nonce=0))
            await trio.sleep(0.02)
        assert len(nodes[0].submissions.mempool) == 2 * BURST


async def test_a_node_with_a_flood_of_users_stays_in_good_standing(autojump_clock: MockClock) -> None:
    async with net(2, bonded=1) as nodes:
        outcomes: list[str] = []

        async def use(number: int) -> None:
            key = Key((number + 1).to_bytes(32))
            try:
                await nodes[1].submit(make_record(key, NETWORK, Faucet(key.address, 1), nonce=0))
                outcomes.append("taken")
            except Overloaded:
                outcomes.append("overloaded")

        async with trio.open_nursery() as nursery:
            for number in range(2 * BURST):
                nursery.start_soon(use, number)
        assert set(outcomes) == {"taken", "overloaded"}
        assert len(nodes[1].submissions.mempool) == outcomes.count("taken")
        assert nodes[0].network.peer_id in nodes[1].network.neighbours()
        await trio.sleep(60)
        await use(0)
        assert outcomes[-1] == "taken"
