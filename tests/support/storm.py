"""Whole validators through a storm: partitions, loss, restarts, double spends, one that cheats; then it has to be calm.

A run follows from its seed: ``.venv/bin/python -m tests.support.storm SEED VALIDATORS CHEAT`` replays it.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import trio
from trio.testing import MockClock

from blyan_node.chain.candidates import Candidates
from blyan_node.chain.cut import Vote, sign_vote
from blyan_node.chain.effects import pack_message, unpack_message
from blyan_node.chain.keys import Key
from blyan_node.chain.records import Record
from blyan_node.errors import BlyanError
from blyan_node.p2p.memory import MemoryHub
from blyan_node.p2p.transport import PeerId
from blyan_node.relay import blocks, finality
from tests.support.network import eventually, peer_number
from tests.support.validators import KEYS, STAKE, USERS, WEALTH, Group, Node, fork

CHEATS = ("none", "fork", "vote", "twin")
TWIN = 30
CHAOS = 12.0
CALM = 200.0


class Violation(Exception):
    """A promise was broken; the text says how to see it again."""


class Weather(MemoryHub):
    """Everything takes its time, each another."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__(latency=0.01)
        self._random = rng

    async def travel(self, one: PeerId, other: PeerId) -> None:
        await trio.sleep(self._random.expovariate(1 / 0.03))
        await super().travel(one, other)


@dataclass
class Storm:
    """One run. ``signed`` are the payments by their place, ``acknowledged`` those that a node has taken."""

    group: Group
    validators: int
    cheat: str
    random: random.Random
    signed: dict[tuple[bytes, int], set[Record]] = field(default_factory=lambda: defaultdict(set))
    acknowledged: list[Record] = field(default_factory=list)
    written: set[bytes] = field(default_factory=set)

    @property
    def cheater(self) -> int | None:
        return None if self.cheat == "none" else self.validators - 1

    @property
    def users(self) -> tuple[int, int]:
        return self.validators, self.validators + 1

    def honest(self) -> list[Node]:
        return [node for node in self.group if node.number not in (self.cheater, TWIN)]

    async def rage(self) -> None:
        """Let all go wrong for a while, then end it."""
        with trio.move_on_after(CHAOS):
            async with trio.open_nursery() as nursery:
                for number in self.users:
                    nursery.start_soon(self._pay, number)
                nursery.start_soon(self._split_and_heal)
                nursery.start_soon(self._restart)
                match self.cheat:
                    case "fork":
                        nursery.start_soon(self._fork)
                    case "vote":
                        self._vote_twice()
                    case "twin":
                        await self.group.start(TWIN, key=KEYS[self.validators - 1])
        self.group.hub.heal()
        for number in range(self.validators):
            if number not in self.group.nodes:
                await self.group.start(number)

    async def _pay(self, number: int) -> None:
        mine = USERS[number % 2 : 3 : 2]
        while True:
            await trio.sleep(self.random.uniform(0.2, 3))
            node, user = self.group[number], self.random.choice(mine)
            nonce = node.submissions.mempool.next_nonce(user.address, node.replica.view())
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._submit, node, self._payment(user, nonce))
                if self.random.random() < 0.2:
                    other = self.group[self.random.choice(self.users)]
                    nursery.start_soon(self._submit, other, self._payment(user, nonce))

    def _payment(self, user: Key, nonce: int) -> Record:
        record = self.group.pay(user, self.random.choice(USERS), self.random.randint(1, 20), nonce)
        self.signed[user.address, nonce].add(record)
        return record

    async def _submit(self, node: Node, record: Record) -> None:
        try:
            await node.submissions.submit(record)
        except BlyanError:
            return
        self.acknowledged.append(record)

    async def _split_and_heal(self) -> None:
        numbers = [*range(self.validators + 2), TWIN]
        while True:
            await trio.sleep(self.random.uniform(2, 8))
            self.random.shuffle(numbers)
            half = self.random.randint(1, len(numbers) - 1)
            self.group.hub.partition(map(peer_number, numbers[:half]), map(peer_number, numbers[half:]))
            await trio.sleep(self.random.uniform(1, 8))
            self.group.hub.heal()

    async def _restart(self) -> None:
        while True:
            await trio.sleep(self.random.uniform(2, 8))
            number = self.random.randrange(self.validators - (self.cheater is not None))
            self._note(self.group[number])
            await self.group[number].stop()
            await trio.sleep(self.random.choice((0, 0, self.random.uniform(0, 6))))
            await self.group.start(number)

    def _note(self, node: Node) -> None:
        """Remember what a node has written: it said so to others only after it was on the disk."""
        self.written |= {
            block.id for block in node.replica.blocks(limit=10**6) if block.header.author == node.key.address
        }

    async def _fork(self) -> None:
        while True:
            await trio.sleep(self.random.uniform(1, 10))
            node, user = self.group[self.validators - 1], USERS[3]  # an accomplice: nobody owes it anything
            nonce = node.replica.view().next_nonce(user.address)
            for block in fork(node, [(self._payment(user, nonce),) for _ in range(2)]):
                await node.network.publish(blocks.TOPIC, block.raw)

    def _vote_twice(self) -> None:
        node = self.group[self.validators - 1]
        publish = node.network.publish

        async def distorted(topic: str, data: bytes) -> None:
            await publish(topic, data)
            if (
                topic == finality.TOPIC
                and isinstance(vote := unpack_message(data), Vote)
                and self.random.random() < 0.5
            ):
                place = {"k": vote.k, "round": vote.round, "step": vote.step}
                other = None if vote.cut else bytes([vote.round % 256]) * 32
                lie = sign_vote(node.key, self.group.genesis.network, **place, cut=other)
                await publish(topic, pack_message(lie))

        node.network.publish = distorted  # type: ignore[method-assign]

    # --- afterwards ---

    async def settle(self) -> None:
        """Wait until all agree and nothing is left to do."""
        try:
            await eventually(self._is_calm, within=CALM, every=1)
        except trio.TooSlowError:
            finals = {node.number: (node.replica.final.k, node.replica.count()) for node in self.honest()}
            unsettled = sum(
                not self._is_settled(node, record) for node in self.honest() for record in self.acknowledged
            )
            raise AssertionError(f"no calm: {finals}, {unsettled} unsettled") from None

    def _is_calm(self) -> bool:
        honest = self.honest()
        return (
            len({node.replica.final.id for node in honest}) == 1
            and len({tuple(id for id, _ in node.replica.dag.tips()) for node in honest}) == 1
            and not any(Candidates(node.replica).has_content() for node in honest)
            and all(self._is_settled(node, record) for node in honest for record in self.acknowledged)
        )

    def _is_settled(self, node: Node, record: Record) -> bool:
        """Whether it took effect, or one that its sender signed in its place."""
        finals = node.replica.finals
        results = (finals.result(rival.id) for rival in self.signed[record.sender, record.nonce])
        return [result.void for result in results if result is not None].count(None) == 1

    def check(self) -> None:
        """Look whether every promise was kept."""
        honest, cheaters = self.honest(), {KEYS[self.cheater].address} if self.cheater is not None else set()
        for k in range(1, max(node.replica.final.k for node in honest) + 1):
            stored = [node.replica.finals.stored(k) for node in honest]
            assert len({each and each.cut.id for each in stored}) == 1, f"a fork at cut {k}"
            assert len({each and each.root for each in stored}) == 1, f"states that differ after cut {k}"
        assert self.group.witness.double_voters() <= cheaters, "an honest validator voted twice"
        for node in honest:
            state, ids = node.replica.final.state, {block.id for block in node.replica.blocks(limit=10**6)}
            assert set(state.slashed) <= cheaters, "an honest validator was slashed"
            burnt = STAKE // 2 * len(state.slashed)
            assert state.supply == state.total() == self.validators * STAKE + len(USERS) * WEALTH - burnt, "the supply"
            assert self.written <= ids, f"{len(self.written - ids)} blocks are lost on node {node.number}"
            assert not any(node.replica.is_equivocator(key.address) for key in KEYS if key.address not in cheaters)
        assert self.acknowledged, "nothing happened"
        assert honest[0].replica.final.k >= 3, "next to nothing was decided"


