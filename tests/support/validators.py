"""Whole nodes on the memory network and the virtual clock: each decides, relays, carries, writes and accuses.

They are started and stopped one by one, and come back with what is in their database.
"""

from __future__ import annotations

import random
import shutil
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from blyan_node.chain.block import Block, make_block
from blyan_node.chain.cut import Vote
from blyan_node.chain.effects import unpack_message
from blyan_node.chain.genesis import Genesis, Parameters
from blyan_node.chain.keys import Key
from blyan_node.chain.mempool import Mempool
from blyan_node.chain.records import Record, Transfer, make_record
from blyan_node.chain.replica import Replica
from blyan_node.p2p.memory import MemoryHub
from blyan_node.p2p.peers import Peers
from blyan_node.p2p.transport import Network
from blyan_node.relay import finality as consensus
from blyan_node.relay.accuser import Accuser
from blyan_node.relay.author import Author
from blyan_node.relay.blocks import Relay
from blyan_node.relay.finality import Finality
from blyan_node.relay.records import Submissions
from blyan_node.worker import Inline
from tests.support.cuts import anchor
from tests.support.network import eventually, peer_number, secret

KEYS = [Key(secret(number)) for number in range(12)]
USERS = [Key(secret(100 + number)) for number in range(4)]
STAKE, WEALTH = 100, 10_000
PARAMETERS = Parameters(
    cap=10**9,
    epoch=3,
    unbonding=6,
    min_stake=10,
    slash_millionths=500_000,
    faucet_per_record=0,
    faucet_per_cut=0,
    fee_per_byte=0,
)


def genesis_of(validators: int) -> Genesis:
    """A network whose first nodes validate with equal stake, and whose users have money."""
    return Genesis.make(
        "validators",
        {key.address: STAKE for key in KEYS[:validators]},
        created_ms=0,
        parameters=PARAMETERS,
        balances={key.address: WEALTH for key in USERS},
    )


def address_of(number: int) -> str:
    """Where a node listens, also after a restart."""
    return f"/ip4/127.0.0.1/tcp/{20_000 + number}"


@dataclass
class Witness:
    """Remembers every vote that left a node."""

    votes: dict[tuple[bytes, int, int, int], set[bytes | None]] = field(default_factory=lambda: defaultdict(set))

    def listen(self, network: Network) -> None:
        """Hear what a network publishes from now on; a vote is published before it goes any other way."""
        publish = network.publish

        async def overheard(topic: str, data: bytes) -> None:
            if topic == consensus.TOPIC and isinstance(vote := unpack_message(data), Vote):
                self.votes[vote.validator, vote.k, vote.round, vote.step].add(vote.cut)
            await publish(topic, data)

        network.publish = overheard  # type: ignore[method-assign]

    def heights_of(self, key: Key) -> set[int]:
        """The heights at which a validator voted."""
        return {k for validator, k, _, _ in self.votes if validator == key.address}

    def double_voters(self) -> set[bytes]:
        """Those who voted for two values in one step."""
        return {place[0] for place, values in self.votes.items() if len(values) > 1}


@dataclass
class Node:
    """One running node; ``key`` votes and writes where it has a seat."""

    number: int
    key: Key
    network: Network
    replica: Replica
    relay: Relay
    finality: Finality
    submissions: Submissions
    author: Author
    accuser: Accuser
    peers: Peers
    scope: trio.CancelScope
    stopped: trio.Event = field(default_factory=trio.Event)

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        async with trio.open_nursery() as nursery:
            for part in (self.relay, self.finality, self.submissions, self.author):
                await nursery.start(part.run)
            nursery.start_soon(self.accuser.run)
            await nursery.start(self.peers.run)
            task_status.started()

    async def stop(self) -> None:
        """Cut all that runs off where it stands."""
        self.scope.cancel()
        await self.stopped.wait()

    def balance(self, key: Key) -> int:
        return self.replica.final.state.account(key.address).balance

    def carried(self, kind: str) -> list[tuple[Block, Record]]:
        """The records of a kind in the DAG, with the blocks that carry them."""
        blocks = self.replica.blocks(limit=100_000)
        return [(block, record) for block in blocks for record in block.records if record.kind == kind]


