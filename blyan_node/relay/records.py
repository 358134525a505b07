"""The journey of a record: from the node that was asked to send it to validators, who alone write blocks.

A record is handed to a few *carriers*, lest it get lost with one. All of a sender's records go to the same ones, in
order: carriers are the validators in the order of a hash of the sender and their own address. Each computes its own
rank and holds a record back for so many seconds, so mostly one block carries it. A validator that was asked by its own
user carries at once; its carriers are backups.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import trio

from blyan_node.chain.keys import Key, digest
from blyan_node.chain.mempool import Mempool
from blyan_node.chain.records import Arguments, Record, make_record
from blyan_node.chain.state import State
from blyan_node.chain.view import View
from blyan_node.codec import pack
from blyan_node.errors import (
    BlyanError,
    Overloaded,
    PeerError,
    Refused,
    RequestError,
    RuleError,
    Unreachable,
)
from blyan_node.p2p import rpc
from blyan_node.p2p.peers import Peers
from blyan_node.p2p.transport import Network, PeerId
from blyan_node.pulse import Pulse
from blyan_node.relay.identity import address_of_peer
from blyan_node.relay.limits import Buckets
from blyan_node.relay.messages import MAX_REASON, SUBMIT, Submit, Submitted

log = logging.getLogger(__name__)

CARRIER_DOMAIN = b"blyan/carrier/1"
COPIES = 3  # carriers that a record is handed to
BACKUPS = 2  # the same, where this node carries it too
MOST_OFFERS = 12  # carriers that are tried to find so many
STAGGER = 1.0  # seconds that a carrier holds a record back for each rank
MOST_RANKS = 8
OFFER = 5.0  # seconds for one carrier to be dialled and to answer
BACKUP_PATIENCE = 2.0  # seconds that a validator's own user waits for a backup
LOOK_EVERY = 1.0
LOOK_FOR_CARRIED = 0.05
CARRIED_WITHIN = 60.0
LOST_AFTER = 10.0  # seconds without a block that carries it, after which a record is handed out again; doubles
LOST_AT_MOST = 160.0
AGAIN_AT_ONCE = 16  # records handed out again at each look
RATE, BURST = 50.0, 200  # records that a peer may send: a second in the long run, and at once
FLOOD = 2  # points for each one beyond


class Ledger(Protocol):
    """What is needed of the replica."""

    def view(self) -> View:
        """Return the ledger as of now."""
        ...


@dataclass
class _Trail:
    """When a record is to be handed out again, after which pause then, and who has been asked to carry it."""

    at: float
    pause: float = LOST_AFTER
    asked: set[PeerId] = field(default_factory=set)


class _Round:
    """One record on its way to several carriers at once; ``asked`` grows by those that were tried."""

    def __init__(self, carriers: Sequence[PeerId], copies: int, asked: set[PeerId]) -> None:
        self.left = deque(carriers[:MOST_OFFERS])
        self.running = min(copies, len(carriers))
        self.asked = asked
        self.accepted = 0
        self.busy = ""  # why a carrier that is there does not answer the question now
        self.reasons: list[str] = []
        self.changed = Pulse()

    async def accepts(self) -> bool:
        """Wait until a carrier has taken the record, or none is left that might."""
        while self.running and not self.accepted:
            await self.changed.after(self.changed.count)
        return self.accepted > 0


class Submissions:
    """Hands records to validators and, on a validator, takes them in.

    ``changed`` beats whenever the mempool has got something to carry. Times of the mempool are :func:`now_ms`.
    """

    def __init__(self, network: Network, peers: Peers, ledger: Ledger, mempool: Mempool, key: Key) -> None:
        self._network, self._peers, self._ledger, self.mempool = network, peers, ledger, mempool
        self._key, self._address = key, key.address
        self._originating = trio.Lock()
        self.publishing = trio.Lock()
        """To be held by whoever publishes records that need each other, from the look at what is there to the last."""
        self.changed = Pulse()
        self._taken, self._sent = Buckets(RATE, BURST), Buckets(RATE / 2, BURST // 2)  # well within what others take
        self._trails: dict[bytes, _Trail] = {}
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Take in records and look after those that wait, until cancelled."""
        rpc.serve(self._network, SUBMIT, self._on_submit, concurrency=16)
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            while True:
                await trio.sleep(LOOK_EVERY)
                self._look()

    # What this node's own user sends

    async def submit(self, record: Record) -> None:
        """Let a record be carried. When this returns, at least one validator keeps it.

        Raises RequestError with the reason where it is refused, here or by the carriers, Unreachable where none of
        them can be reached, Overloaded where those that can take nothing now: then nothing of it stays here, and it may
        be sent again.
        """
        view = self._ledger.view()
        try:
            new = self.mempool.add(record, view, now_ms=now_ms())
        except RequestError:
            raise
        except RuleError as error:
            raise RequestError(str(error), param="record") from error
        if record.id not in self.mempool:
            return  # it took effect already
        carriers = self._carriers(record.sender, view.final)
        if view.final.may_author(self._address):
            self.changed.beat()
            with trio.move_on_after(BACKUP_PATIENCE):
                await self._hand_out(record, carriers, BACKUPS, set()).accepts()
            return
        try:
            await self._hand_over(record, carriers, view.final)
        except BlyanError:
            if new:
                self.mempool.drop(record.id)  # an error means that the user has to see to it
            raise

    async def _hand_over(self, record: Record, carriers: Sequence[PeerId], state: State) -> None:
        trail = self._trails[record.id] = _Trail(trio.current_time() + LOST_AFTER)
        under_way = self._hand_out(record, carriers, COPIES, trail.asked)
        if await under_way.accepts():
            return
        if under_way.reasons:
            raise RequestError(under_way.reasons[0], param="record")
        if under_way.busy:
            raise Overloaded(f"no validator takes records from here now ({under_way.busy}); try again later")
        raise Unreachable(
            f"no validator can be reached: of {len(rank_carriers(record.sender, state))} this node knows where "
            f"{len(carriers)} are, and none of these answered; check the node's connection and --bootstrap"
        )

    def _carriers(self, sender: bytes, state: State) -> list[PeerId]:
        """Return the peers that may carry a sender's records, as far as it is known where they are.

        By rank; but behind the first few the neighbours come before those who would have to be dialled.
        """
        neighbours = self._network.neighbours()
        met = (*sorted(neighbours), *self._peers.known())
        peers = {address: peer for peer in met if (address := address_of_peer(peer)) is not None}
        ranked = rank_carriers(sender, state)
        found = [peers[address] for address in ranked if address in peers and address != self._address]
        rest = found[COPIES:]
        return [
            *found[:COPIES],
            *(peer for peer in rest if peer in neighbours),
            *(peer for peer in rest if peer not in neighbours),
        ]

    def _hand_out(self, record: Record, carriers: Sequence[PeerId], copies: int, asked: set[PeerId]) -> _Round:
        """Begin to hand a record to carriers, so many at once, until as many have answered. Goes on by itself."""
        if self._nursery is None:
            raise Overloaded("the node is starting; try again later")
        under_way = _Round(carriers, copies, asked)
        for _ in range(under_way.running):
            self._nursery.start_soon(self._draw, record, under_way)
        return under_way

    async def _draw(self, record: Record, under_way: _Round) -> None:
        """Offer a record to one carrier after the other until one answers."""
        while under_way.left:
            peer = under_way.left.popleft()
            if not self._sent.admit(peer, trio.current_time()):
                under_way.busy = "too many were sent there of late"
                continue
            under_way.asked.add(peer)
            try:
                with trio.fail_after(OFFER):
                    await self._peers.ensure(peer)
                    answer = await rpc.call(self._network, peer, SUBMIT, Submit(record))
            except trio.TooSlowError:
                log.info("record %s: %s is slow", record.id.hex()[:16], peer)
                continue
            except PeerError as error:
                if isinstance(error, Refused):
                    under_way.busy = _printable(str(error))
                log.info("record %s: %s did not take it: %s", record.id.hex()[:16], peer, error)
                continue
            if answer.reason is None:
                under_way.accepted += 1
            else:
                under_way.reasons.append(_printable(answer.reason))
            break
        under_way.running -= 1
        under_way.changed.beat()

    # What this node itself sends

    async def originate(self, arguments: Arguments) -> Record:
        """Sign a record with this node's key, its next nonce and the least fee, and let it be carried.

        Raises as :meth:`submit` does.
        """
        async with self._originating:
            view = self._ledger.view()
            nonce = self.mempool.next_nonce(self._address, view)
            record = make_record(self._key, self.mempool.network, arguments, nonce=nonce)
            while record.fee < (least := view.final.parameters.fee_per_byte * len(pack(record))):
                record = make_record(self._key, self.mempool.network, arguments, nonce=nonce, fee=least)
            await self.submit(record)
        return record

    async def carried(self, ids: Iterable[bytes], *, within: float = CARRIED_WITHIN) -> None:
        """Wait until records take effect, tentatively at least.

        Raises RequestError where one turns out void, Unreachable where no validator carries them in time.
        """
        waiting = set(ids)
        with trio.move_on_after(within):
            while waiting:
                view = self._ledger.view()
                for id in sorted(waiting):
                    if (standing := view.standing(id)) is None:
                        continue
                    if standing.void is not None:
                        raise RequestError(f"the record has no effect: {standing.void.value}", param="record")
                    waiting.discard(id)
                await trio.sleep(LOOK_FOR_CARRIED)
        if waiting:
            raise Unreachable(f"no validator has carried {len(waiting)} records within {within:g} s; they still wait")

    # What others hand in

    async def _on_submit(self, peer: PeerId, request: Submit) -> Submitted:
        await trio.lowlevel.checkpoint()
        if not self._taken.admit(peer, trio.current_time()):
            self._network.penalise(peer, FLOOD, "too many records at once")
            raise Refused("too many records at once; send them more slowly")
        view, record = self._ledger.view(), request.record
        ranked = rank_carriers(record.sender, view.final)
        if self._address not in ranked:
            raise Refused("this node is no validator and carries no records")
        rank = min(ranked.index(self._address), MOST_RANKS)
        if address_of_peer(peer) in ranked:
            rank = max(rank, 1)  # a validator that was asked by its own user carries at once
        now = now_ms()
        try:
            new = self.mempool.add(record, view, now_ms=now, not_before=now + int(1000 * STAGGER * rank))
        except RequestError as refusal:
            return Submitted(str(refusal).encode()[:MAX_REASON].decode(errors="ignore"))
        if new:
            self.changed.beat()
        return Submitted(None)

    # What seems lost

    def _look(self) -> None:
        """Drop what no longer waits; where others carry, hand out again what is in no block for long."""
        view, now = self._ledger.view(), trio.current_time()
        self.mempool.prune(view)
        self._trails = {id: trail for id, trail in self._trails.items() if id in self.mempool}
        if view.final.may_author(self._address):
            return
        due: list[tuple[Record, _Trail]] = []
        for record in self.mempool.records():
            trail = self._trails.setdefault(record.id, _Trail(now + LOST_AFTER))
            if trail.at <= now and not view.is_pending(record.id):
                due.append((record, trail))
        due.sort(key=lambda each: each[0].nonce)  # a sender's records in their order
        for record, trail in due[:AGAIN_AT_ONCE]:
            log.info("record %s is in no block yet: handing it out again", record.id.hex()[:16])
            carriers = self._carriers(record.sender, view.final)
            others = [peer for peer in carriers if peer not in trail.asked]
            if not others:
                trail.asked.clear()
            self._hand_out(record, others or carriers, COPIES, trail.asked)
            trail.pause = min(2 * trail.pause, LOST_AT_MOST)
            trail.at = now + trail.pause


def now_ms() -> int:
    """Return the time that the mempool goes by: milliseconds of trio's clock, which never goes back."""
    return int(1000 * trio.current_time())


def rank_carriers(sender: bytes, state: State) -> list[bytes]:
    """Return the addresses of all who may write blocks, in the order in which they carry a sender's records."""
    members = {validator.address for validator in (*state.validators, *state.next_validators)} - state.slashed.keys()
    return sorted(members, key=lambda address: digest(CARRIER_DOMAIN, sender + address))


def _printable(reason: str) -> str:
    """Return what a peer says, without what might move a terminal's cursor."""
    return "".join(character if character.isprintable() else " " for character in reason)
