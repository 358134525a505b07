"""Challenges between holders: a peer is asked what a span of units makes of an input that nobody could prepare.

Any holder of the same units judges by computing it too. The input's seed is made of the newest final cut, the
challenger's peer id and a number of its own, so nobody can compute an answer ahead, nor have an honest peer compute it:
to that one the challenger would be another. A challenge takes about as long as a decode step; none runs while sessions
wait, neither here nor there.
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable

import trio

from blyan_node.chain.keys import digest
from blyan_node.errors import IntegrityError, Overloaded, PeerError, ProtocolViolation, Refused, RuleError
from blyan_node.inference.messages import CHALLENGE, Answer, Challenge
from blyan_node.inference.seat import Loaded
from blyan_node.inference.stage import Stage
from blyan_node.inference.standing import Standing
from blyan_node.inference.swarm import SwarmView
from blyan_node.model.beacon import difference, probe_with, rows_of, tolerance
from blyan_node.p2p import rpc
from blyan_node.p2p.peers import Peers
from blyan_node.p2p.transport import Network, PeerId
from blyan_node.worker import Lane

log = logging.getLogger(__name__)

DOMAIN = b"blyan/challenge/1"
LONGEST = 8  # units of one challenge: rounding grows with depth, and so would what has to be forgiven
UNPROVEN_EVERY = 3.0  # seconds between challenges while there is a peer that has yet to pass one
EVERY = 30.0  # seconds between challenges otherwise
AGAIN = 3.0  # seconds before a challenge that was failed is put again, with another input
PEER_EVERY = 1.0  # seconds between challenges that one peer may put to us
SHARE = 10  # times as long as it took to answer, nobody else is answered
TRIES = 3
MAX_ASKERS = 1024


class Challenger:
    """Puts challenges to peers that serve what this node serves, and answers theirs."""

    def __init__(
        self,
        network: Network,
        peers: Peers,
        view: SwarmView,
        stage: Stage,
        standing: Standing,
        compute: Lane,
        *,
        newest_cut: Callable[[], bytes],
        suspect_self: Callable[[], None],
    ) -> None:
        self._network, self._peers, self._view, self._stage = network, peers, view, stage
        self._standing, self._compute = standing, compute
        self._newest_cut, self._suspect_self = newest_cut, suspect_self
        self._askers: dict[PeerId, float] = {}  # when each was last answered, the oldest first
        self._free_at = 0.0

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Challenge and answer until cancelled."""
        rpc.serve(self._network, CHALLENGE, self.answer, concurrency=1)
        task_status.started()
        every = UNPROVEN_EVERY
        while True:
            await trio.sleep(every * random.uniform(0.5, 1.5))
            loaded, chosen = self._stage.loaded, self._choose()
            every = UNPROVEN_EVERY if chosen is None or chosen[3] else EVERY
            if loaded is None or chosen is None or self._stage.is_waiting:
                continue
            peer, first, last, _ = chosen
            if await self._challenge(loaded, peer, first, last) is False:
                await self._confirm(loaded, peer, first, last)

    # --- asking ---

    def _choose(self) -> tuple[PeerId, int, int, bool] | None:
        """The peer and span whose last challenge is longest ago, and whether it never passed one."""
        loaded, now = self._stage.loaded, trio.current_time()
        if loaded is None:
            return None
        oldest: tuple[float, float] | None = None
        found: tuple[PeerId, int, int, bool] | None = None
        units = len(loaded.shard.spec.units)
        for seen, held in self._view.serving(loaded.model, loaded.version, units, now):
            if seen.peer == self._network.peer_id or not self._standing.may_be_challenged(seen.peer, now):
                continue
            for unit in range(max(held.first, loaded.first), min(held.last, loaded.last) + 1):
                at = self._standing.proven(seen.peer, loaded.version, unit, now)
                age = (-1.0 if at is None else at, random.random())
                if oldest is None or age[0] < oldest[0] or (age[0] == oldest[0] and age < oldest):
                    last = min(unit + LONGEST - 1, held.last, loaded.last)
                    oldest, found = age, (seen.peer, unit, last, at is None)
        return found

    async def _confirm(self, loaded: Loaded, peer: PeerId, first: int, last: int) -> None:
        """Put a challenge that was failed again: one input in a few thousand magnifies rounding too much.

        Who will not answer now has failed: it must not get away with a refusal.
        """
        passed: bool | None = None
        for _ in range(TRIES):
            await trio.sleep(AGAIN)
            passed = await self._challenge(loaded, peer, first, last)
            if passed is not None:
                break
        if not passed and self._stage.loaded is loaded:  # else this node was at fault, or has moved
            self._standing.failed(peer, trio.current_time())

    async def _challenge(self, loaded: Loaded, peer: PeerId, first: int, last: int) -> bool | None:
        """Put one challenge and tell whether it was passed; None where nobody can tell."""
        question = Challenge(loaded.model, loaded.version, first, last, self._newest_cut(), os.urandom(16))
        try:
            await self._peers.ensure(peer)
            answer = await rpc.call(self._network, peer, CHALLENGE, question)
            mine = await self._compute_summary(loaded, question, self._network.peer_id)
        except (PeerError, Overloaded) as error:
            log.debug("no challenge to %s: %s", peer, error)
            return None
        except (RuleError, RuntimeError, MemoryError) as error:  # torch's own among them
            log.error("cannot compute a challenge: %s", error)
            await self._is_sound(loaded, first, last)
            return None
        off, allowed = difference(mine, answer.summary), tolerance(loaded.shard.precision.dtype, answer.dtype)
        if off <= allowed:
            self._standing.passed(peer, loaded.version, first, last, trio.current_time())
            return True
        if not await self._is_sound(loaded, first, last):
            return None
        log.warning("%s computes units %d..%d wrongly: off by %.2g, more than %.2g", peer, first, last, off, allowed)
        return False

    async def _is_sound(self, loaded: Loaded, first: int, last: int) -> bool:
        """Whoever judges looks at itself first: tell whether these units are in memory as they were loaded."""
        try:
            await self._compute.run(loaded.shard.verify, *loaded.shard.spec.units[first : last + 1])
        except IntegrityError as error:
            log.error("a challenge showed that this node is at fault: %s", error)
            self._suspect_self()
            return False
        return True

    async def _compute_summary(self, loaded: Loaded, question: Challenge, challenger: PeerId) -> bytes:
        seed = seed_of(question, challenger)
        cache = loaded.shard.open(os.urandom(16), rows_of(loaded.shard.spec), question.first, question.last)
        try:
            return await self._compute.run(probe_with, loaded.shard, cache, seed)
        finally:
            cache.close()

    # --- answering ---

    async def answer(self, peer: PeerId, question: Challenge) -> Answer:
        """Compute what a peer asks for, or raise Refused: not served here, sessions wait, asked too often."""
        loaded, now = self._stage.loaded, trio.current_time()
        if question.first > question.last or question.last - question.first >= LONGEST:
            raise ProtocolViolation(f"a challenge over units {question.first}..{question.last}")
        if loaded is None or (loaded.model, loaded.version) != (question.model, question.version):
            raise Refused("that model or version is not served here")
        if not loaded.first <= question.first <= question.last <= loaded.last:
            raise Refused(f"units {question.first}..{question.last} are not served here")
        if self._stage.is_waiting or now < self._free_at or now < self._askers.get(peer, -PEER_EVERY) + PEER_EVERY:
            raise Refused("busy; ask again later")
        self._askers.pop(peer, None)
        self._askers[peer] = now
        if len(self._askers) > MAX_ASKERS:
            del self._askers[next(iter(self._askers))]
        try:
            summary = await self._compute_summary(loaded, question, peer)
        except (RuleError, RuntimeError, MemoryError) as error:
            log.error("cannot answer a challenge: %s", error)
            raise Refused("this node cannot compute that now") from error
        self._free_at = trio.current_time() + SHARE * (trio.current_time() - now)
        return Answer(loaded.shard.precision.dtype, summary)


def seed_of(question: Challenge, challenger: PeerId) -> bytes:
    """The seed of a challenge's input."""
    return digest(DOMAIN, question.cut + question.nonce + challenger.encode())