class Group:
    """The nodes of one network that run now, by number."""

    def __init__(
        self,
        nursery: trio.Nursery,
        folder: Path,
        validators: int,
        hub: MemoryHub,
        rng: random.Random,
        *,
        loss: float = 0,
    ) -> None:
        """``loss`` is the share of gossip that does not arrive."""
        self._nursery, self.folder, self.hub, self._random, self._loss = nursery, folder, hub, rng, loss
        self.genesis, self.witness = genesis_of(validators), Witness()
        self.nodes: dict[int, Node] = {}
        self._starts = Counter[int]()

    def __getitem__(self, number: int) -> Node:
        return self.nodes[number]

    def __iter__(self) -> Iterator[Node]:
        return iter(list(self.nodes.values()))

    async def start(self, number: int, *, key: Key | None = None, votes_are_lost: bool = False) -> Node:
        """Start a node on the database of its number; ``key`` lets it be the twin of another."""
        node: Node = await self._nursery.start(self._run, number, KEYS[number] if key is None else key, votes_are_lost)
        return node

    async def _run(self, number: int, key: Key, votes_are_lost: bool, *, task_status: trio.TaskStatus[Node]) -> None:
        node = None
        try:
            with trio.CancelScope() as scope:
                async with self.hub.open(secret(number), listen=address_of(number)) as network:
                    self.witness.listen(network)
                    self._lose(network)
                    with Replica.open(self.folder / f"chain{number}", self.genesis) as replica:
                        if votes_are_lost:
                            replica.finals.set_abstain(None)
                        node = self.nodes[number] = self._assemble(number, key, network, replica, scope)
                        async with trio.open_nursery() as nursery:
                            await nursery.start(node.run)
                            task_status.started(node)
        finally:
            if node is not None:
                del self.nodes[number]
                node.stopped.set()

    def _assemble(self, number: int, key: Key, network: Network, replica: Replica, scope: trio.CancelScope) -> Node:
        bootstrap = tuple(f"{address_of(other)}/p2p/{peer_number(other)}" for other in self._known() if other != number)
        self._starts[number] += 1
        peers = Peers(network, bootstrap=bootstrap, rng=random.Random(self._random.random()))
        relay = Relay(network, replica, key, Inline())
        finality = Finality(network, peers, relay, key, Inline())
        submissions = Submissions(network, peers, replica, Mempool(self.genesis.network), key)
        author, accuser = Author(relay, submissions, key), Accuser(relay, finality, submissions, key.address)
        return Node(number, key, network, replica, relay, finality, submissions, author, accuser, peers, scope)

    def _lose(self, network: Network) -> None:
        hear = network.hear  # type: ignore[attr-defined]

        def heard(*message: Any) -> None:
            if self._random.random() >= self._loss:
                hear(*message)

        network.hear = heard  # type: ignore[attr-defined]

    def _known(self) -> list[int]:
        return sorted({*self._starts, *range(len(self.genesis.validators))})

    async def restart(self, number: int) -> Node:
        """Stop a node and start it again at once."""
        key = self.nodes[number].key
        await self.nodes[number].stop()
        return await self.start(number, key=key)

    async def restart_without_disk(self, number: int) -> Node:
        """Stop a node, lose its database, and start it with nothing but its key."""
        key = self.nodes[number].key
        await self.nodes[number].stop()
        shutil.rmtree(self.folder / f"chain{number}")
        return await self.start(number, key=key, votes_are_lost=True)

    def pay(self, user: Key, payee: Key, amount: int, nonce: int) -> Record:
        return make_record(user, self.genesis.network, Transfer(payee.address, amount), nonce=nonce)

    def agree(self, k: int = 0) -> bool:
        """Whether all that run have the same final cut, of at least this number, and the same heads."""
        finals = {node.replica.final.id for node in self.nodes.values()}
        heads = {node.replica.heads() for node in self.nodes.values()}
        return len(finals) == len(heads) == 1 and all(node.replica.final.k >= k for node in self.nodes.values())


@asynccontextmanager
async def validators(
    folder: Path, count: int, *, users: int = 0, hub: MemoryHub | None = None, seed: int = 0
) -> AsyncIterator[Group]:
    """Run ``count`` validators, numbered from 0, and behind them nodes without a bond."""
    async with trio.open_nursery() as nursery:
        group = Group(nursery, folder, count, hub or MemoryHub(latency=0.01), random.Random(seed))
        for number in range(count + users):
            await group.start(number)
        await eventually(lambda: all(len(node.network.neighbours()) == count + users - 1 for node in group))
        yield group
        nursery.cancel_scope.cancel()


def fork(node: Node, records: Iterable[tuple[Record, ...]] = ((), ())) -> list[Block]:
    """Write as many blocks of a node's key in one place as there are tuples of records. Nobody has seen them yet."""
    replica, branch = node.replica, node.replica.dag.branches_of(node.key.address)[-1:]
    parents = dict(replica.dag.choose_parents(node.key.address))
    return [
        make_block(
            node.key,
            replica.genesis.network,
            each,
            chain="T",
            type="data",
            seq=branch[0].last + 1 if branch else 0,
            prev=branch[0].tip if branch else None,
            parents=tuple(parents),
            height=1 + max(parent.height for parent in parents.values()),
            anchor=anchor(replica),
            timestamp_ms=place,
        )
        for place, each in enumerate(records)
    ]
