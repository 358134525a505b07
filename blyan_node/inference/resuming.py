"""The serving side of a recovery: a seat goes on along another route, and what was sent is sent again from the journal.

See :mod:`blyan_node.inference.seating` for the entry's side.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import trio

from blyan_node.errors import Refused
from blyan_node.inference.journal import Journals
from blyan_node.inference.messages import (
    PROBE,
    REPLAY,
    RESUME,
    Activations,
    Probe,
    Probed,
    Replay,
    Replaying,
    Resume,
    Resumed,
)
from blyan_node.inference.pipeline import Pipeline
from blyan_node.inference.seat import Seat
from blyan_node.p2p import rpc
from blyan_node.p2p.transport import Network, PeerId

MAX_WAITING = 2**20
CHUNK = 128  # positions that are sent again together


@dataclass(frozen=True)
class Floor:
    """What a stage lends to a recovery: its seats, the wait for a step that uses one, and how to wake or end them."""

    seats: dict[bytes, Seat]
    settled: Callable[[Seat], Awaitable[None]]
    wake: Callable[[], None]
    fail: Callable[[Seat, str], None]
    send: Callable[[Seat, Activations], None]


class Resuming:
    """Answers RESUME, REPLAY and PROBE for the seats of a stage."""

    def __init__(self, pipeline: Pipeline, journals: Journals, floor: Floor) -> None:
        self._pipeline, self._journals, self._floor = pipeline, journals, floor
        pipeline.on_room(self._send_more)

    def serve(self, network: Network) -> None:
        """Answer peers from now on."""
        rpc.serve(network, RESUME, self.resume, concurrency=64)
        rpc.serve(network, REPLAY, self.replay, concurrency=64)
        rpc.serve(network, PROBE, self.probe, concurrency=64)

    async def resume(self, peer: PeerId, request: Resume) -> Resumed:
        """Move a seat to a new epoch and route; answer what it holds. Raises Refused, ProtocolViolation."""
        seat = self._seat_of(peer, request.session)
        seat.resume(request)
        position = await self._truncate(seat, request.epoch, request.position)
        return Resumed(request.epoch, position, self._journals.truncate(request.session, position))

    async def replay(self, peer: PeerId, request: Replay) -> Replaying:
        """Begin to send what was sent before. Raises Refused where the journal does not reach back so far."""
        seat = self._seat_of(peer, request.session)
        if request.epoch != seat.open.epoch or seat.expected != seat.cache.length:
            raise Refused(f"the session is at epoch {seat.open.epoch}, or has gone on")
        if request.keep > seat.cache.length or request.send_from >= seat.open.limit:
            raise Refused(f"positions {request.keep} and {request.send_from} of {seat.cache.length} held here")
        await self._truncate(seat, request.epoch, request.keep)
        remembered = self._journals.truncate(request.session, request.keep)
        if request.send_from < remembered:
            raise Refused(f"what was sent is remembered from position {remembered} on only")
        seat.send_from = request.send_from
        seat.replay = range(request.send_from, request.keep)
        self._send_more()
        return Replaying(request.epoch)

    async def probe(self, peer: PeerId, request: Probe) -> Probed:
        """Tell how far a session has got here. Raises Refused where it is none of the peer's."""
        await trio.lowlevel.checkpoint()
        seat = self._seat_of(peer, request.session)
        waiting = sum(max(0, one.expected - one.cache.length) for one in self._floor.seats.values())
        return Probed(seat.cache.length, min(waiting, MAX_WAITING))

    def _seat_of(self, peer: PeerId, session: bytes) -> Seat:
        seat = self._floor.seats.get(session)
        if seat is None or seat.entry != peer:
            raise Refused("this peer has no such session here")
        return seat

    async def _truncate(self, seat: Seat, epoch: int, position: int) -> int:
        """Forget positions from ``position`` on, once no step uses the cache; return how many are held then."""
        await self._floor.settled(seat)
        if self._floor.seats.get(seat.open.session) is not seat or seat.open.epoch != epoch:
            raise Refused("the session has ended here, or gone on")
        seat.shard.truncate(seat.cache, min(position, seat.cache.length))
        seat.expected = seat.cache.length
        return seat.expected

    def _send_more(self) -> None:
        """Send out of the journals for as long as the next stages take it."""
        for seat in list(self._floor.seats.values()):
            while seat.replay and not any(map(self._pipeline.is_congested, seat.after)):
                self._send_piece(seat)

    def _send_piece(self, seat: Seat) -> None:
        position, session = seat.replay.start, seat.open.session
        rows = self._journals.read(session, position, seat.replay.stop, CHUNK)
        if rows is None:
            seat.replay = range(0)
            self._floor.fail(seat, "what was to be sent again had to be forgotten")
            return
        count = rows.shape[0]
        seat.replay = range(position + count, seat.replay.stop)
        trace = ((0, 0),) * (seat.open.stage + 1)
        frame = Activations(session, seat.open.epoch, position, count, True, rows.dtype, rows.data, trace)
        self._floor.send(seat, frame)
        if not seat.replay:
            self._floor.wake()
