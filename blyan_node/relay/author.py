"""What this validator writes, and when: records that wait to be carried, and acknowledgements of what others wrote."""

from __future__ import annotations

import logging

import trio

from blyan_node.chain.authoring import Pending, wants_to_write
from blyan_node.chain.candidates import Candidates
from blyan_node.chain.keys import Key, show_address
from blyan_node.chain.records import Record
from blyan_node.errors import LocalError, StoreError
from blyan_node.pulse import Pulse
from blyan_node.relay.blocks import DISK_AGAIN, Relay
from blyan_node.relay.records import Submissions, now_ms

log = logging.getLogger(__name__)

GATHER = 0.05  # seconds in which records, or blocks to acknowledge, are gathered, so that one block does for them all
GATHER_MOST = 0.4  # to which these grow while there is always something to write: a burst needs few blocks so
LOOK_AGAIN = 1.0  # seconds after which to look even though nothing was told: records that are held back fall due
ACKNOWLEDGEMENT = "ack"


class Author:
    """Writes the blocks of one key, while that has a seat among the validators."""

    def __init__(self, relay: Relay, submissions: Submissions, key: Key) -> None:
        self._relay, self._submissions, self._key = relay, submissions, key
        self._replica = relay.replica
        self._candidates = Candidates(relay.replica)
        self._wake = Pulse()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Write until cancelled, or until the key turns out to have been used elsewhere."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._pass_on, self._relay.changed)
            nursery.start_soon(self._pass_on, self._submissions.changed)
            task_status.started()
            while True:
                seen, pause = self._wake.count, LOOK_AGAIN
                try:
                    if self._may_write():
                        await self._write_what_waits()
                except StoreError as error:
                    log.error("cannot write a block: %s", error)
                    pause = DISK_AGAIN
                    await trio.sleep(pause)
                except LocalError as error:
                    log.error("this node writes no more blocks: %s", error)
                    nursery.cancel_scope.cancel()
                await self._wake.after(seen, most=pause)

    async def _pass_on(self, pulse: Pulse) -> None:
        seen = pulse.count
        while True:
            seen = await pulse.after(seen)
            self._wake.beat()

    def _may_write(self) -> bool:
        if self._replica.finals.abstain_through() is None:
            return False  # its disk was lost: what it wrote before has yet to come back
        return self._replica.final.state.may_author(self._key.address)

    async def _write_what_waits(self) -> None:
        gather = GATHER
        while True:
            chain, records = self._to_carry()
            if not wants_to_write(self._pending(records)):
                return
            if not records:
                await trio.sleep(gather)
                chain, records = self._to_carry()
                if not wants_to_write(self._pending(records)):
                    return
            kind = records[0].kind if records else ACKNOWLEDGEMENT
            block = await self._relay.write(records, chain=chain, type=kind)
            log.debug("%s wrote %s: %d records", show_address(self._key.address), block.id.hex(), len(records))
            self._submissions.mempool.prune(self._replica.view())
            await trio.sleep(gather)  # what comes meanwhile shares the next block
            gather = min(2 * gather, GATHER_MOST)

    def _to_carry(self) -> tuple[str, tuple[Record, ...]]:
        mempool, view = self._submissions.mempool, self._replica.view()
        chain = mempool.next_chain(view, now_ms=now_ms())
        return ("T", ()) if chain is None else (chain, mempool.pick(view, chain=chain, now_ms=now_ms()))

    def _pending(self, records: tuple[Record, ...]) -> Pending:
        author = self._key.address
        return Pending(
            records=bool(records),
            unacknowledged=self._candidates.is_unacknowledged(author),
            content=self._candidates.has_content(),
            anchored=self._candidates.is_anchored(author),
        )
