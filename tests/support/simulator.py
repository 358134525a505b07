"""A seeded discrete-event simulation of validators: delays, loss, partitions, crashes and Byzantine nodes.

Virtual time in milliseconds. One seed is one run. The DAG is a model of the real one: the past of a block is a bit
mask over all blocks of the run, so that a run takes a fraction of a second. Signatures are hashes.

``check`` raises :class:`Violation` where two honest nodes decide differently, an honest node votes twice, a decided
cut leaves out a third of stake, and at the end, after all partitions healed, where something of an honest author is not
final everywhere, or the net does not come to rest.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from typing import Any

from blyan_node.chain.authoring import Pending, wants_to_write
from blyan_node.chain.cut import Certificate, Cut, Vote, check_certificate
from blyan_node.chain.effects import (
    Broadcast,
    Decide,
    Diverged,
    Effect,
    Evidence,
    FetchBlocks,
    FetchCuts,
    LogEntry,
    ScheduleTimeout,
    Send,
    SendCuts,
    SyncVoteLog,
)
from blyan_node.chain.genesis import Validator
from blyan_node.chain.height import Base, Timing, Window
from blyan_node.chain.tendermint import Tendermint
from blyan_node.chain.validators import ValidatorSet
from tests.support.universe import NETWORK, FastSigner, SimBlock, Universe, address, fast_recover

TIMING = Timing(propose=600, prevote=300, precommit=300, step=150, resend=400)


class Violation(AssertionError):
    """What was promised does not hold."""


@dataclass
class Disk:
    """What survives a crash."""

    known: int = 1
    log: list[LogEntry] = field(default_factory=list)
    cuts: list[tuple[Cut, Certificate]] = field(default_factory=list)


@dataclass
class Settings:
    """One kind of run. ``byzantine`` names a style for each Byzantine validator; ``twins`` have one key twice.

    ``demand_coverage`` checks what the coverage rule promises. Without ``vote_log`` a crash loses it.
    """

    nodes: int = 4
    byzantine: tuple[str, ...] = ()
    twins: int = 0
    loss: float = 0.05
    partitions: int = 3
    crashes: int = 0
    payloads: int = 10
    chaos_ms: int = 15_000
    rest_ms: int = 60_000
    vote_log: bool = True
    demand_coverage: bool = True
    stakes: tuple[int, ...] = ()


class Node:
    """The shell around one honest core; also its view of the DAG."""

    is_honest = True

    def __init__(self, net: Simulation, number: int, address: bytes) -> None:
        self.net, self.number, self.address = net, number, address
        self.disk = Disk()
        self.restart()

    def restart(self) -> None:
        net, disk = self.net, self.disk
        self.alive = True
        self.life = next(net.lives)
        self.known = 0
        self.heads: set[bytes] = set()
        self.seqs: dict[tuple[bytes, int], bytes] = {}
        self.equivocators: set[bytes] = set()
        self.last: SimBlock | None = None
        self.waiting: dict[bytes, SimBlock] = {}
        self.wanted: set[bytes] = set()
        self.writing = False
        for block in net.all.in_mask(disk.known, len(net.all.blocks)):
            self.index_block(block)
        log = disk.log if net.settings.vote_log else ()
        self.core = Tendermint(
            NETWORK, CoreView(self), signer=FastSigner(self.address), log=log, timing=TIMING, recover=fast_recover
        )
        self.begin()
        self.later(net.random.randint(0, 500), self.compare)

    # The view

    def heads_now(self) -> list[SimBlock]:
        """What an honest author builds on: heads, with those of equivocators replaced by their parents."""
        found, stack, seen = set(), list(self.heads), set()
        while stack:
            block = self.net.all.by_id[stack.pop()]
            if block.id in seen:
                continue
            seen.add(block.id)
            if block.author in self.equivocators:
                stack += block.parents
            else:
                found.add(block.id)
        return self.net.all.antichain(found)

    def heads_for_cut(self) -> tuple[bytes, ...]:
        heads = [block.id for block in self.heads_now()] + list(self.base.prev_heads)
        return tuple(sorted(block.id for block in self.net.all.antichain(heads)))

    def window(self, base: Base, heads: tuple[bytes, ...]) -> Window:
        blocks = self.net.all
        missing = [id for id in heads if id not in blocks.by_id or not self.known >> blocks.by_id[id].index & 1]
        if missing:
            return Window(missing=tuple(missing))
        past, before = blocks.past(heads), blocks.past(base.prev_heads)
        new = past & ~before
        return Window(
            ordered=not before & ~past and len(blocks.antichain(heads)) == len(heads),
            content=bool(new & blocks.payload),
            anchored=frozenset(a for a in base.validators.stakes if new & blocks.anchored[a, base.k - 1]),
        )

    # The DAG

    def index_block(self, block: SimBlock) -> None:
        self.known |= 1 << block.index
        self.heads.difference_update(block.parents)
        self.heads.add(block.id)
        if self.seqs.setdefault((block.author, block.seq), block.id) != block.id:
            self.equivocators.add(block.author)
        if block.author == self.address:
            self.last = block

    def accept(self, block: SimBlock, source: int) -> None:
        self.waiting[block.id] = block
        self.wanted.discard(block.id)
        self.adopt(source)

    def adopt(self, source: int) -> None:
        changed, missing = False, set()
        for block in sorted(self.waiting.values(), key=lambda block: block.index):
            if block.anchor >= self.base.k:
                continue  # held: its anchor is not final here
            if absent := [id for id in block.parents if not self.has(id)]:
                missing.update(absent)
                continue
            del self.waiting[block.id]
            if not self.has(block.id):
                self.index_block(block)
                self.disk.known |= 1 << block.index
                changed = True
        if missing := missing - set(self.waiting) - self.wanted:
            self.want(missing, source)
        if changed:
            self.run(self.core.blocks_arrived(self.net.now))
            self.consider()

    def has(self, id: bytes) -> bool:
        return bool(self.known >> self.net.all.by_id[id].index & 1)

    def want(self, ids: Iterable[bytes], source: int) -> None:
        ids = sorted(id for id in ids if id in self.net.all.by_id)
        self.wanted.update(ids)
        self.net.send(self, source, "want", ids)

    # Writing

    def pending(self) -> Pending:
        blocks = self.net.all
        tips = self.heads_now()
        visible = blocks.past([block.id for block in tips])
        own = self.last.past if self.last else 1
        others = blocks.payload_to_acknowledge & ~blocks.by_author[self.address]
        content = self.window(self.base, self.heads_for_cut()).content
        anchored = self.last is not None and self.last.anchor == self.base.k - 1
        return Pending(False, bool(others & visible & ~own), content, anchored)

    def consider(self) -> None:
        if not self.writing and self.address not in self.equivocators and wants_to_write(self.pending()):
            self.writing = True
            self.later(self.net.random.randint(10, 80), self.acknowledge)

    def acknowledge(self) -> None:
        self.writing = False
        if wants_to_write(self.pending()):
            self.write(payload=False)

    def write(self, *, payload: bool) -> None:
        if self.address in self.equivocators:
            return
        seq = self.last.seq + 1 if self.last else 0
        parents = [block.id for block in self.heads_now()]
        if self.last:
            parents = [block.id for block in self.net.all.antichain([*parents, self.last.id])]
        block = self.net.all.write(self.address, seq, self.base.k - 1, payload, parents)
        self.net.last_written = self.net.now
        self.spread(block)

    def spread(self, block: SimBlock) -> None:
        self.accept(block, self.number)
        for node in self.net.nodes:
            if node is not self:
                self.net.send(self, node.number, "blocks", [block])

    # Consensus

    def begin(self) -> None:
        cuts = self.disk.cuts
        prev = cuts[-1][0] if cuts else None
        self.base = Base(
            k=len(cuts) + 1,
            prev_cut=prev.id if prev else NETWORK,
            prev_heads=prev.heads if prev else (NETWORK,),
            state_root=hashlib.sha256(b"state" + (prev.id if prev else NETWORK)).digest(),
            next_validators_hash=self.net.validators.hash,
            validators=self.net.validators,
        )
        self.run(self.core.begin(self.base, self.net.now))
        self.adopt(self.number)
        self.consider()

    def run(self, effects: list[Effect]) -> None:
        """Execute effects in order; a crash may come between any two."""
        for effect in effects:
            if self.net.crashing is self and self.net.random.random() < 0.3:
                self.net.crashing = None
                self.net.crash(self)
            if not self.alive:
                return
            self.execute(effect)

    def execute(self, effect: Effect) -> None:
        net = self.net
        match effect:
            case Broadcast(message):
                self.broadcast(message)
            case Send(to, message):
                net.send_to(self, to, "bft", message)
            case SyncVoteLog(entry):
                self.disk.log = [old for old in self.disk.log if old.place[0] >= self.base.k] + [entry]
            case ScheduleTimeout(at):
                self.later(at - net.now, lambda: self.run(self.core.tick(net.now)))
            case Decide(cut, certificate):
                self.later(net.random.randint(0, 20), lambda: self.commit(cut, certificate))
            case FetchBlocks(ids, source):
                net.send_to(self, source, "want", list(ids))
            case FetchCuts(source, k):
                net.send_to(self, source, "status", (k, tuple(self.heads)))
            case SendCuts(to, k):
                for item in self.disk.cuts[k - 1 : k + 9]:
                    net.send_to(self, to, "cut", item)
            case Evidence(proof):
                net.on_evidence(proof.first.validator)
            case Diverged(cut, _):
                raise Violation(f"node {self.number} finds the decided cut {cut.k} invalid")

    def broadcast(self, message: Any) -> None:
        self.net.on_signed(self, message)
        for node in self.net.nodes:
            if node is not self:
                self.net.send(self, node.number, "bft", message)

    def commit(self, cut: Cut, certificate: Certificate) -> None:
        self.disk.cuts.append((cut, certificate))
        self.net.on_decided(self, cut, certificate)
        self.begin()

    def compare(self) -> None:
        """Anti-entropy with one peer; also fetches again what was lost."""
        self.wanted.clear()
        peer = self.net.random.choice([node for node in self.net.nodes if node is not self])
        self.net.send(self, peer.number, "status", (self.base.k, tuple(self.heads)))
        self.later(self.net.random.randint(300, 700), self.compare)

    def receive(self, source: int, kind: str, content: Any) -> None:
        net = self.net
        match kind:
            case "bft":
                self.run(self.core.handle(content, net.nodes[source].address, net.now))
            case "blocks":
                for block in content:
                    if not self.has(block.id):
                        self.accept(block, source)
            case "want":
                found = [net.all.by_id[id] for id in content if id in net.all.by_id and self.has(id)]
                net.send(self, source, "blocks", found)
            case "cut":
                self.run(self.core.on_certificate(*content, net.nodes[source].address, net.now))
            case "status":
                k, heads = content
                for item in self.disk.cuts[k - 1 : k + 9]:
                    net.send(self, source, "cut", item)
                net.send(self, source, "blocks", net.all.in_mask(self.known & ~net.all.past(heads), 64))

    def later(self, delay: int, action: Callable[[], None]) -> None:
        """Do something unless the node has crashed until then."""
        life = self.life
        self.net.at(self.net.now + max(0, delay), lambda: action() if self.alive and self.life == life else None)


class CoreView:
    """The two questions of the core, under the names that it asks them by."""

    def __init__(self, node: Node) -> None:
        self.node = node

    def heads(self, base: Base) -> tuple[bytes, ...]:
        return self.node.heads_for_cut()

    def window(self, base: Base, heads: tuple[bytes, ...]) -> Window:
        return self.node.window(base, heads)


class Simulation:
    """One run: the nodes, the network between them, and what is checked while it goes on."""

    def __init__(self, seed: int, settings: Settings) -> None:
        from tests.support.byzantine import Byzantine, Twin

        self.seed, self.settings = seed, settings
        self.random = random.Random(f"{seed} {settings}")
        self.now = 0
        self.lives, self._order = count(), count()
        self._queue: list[tuple[int, int, Callable[[], None]]] = []
        self.all = Universe()
        stakes = settings.stakes or (10,) * settings.nodes
        self.validators = ValidatorSet.of(Validator(address(i), stakes[i]) for i in range(settings.nodes))
        self.groups: list[int] | None = None
        self.crashing: Node | None = None
        self.decided: dict[int, Cut] = {}
        self.signed: dict[tuple[Any, ...], Any] = {}
        self.evidence: set[bytes] = set()
        self.last_written = 0
        self.messages = 0
        self.max_round = 0
        self.nodes: list[Node] = []
        for number in range(settings.nodes):
            rank = number - (settings.nodes - len(settings.byzantine))
            if rank >= 0:
                self.nodes.append(Byzantine(self, number, address(number), settings.byzantine[rank]))
            elif number < settings.twins:
                self.nodes.append(Twin(self, number, address(number)))
            else:
                self.nodes.append(Node(self, number, address(number)))
        for number in range(settings.twins):
            self.nodes.append(Twin(self, len(self.nodes), address(number)))

    @property
    def honest(self) -> list[Node]:
        return [node for node in self.nodes if node.is_honest]

    # The network

    def at(self, time: int, action: Callable[[], None]) -> None:
        heappush(self._queue, (time, next(self._order), action))

    def send(self, node: Node, to: int, kind: str, content: Any) -> None:
        self.messages += 1
        if to == node.number or self.random.random() < self.settings.loss:
            return
        delay = self.random.randint(5, 60) if self.random.random() < 0.95 else self.random.randint(60, 600)

        def arrive() -> None:
            if self.nodes[to].alive and self.are_connected(node, self.nodes[to]):
                self.nodes[to].receive(node.number, kind, content)

        self.at(self.now + delay, arrive)

    def are_connected(self, one: Node, other: Node) -> bool:
        return self.groups is None or self.groups[one.number] == self.groups[other.number]

    def send_to(self, node: Node, to: bytes, kind: str, content: Any) -> None:
        for peer in self.nodes:
            if peer.address == to:
                self.send(node, peer.number, kind, content)

    def crash(self, node: Node) -> None:
        node.alive = False
        self.at(self.now + self.random.randint(100, 4000), node.restart)

    # The run

    def run(self) -> None:
        settings, random = self.settings, self.random
        for _ in range(settings.payloads):
            self.at(random.randint(0, settings.chaos_ms), self._payload)
        for _ in range(settings.partitions):
            self.at(random.randint(0, settings.chaos_ms - 2000), self._partition)
        for _ in range(settings.crashes):
            self.at(random.randint(0, settings.chaos_ms), self._arm_crash)
        self.at(settings.chaos_ms, self._heal)
        end = settings.chaos_ms + settings.rest_ms
        while self._queue and self._queue[0][0] <= end:
            self.now, _, action = heappop(self._queue)
            action()
            if self.now > settings.chaos_ms and self.now - self.last_written > 3000 and self.is_settled():
                break
        self.check()

    def _payload(self) -> None:
        writers = [node for node in self.nodes if node.alive]
        if writers:
            self.random.choice(writers).write(payload=True)

    def _partition(self) -> None:
        self.groups = [self.random.randint(0, 1) for _ in self.nodes]

        def heal() -> None:
            self.groups = None

        self.at(self.now + self.random.randint(1000, 6000), heal)

    def _arm_crash(self) -> None:
        self.crashing = self.random.choice(self.honest)

    def _heal(self) -> None:
        self.groups = self.crashing = None

    # What is checked

    def on_signed(self, node: Node, message: Any) -> None:
        """Only what a node sends of its own counts; proposals of others are passed on too."""
        if not node.is_honest:
            return
        self.max_round = max(self.max_round, message.round)
        if isinstance(message, Vote):
            place = (message.validator, message.k, message.round, message.step)
            if self.signed.setdefault(place, message.cut) != message.cut:
                raise Violation(f"node {node.number} voted twice at {place[1:]}")

    def on_evidence(self, validator: bytes) -> None:
        self.evidence.add(validator)
        if any(node.address == validator for node in self.honest):
            raise Violation("evidence against an honest node")

    def on_decided(self, node: Node, cut: Cut, certificate: Certificate) -> None:
        if not node.is_honest:
            return
        if self.decided.setdefault(cut.k, cut) != cut:
            raise Violation(f"fork: two cuts {cut.k} were decided")
        check_certificate(certificate, cut, self.validators, NETWORK, fast_recover)
        before = self.decided[cut.k - 1].heads if cut.k > 1 else (NETWORK,)
        new = self.all.past(cut.heads) & ~self.all.past(before)
        stake = sum(v.stake for v in self.validators.members if new & self.all.anchored[v.address, cut.k - 1])
        if self.settings.demand_coverage and stake * 3 <= self.validators.total * 2:
            raise Violation(f"cut {cut.k} was cut around the blocks of others")

    def lost(self, node: Node) -> int:
        """The blocks with payload, by honest authors, that are not final at a node."""
        own = 0
        for author in self.honest:
            own |= self.all.by_author[author.address]
        return own & self.all.payload & ~self.all.past(node.base.prev_heads)

    def is_settled(self) -> bool:
        return all(node.alive and node.base.k == len(self.decided) + 1 and not self.lost(node) for node in self.honest)

    def check(self) -> None:
        for node in self.honest:
            if not node.alive or node.base.k != len(self.decided) + 1:
                raise Violation(f"node {node.number} is at height {node.base.k}, others at {len(self.decided) + 1}")
            if lost := self.lost(node):
                raise Violation(f"{lost.bit_count()} blocks with payload are not final at node {node.number}")
        if self.now - self.last_written < 3000:
            raise Violation("the net does not come to rest")


def simulate(seed: int, settings: Settings) -> Simulation:
    """Run one seed; a violation tells how to replay it."""
    net = Simulation(seed, settings)
    try:
        net.run()
    except Violation as violation:
        changed = {name: value for name, value in vars(settings).items() if value != getattr(Settings(), name)}
        arguments = ", ".join(f"{name}={value!r}" for name, value in changed.items())
        raise Violation(
            f"{violation} (t = {net.now} ms). Replay: python -c 'from tests.support.simulator import *; "
            f"simulate({seed}, Settings({arguments}))'"
        ) from violation
    return net
