"""The mempool: checked records that wait for a validator to carry them into a block. Bounded; pure.

A record gets in only if, by what is known here, it would take effect: it is folded on the tentative state behind the
sender's records that wait already. One whose predecessor is missing waits for it, if it can be paid.

When the mempool is full, what is worth least goes. A record is worth, per byte, the lowest fee of the sender's records
up to it, since it cannot be carried before them; and what waits for a missing record is worth less than what does not,
since its fee may never be paid. So a record never goes before those that need it.

Times are milliseconds of any one clock of the caller's.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from heapq import heapify, heappop, heappush

from blyan_node.chain.block import MAX_BODY, MAX_RECORDS
from blyan_node.chain.ledger import Void, fold
from blyan_node.chain.order import Carried
from blyan_node.chain.records import Bond, Record, Transfer, check_record
from blyan_node.chain.state import EMPTY, Account
from blyan_node.chain.view import Standing, View
from blyan_node.codec import pack
from blyan_node.errors import RequestError, RuleError

MOST_RECORDS = 8192
MOST_BYTES = 32 * 1024 * 1024
MOST_OF_A_SENDER = 64
"""Records of one sender that may wait, and how far ahead of its next nonce they may be."""

RAISE = 10
"""Per cent by which a record must pay more than the waiting one that it replaces."""

ARRAY = 5  # bytes at most around the records of a block's body
NOBODY = bytes(20)
TOO_EARLY = Standing("tentative", Void.NONCE_GAP)

_Worth = tuple[bool, int, int, bytes]
"""What goes first when the mempool is full: (in turn, worth, minus the place behind the next nonce, id)."""


def chain_of(kind: str) -> str:
    """Return the chain that carries records of a kind: A for what defines models and for evidence, B for weights, T."""
    return {"manifest": "A", "evidence": "A", "layer": "B"}.get(kind, "T")


@dataclass
class _Waiting:
    record: Record
    size: int
    since: int
    not_before: int

    @property
    def rate(self) -> int:
        """Fee in nano-BLY for a million bytes."""
        return self.record.fee * 1_000_000 // self.size


@dataclass
class _Queue:
    """A sender's records by nonce, and its account when they were last judged."""

    account: Account = EMPTY
    waiting: dict[int, _Waiting] = field(default_factory=dict)

    def worths(self) -> dict[bytes, _Worth]:
        """Return by id what each record is worth."""
        worths: dict[bytes, _Worth] = {}
        in_turn, lowest, expected = True, None, self.account.nonce
        for nonce in sorted(self.waiting):
            waiting = self.waiting[nonce]
            in_turn = in_turn and nonce == expected
            lowest = waiting.rate if lowest is None else min(lowest, waiting.rate)
            worths[waiting.record.id] = (in_turn, lowest, self.account.nonce - nonce, waiting.record.id)
            expected += 1
        return worths