async def _weather(seed: int, validators: int, cheat: str, folder: Path) -> Storm:
    rng = random.Random(f"{seed}/{validators}/{cheat}")
    async with trio.open_nursery() as nursery:
        group = Group(nursery, folder, validators, Weather(rng), rng, loss=rng.choice((0, 0.05, 0.2)))
        for number in range(validators + 2):
            await group.start(number)
        storm = Storm(group, validators, cheat, rng)
        await storm.rage()
        await storm.settle()
        for node in storm.honest():
            storm._note(node)
        storm.check()
        nursery.cancel_scope.cancel()
    return storm


@contextmanager
def _replayable(seed: int) -> Iterator[None]:
    """Take chance out of trio's scheduler, and the wall clock out of blocks: the seed alone decides.

    The scheduler's switch is private; Hypothesis and pytest-trio use the same.
    """
    scheduler = trio._core._run
    before = scheduler._ALLOW_DETERMINISTIC_SCHEDULING, scheduler._r.getstate(), blocks.time
    scheduler._ALLOW_DETERMINISTIC_SCHEDULING = True
    scheduler._r.seed(seed)
    blocks.time = SimpleNamespace(time_ns=lambda: int(trio.current_time() * 1e9))  # type: ignore[assignment]
    try:
        yield
    finally:
        scheduler._ALLOW_DETERMINISTIC_SCHEDULING, state, blocks.time = before
        scheduler._r.setstate(state)


def storm(seed: int, validators: int, cheat: str, folder: Path | None = None) -> Storm:
    """Run one storm. Raises Violation."""
    with tempfile.TemporaryDirectory() as other, _replayable(seed):
        try:
            clock = MockClock(autojump_threshold=0)
            return trio.run(_weather, seed, validators, cheat, folder or Path(other), clock=clock)
        except Exception as error:
            replay = f".venv/bin/python -m tests.support.storm {seed} {validators} {cheat}"
            raise Violation(f"{_reason(error)}\nreplay: {replay}") from error


def _reason(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    _, chosen, count, style = sys.argv
    ended = storm(int(chosen), int(count), style)
    sys.stdout.write(f"calm: {len(ended.acknowledged)} payments acknowledged, {len(ended.written)} blocks written\n")
