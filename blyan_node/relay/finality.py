"""The journey of a cut: what the consensus core says and hears, and what it makes final.

The core is :mod:`blyan_node.chain.tendermint`, which does no I/O. Here its effects are executed, one after the other in
the order in which it gave them: a vote leaves only after it is on the disk. Messages are gossiped; answers to one peer
go to it directly. What is lost is sent again by the core while it matters.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush
from pathlib import Path
from typing import TypeVar

import trio

from blyan_node.chain.candidates import Candidates
from blyan_node.chain.cut import Certificate, Cut, DoubleVote
from blyan_node.chain.effects import (
    MAX_MESSAGE,
    Broadcast,
    Decide,
    Diverged,
    Effect,
    Evidence,
    FetchBlocks,
    FetchCuts,
    Message,
    ScheduleTimeout,
    Send,
    SendCuts,
    SyncVoteLog,
    pack_message,
    unpack_message,
)
from blyan_node.chain.keys import Key
from blyan_node.chain.outcome import Committed
from blyan_node.chain.tendermint import Tendermint, abstain_after_loss
from blyan_node.codec import MAX_INT
from blyan_node.errors import CodecError, LocalError, PeerError, RuleError, StoreError
from blyan_node.p2p import rpc
from blyan_node.p2p.peers import Peers
from blyan_node.p2p.transport import Gossip, Network, PeerId
from blyan_node.pulse import Pulse
from blyan_node.relay.blocks import DISK_AGAIN, Relay
from blyan_node.relay.messages import TELL, Tell, Told
from blyan_node.worker import Lane

log = logging.getLogger(__name__)

TOPIC = "blyan/consensus/1"
BAD_MESSAGE = 25  # points: four provably wrong messages and the peer is out
SENDING = 64  # answers on their way at once; more are dropped, like all that is lost
GATHER = 0.02  # seconds in which arriving blocks are gathered before the core looks at the DAG

T = TypeVar("T")


class Finality:
    """Decides cuts with the other validators, or follows what they decide where this node has no stake."""

    def __init__(self, network: Network, peers: Peers, relay: Relay, key: Key, disk: Lane) -> None:
        self._network, self._peers, self._relay, self._disk = network, peers, relay, disk
        self._replica = relay.replica
        abstain = self._replica.finals.abstain_through()
        self.core = Tendermint(
            self._replica.genesis.network,
            Candidates(self._replica),
            signer=key,
            log=self._replica.finals.vote_log(),
            abstain_through=MAX_INT if abstain is None else abstain,
        )
        self._address = key.address
        self._turn = trio.Lock()
        self._timeouts: list[int] = []
        self._scheduled = Pulse()
        self._sending = trio.CapacityLimiter(SENDING)
        self._nursery: trio.Nursery | None = None
        self.double_votes: deque[DoubleVote] = deque(maxlen=16)
        """Proofs that nobody has brought to the chain yet."""
        relay.decide, relay.adopt = self._on_certificate, self._on_snapshot

    @property
    def recovering(self) -> bool:
        """Whether this validator lost its disk and does not know yet how long it has to abstain."""
        return self._replica.finals.abstain_through() is None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Take part until cancelled. Raises LocalError where this replica turns out to be damaged."""
        rpc.serve(self._network, TELL, self._on_tell, concurrency=16)
        async with (
            self._network.subscribe(TOPIC, _plausible, capacity=1024) as gossip,
            trio.open_nursery() as nursery,
        ):
            self._nursery = nursery
            await self._begin()
            nursery.start_soon(self._listen, gossip)
            nursery.start_soon(self._watch_blocks)
            nursery.start_soon(self._watch_clock)
            if self.recovering:
                nursery.start_soon(self._recover)
            task_status.started()

    async def _begin(self) -> None:
        """Take part from the last final cut on: not before the history has come to the checkpoint, if there is one."""
        if not self._replica.is_below_checkpoint:
            await self._step(lambda now: self.core.begin(self._replica.final.base(), now))

    # --- what happens ---

    async def _listen(self, gossip: trio.MemoryReceiveChannel[Gossip]) -> None:
        async for each in gossip:
            await self._hear(unpack_message(each.data), each.origin)

    async def _on_tell(self, peer: PeerId, request: Tell) -> Told:
        await self._hear(unpack_message(request.message), peer)
        return Told()

    async def _hear(self, message: Message, source: PeerId) -> None:
        try:
            await self._step(lambda now: self.core.handle(message, source.encode(), now))
        except RuleError as error:
            log.warning("refused a message of the consensus from %s: %s", source, error)
            self._network.penalise(source, BAD_MESSAGE, f"consensus: {error}")

    async def _on_certificate(self, cut: Cut, certificate: Certificate, source: PeerId) -> None:
        if self._replica.is_below_checkpoint:
            await self._relay.follow(cut, certificate, source)
            await self._begin()
        else:
            await self._step(lambda now: self.core.on_certificate(cut, certificate, source.encode(), now))

    async def _on_snapshot(self, directory: Path) -> None:
        async with self._turn:
            self._replica.adopt(directory)
        await self._begin()

    async def _watch_blocks(self) -> None:
        seen = self._relay.changed.count
        while True:
            seen = await self._relay.changed.after(seen)
            await trio.sleep(GATHER)
            seen = self._relay.changed.count
            await self._step(self.core.blocks_arrived)

    async def _watch_clock(self) -> None:
        while True:
            seen, now = self._scheduled.count, _now()
            if self._timeouts and self._timeouts[0] <= now:
                while self._timeouts and self._timeouts[0] <= now:
                    heappop(self._timeouts)
                await self._step(self.core.tick)
                continue
            wait = (self._timeouts[0] - now) / 1000 if self._timeouts else float("inf")
            await self._scheduled.after(seen, most=wait)

    async def _recover(self) -> None:
        """After a lost disk: learn from the others through which height the lost votes may reach."""
        log.warning(
            "this validator's votes are lost: waiting to hear from more than 2/3 of stake before it votes again"
        )
        while True:
            seen = self._relay.changed.count
            finals = {address: k for address, k in self._relay.finals().items() if address != self._address}
            through = abstain_after_loss(finals, self._replica.final.base().validators, self._address)
            if through is not None:
                break
            await self._relay.changed.after(seen, most=1.0)
        self._replica.finals.set_abstain(through)
        await self._on_disk(self._replica.flush)
        log.warning("this validator abstains through cut %d, lest it contradict a vote that it lost", through)
        self.core.abstain_through = through
        await self._begin()

    # --- what follows ---

    async def _step(self, act: Callable[[int], list[Effect]]) -> None:
        """Give the core one input and execute what comes of it, before it gets the next."""
        async with self._turn:
            effects = deque(act(_now()))
            while effects:
                effects.extend(await self._execute(effects.popleft()))

    async def _execute(self, effect: Effect) -> list[Effect]:
        match effect:
            case Broadcast(message):
                await self._network.publish(TOPIC, pack_message(message))
            case Send(to, message):
                self._send(PeerId(to.decode()), message)
            case SyncVoteLog(entry):
                await self._on_disk(lambda: self._replica.finals.log_vote(entry), here=True)
                await self._on_disk(self._replica.flush)
            case ScheduleTimeout(at):
                heappush(self._timeouts, at)
                self._scheduled.beat()
            case Decide(cut, certificate):
                committed = await self._commit(cut, certificate)
                self._relay.committed(committed)
                return self.core.begin(committed.final.base(), _now())
            case FetchBlocks(ids, _):
                self._relay.seek(ids)
            case FetchCuts(source, _):
                self._relay.wake(PeerId(source.decode()))
            case SendCuts(to, _):
                self._relay.wake(PeerId(to.decode()))
            case Evidence(proof):
                log.error("%s voted twice at height %d", proof.first.validator.hex(), proof.first.k)
                self.double_votes.append(proof)
                self._relay.changed.beat()
            case Diverged(cut, _):
                raise LocalError(
                    f"more than 2/3 of stake decided cut {cut.k}, {cut.id.hex()}, which is wrong by this node's chain: "
                    "its data is damaged, or a third of stake cheats. Run blyan-node chain verify"
                )
        return []

    async def _commit(self, cut: Cut, certificate: Certificate) -> Committed:
        committed = await self._on_disk(lambda: self._replica.commit(cut, certificate), here=True)
        await self._on_disk(self._replica.flush)
        log.debug("cut %d is final: %s", cut.k, cut.id.hex())
        return committed

    async def _on_disk(self, write: Callable[[], T], *, here: bool = False) -> T:
        """Write until it succeeds: what is not on the disk must not have happened. ``here``: not on the disk's lane."""
        while True:
            try:
                return write() if here else await self._disk.run(write)
            except StoreError as error:
                log.error("the consensus waits for the disk: %s", error)
                await trio.sleep(DISK_AGAIN)

    def _send(self, peer: PeerId, message: Message) -> None:
        if self._nursery is not None and self._sending.available_tokens:
            self._nursery.start_soon(self._tell, peer, message)

    async def _tell(self, peer: PeerId, message: Message) -> None:
        async with self._sending:
            try:
                await self._peers.ensure(peer)
                await rpc.call(self._network, peer, TELL, Tell(pack_message(message)))
            except PeerError as error:
                log.debug("could not answer %s: %s", peer, error)


def _now() -> int:
    """Milliseconds of a monotonic clock: trio's, so that tests can turn it."""
    return int(trio.current_time() * 1000)


def _plausible(_origin: PeerId, data: bytes) -> bool:
    if len(data) > MAX_MESSAGE:
        return False
    try:
        unpack_message(data)
    except CodecError:
        return False
    return True