class Mempool:
    """See the module. All methods take the ledger's view of now; its tentative cut is the one to be carried into."""

    def __init__(self, network: bytes, *, most_records: int = MOST_RECORDS, most_bytes: int = MOST_BYTES) -> None:
        self.network, self._most_records, self._most_bytes = network, most_records, most_bytes
        self._waiting: dict[bytes, _Waiting] = {}
        self._queues: dict[bytes, _Queue] = {}
        self._worths: dict[bytes, _Worth] = {}
        self._cheapest: list[_Worth] = []
        self.size = 0
        """Bytes of all records that wait."""

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, id: bytes) -> bool:
        return id in self._waiting

    def records(self) -> Iterator[Record]:
        """Iterate over all that waits, the oldest first."""
        return (waiting.record for waiting in self._waiting.values())

    def next_nonce(self, sender: bytes, view: View) -> int:
        """Return the nonce of a sender's next record, behind those in the DAG and those that wait here in turn."""
        queue, nonce = self._queues.get(sender, _Queue()), view.next_nonce(sender)
        while nonce in queue.waiting:
            nonce += 1
        return nonce

    # What comes in

    def add(self, record: Record, view: View, *, now_ms: int, not_before: int = 0) -> bool:
        """Let a record wait, not to be carried before ``not_before``; return whether it is new here.

        One that waits already may be carried at the earlier of two times; one that took effect in the DAG is left
        alone. Raises RequestError, with what to do, where it would have no effect, pays too little or waits too far
        ahead; RuleError or SignatureError, as :func:`check_record` does, for what no honest node passes on.
        """
        if (known := self._waiting.get(record.id)) is not None:
            known.not_before = min(known.not_before, not_before)
            return False
        standing = view.standing(record.id)
        if standing is not None and standing.void is None:
            return False
        check_record(record, self.network)
        newcomer = _Waiting(record, len(pack(record)), now_ms, not_before)
        self._check_alone(newcomer, view)
        account = view.tentative.account(record.sender)
        if record.sender in self._queues and self._queues[record.sender].account != account:
            self._settle(record.sender, view)
        queue = self._queues.get(record.sender, _Queue())
        rival = queue.waiting.get(record.nonce)
        self._check_place(record, rival, queue, view)
        trial = _Queue(account, queue.waiting | {record.nonce: newcomer})
        self._check_effect(record, trial, view)
        victims = self._victims(newcomer, trial.worths()[record.id], rival)
        for victim in victims if rival is None else [rival, *victims]:
            self.drop(victim.record.id)
        queue = self._queues.setdefault(record.sender, _Queue())
        queue.account = account
        queue.waiting[record.nonce] = self._waiting[record.id] = newcomer
        self.size += newcomer.size
        self._rank(queue)
        return True

    def _check_alone(self, newcomer: _Waiting, view: View) -> None:
        """Check what does not depend on other records."""
        record, limits, cut = newcomer.record, view.tentative.parameters, view.tentative.k
        try:
            record.parsed()
        except RuleError as error:
            raise _refused(f"{Void.MALFORMED.value} ({error})") from error
        if record.expires_at_cut < cut:
            raise _refused(
                f"the record expires at cut {record.expires_at_cut} and the next cut is {cut}: sign one that lasts"
            )
        if record.fee < (least := limits.fee_per_byte * newcomer.size):
            raise _refused(
                f"a fee of {record.fee} nano-BLY is too low for {newcomer.size} bytes: this network asks {least}"
            )

    def _check_place(self, record: Record, rival: _Waiting | None, queue: _Queue, view: View) -> None:
        """Check the record's nonce against those in the DAG and those that wait."""
        following = view.next_nonce(record.sender)
        if record.nonce < following:
            raise _refused(f"nonce {record.nonce} has been used: the sender's next one is {following}")
        if record.nonce >= following + MOST_OF_A_SENDER:
            raise _refused(
                f"nonce {record.nonce} is too far ahead: the sender's next one is {following}, and at most "
                f"{MOST_OF_A_SENDER} records wait; send those before it first"
            )
        if rival is None:
            if len(queue.waiting) >= MOST_OF_A_SENDER:
                raise _refused(f"{MOST_OF_A_SENDER} records of this sender wait already: wait until some are carried")
            return
        if view.is_pending(rival.record.id):
            raise _refused(f"a record with nonce {record.nonce} is in a block and cannot be replaced before the cut")
        least = rival.record.fee + max(1, -(-rival.record.fee * RAISE // 100))
        if record.fee < least:
            raise _refused(
                f"another record with nonce {record.nonce} waits: to replace it, offer a fee of {least} nano-BLY"
            )

    def _check_effect(self, record: Record, trial: _Queue, view: View) -> None:
        """Fold the sender's records that wait, the new one among them, and look what becomes of it."""
        voids, left = self._outlook(trial, view)
        void = voids[record.id]
        if void is Void.NONCE_GAP:  # nobody can tell yet; but all that waits for the missing record must be payable
            behind = [waiting.record for waiting in trial.waiting.values() if voids[waiting.record.id] is void]
            void = Void.INSUFFICIENT if sum(map(_spending, behind)) > left else None
        if void is not None:
            raise _refused(f"the record would have no effect: {void.value}")

    def _victims(self, newcomer: _Waiting, worth: _Worth, rival: _Waiting | None) -> list[_Waiting]:
        """Return what has to go for a newcomer, which takes its rival's place."""
        count, size = len(self._waiting) + 1, self.size + newcomer.size
        if rival is not None:
            count, size = count - 1, size - rival.size
        victims: list[_Waiting] = []
        for cheapest in self._cheapest:
            if count <= self._most_records and size <= self._most_bytes:
                break
            victim = self._waiting[cheapest[-1]]
            if victim is rival:
                continue
            if cheapest[:-1] >= worth[:-1]:  # of equals, who came first stays
                raise _full(cheapest, worth, newcomer)
            victims.append(victim)
            count, size = count - 1, size - victim.size
        return victims

    # What goes out

    def next_chain(self, view: View, *, now_ms: int) -> str | None:
        """Return the chain of which records can be carried now, that of the oldest one; None where there are none."""
        for head in sorted(self._heads(view, now_ms), key=lambda head: (head.since, head.record.id)):
            self._settle(head.record.sender, view)
            if head.record.id in self._waiting:
                return chain_of(head.record.kind)
        return None

    def pick(
        self, view: View, *, chain: str, now_ms: int, most_records: int = MAX_RECORDS, most_bytes: int = MAX_BODY
    ) -> tuple[Record, ...]:
        """Return the records of one chain to carry now, those that pay most per byte first, at most one block's worth.

        Each sender's come in the order of their nonces, beginning with its next one. They stay here until
        :meth:`prune` sees them take effect. What is found void for good is dropped on the way.
        """
        picked: list[Record] = []
        room = most_bytes - ARRAY
        runs: dict[bytes, deque[_Waiting]] = {}
        best = [_bid(head) for head in self._heads(view, now_ms) if chain_of(head.record.kind) == chain]
        heapify(best)
        while best and len(picked) < most_records:
            sender = heappop(best)[-1]
            if sender not in runs:
                runs[sender] = deque(self._run(sender, view, chain, now_ms))
            run = runs[sender]
            if run and run[0].size <= room:
                taken = run.popleft()
                picked.append(taken.record)
                room -= taken.size
                if run:
                    heappush(best, _bid(run[0]))
        return tuple(picked)

    def due_at(self, *, now_ms: int) -> int | None:
        """Return when the next record that is held back now may be carried."""
        return min((each.not_before for each in self._waiting.values() if each.not_before > now_ms), default=None)

    def prune(self, view: View) -> None:
        """Drop what took effect, has expired or has become impossible. To be called when the view changes."""
        for sender, queue in list(self._queues.items()):
            changed = view.tentative.account(sender) != queue.account
            if changed or any(_is_expired(waiting, view) for waiting in queue.waiting.values()):
                self._settle(sender, view)

    def drop(self, id: bytes) -> None:
        """Forget a record, if it is here."""
        if (waiting := self._waiting.pop(id, None)) is None:
            return
        self.size -= waiting.size
        self._unrank(id)
        sender = waiting.record.sender
        queue = self._queues[sender]
        del queue.waiting[waiting.record.nonce]
        if queue.waiting:
            self._rank(queue)
        else:
            del self._queues[sender]

    def _heads(self, view: View, now_ms: int) -> Iterator[_Waiting]:
        """Iterate over each sender's next record, where it waits here, is due and is in no block."""
        for sender, queue in self._queues.items():
            head = queue.waiting.get(view.next_nonce(sender))
            if head is not None and head.not_before <= now_ms and not view.is_pending(head.record.id):
                yield head

    def _run(self, sender: bytes, view: View, chain: str, now_ms: int) -> Iterator[_Waiting]:
        """Iterate over a sender's records that may follow one another into a block of one chain."""
        for waiting in self._settle(sender, view):
            if view.is_pending(waiting.record.id):
                if view.standing(waiting.record.id) == TOO_EARLY:
                    continue  # takes effect as soon as those before it are in a block
                return
            if waiting.not_before > now_ms or chain_of(waiting.record.kind) != chain:
                return
            yield waiting

    def _settle(self, sender: bytes, view: View) -> list[_Waiting]:
        """Judge a sender's records anew: drop what can have no effect, and return those in turn, in order."""
        queue = self._queues[sender]
        queue.account = view.tentative.account(sender)
        for waiting in list(queue.waiting.values()):
            if waiting.record.nonce < queue.account.nonce or _is_expired(waiting, view):
                self.drop(waiting.record.id)
        voids, _ = self._outlook(queue, view)
        for id, void in voids.items():
            if void not in (None, Void.NONCE_GAP):
                self.drop(id)
        self._rank(queue)
        in_turn = (waiting for _, waiting in sorted(queue.waiting.items()))
        return [waiting for waiting in in_turn if voids[waiting.record.id] is None]

    def _outlook(self, queue: _Queue, view: View) -> tuple[dict[bytes, Void | None], int]:
        """Return by id what would become of a sender's records in the next cut, and its balance behind them.

        They are folded, in order and alone, behind what is in the DAG: money that others have not sent yet is not
        counted on. What cannot matter is left out of the state, which has to be copied.
        """
        records = [waiting.record for _, waiting in sorted(queue.waiting.items())]
        if not records:
            return {}, 0
        now, sender = view.tentative, records[0].sender
        own = replace(now, k=now.k - 1, accounts={sender: now.account(sender)}, minted=set())
        folded = fold(own, [Carried(record, b"", NOBODY) for record in records], network=self.network)
        return {result.id: result.void for result in folded.results}, folded.state.account(sender).balance

    def _rank(self, queue: _Queue) -> None:
        """Note what a sender's records are worth."""
        for id, worth in queue.worths().items():
            if self._worths.get(id) != worth:
                self._unrank(id)
                self._worths[id] = worth
                insort(self._cheapest, worth)

    def _unrank(self, id: bytes) -> None:
        if (worth := self._worths.pop(id, None)) is not None:
            del self._cheapest[bisect_left(self._cheapest, worth)]


def _bid(waiting: _Waiting) -> tuple[int, bytes, bytes]:
    """Return the key by which heads compete for a place in a block: the smallest is the best."""
    return -waiting.rate, waiting.record.id, waiting.record.sender


def _is_expired(waiting: _Waiting, view: View) -> bool:
    return waiting.record.expires_at_cut < view.tentative.k


def _spending(record: Record) -> int:
    """Return what a record takes from its sender's balance."""
    arguments = record.parsed()
    return record.fee + (arguments.amount if isinstance(arguments, Transfer | Bond) else 0)


def _refused(reason: str) -> RequestError:
    return RequestError(reason, param="record")


def _full(cheapest: _Worth, worth: _Worth, newcomer: _Waiting) -> RequestError:
    if cheapest[0] and not worth[0]:
        return _refused("the mempool is full and takes no records whose predecessor is missing: send that one first")
    least = -(-(cheapest[1] + 1) * newcomer.size // 1_000_000)
    return _refused(
        f"the mempool is full: for {newcomer.size} bytes offer a fee of {least} nano-BLY, at no lower rate for the "
        "sender's records before it; or try again later"
    )
