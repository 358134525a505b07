"""What an exception that leaves a handler means, and what is remembered of peers' faults.

Every handler of a network implementation runs inside :func:`run_guarded`: the peer's fault resets the stream and
counts against the peer; a bug of ours is logged with its traceback and resets the stream; cancellation passes. (With
py-libp2p an exception that leaves a stream handler ends the whole host.) The shape is rusty-kaspa's
``flow_trait.rs::launch``.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import trio

from blyan_node.errors import LocalError, PeerError, ProtocolViolation, RuleError, Unreachable
from blyan_node.p2p.transport import Handler, PeerId, Stream

logger = logging.getLogger(__name__)

LIMIT = 100
"""Points at which a peer is disconnected and refused."""

VIOLATION = 20
"""Points of one violation of a protocol, or of one message that breaks a rule."""

HALF_LIFE = 60.0
"""Seconds in which points halve."""

REFUSED_FOR = 300.0
"""Seconds for which a peer that reached the limit is refused."""

MOST_REMEMBERED = 4096
"""Peers remembered at most; beyond that the one whose last fault is the oldest is forgotten."""

Penalise = Callable[[PeerId, int, str], None]


class Scores:
    """Points of peers, which halve every HALF_LIFE seconds, and the peers refused for now: for faults, or by order.

    ``blocked`` are the latter; see :meth:`blyan_node.p2p.transport.Network.block`.
    """

    def __init__(self, now: Callable[[], float] = trio.current_time) -> None:
        self._now = now
        self._points: dict[PeerId, tuple[float, float]] = {}
        self._refused: dict[PeerId, float] = {}
        self.blocked: frozenset[PeerId] = frozenset()

    def points(self, peer: PeerId) -> float:
        """The peer's points now."""
        points, since = self._points.get(peer, (0.0, 0.0))
        return points * 0.5 ** ((self._now() - since) / HALF_LIFE) if points else 0.0

    def add(self, peer: PeerId, points: int) -> bool:
        """Count points; True if they made the peer reach the limit, from when on it is refused."""
        if self.refused(peer):
            return False
        total = self.points(peer) + points
        self._points.pop(peer, None)
        if total < LIMIT:
            self._points[peer] = (total, self._now())
            self._forget()
            return False
        self._refused[peer] = self._now() + REFUSED_FOR
        self._forget()
        return True

    def refused(self, peer: PeerId) -> bool:
        """Whether connections with the peer are refused now."""
        until = self._refused.get(peer)
        if until is not None and until <= self._now():
            del self._refused[peer]
            until = None
        return until is not None or peer in self.blocked

    def check(self, peer: PeerId) -> None:
        """Raise Unreachable, saying why, where connections with the peer are refused now."""
        if peer in self.blocked:
            raise Unreachable(f"{peer} is blocked here, so it is refused")
        if self.refused(peer):
            raise Unreachable(f"{peer} misbehaved and is refused for now")

    def _forget(self) -> None:
        if len(self._points) > MOST_REMEMBERED:
            del self._points[next(iter(self._points))]
        if len(self._refused) > MOST_REMEMBERED:
            del self._refused[next(iter(self._refused))]


def briefly(seconds: float) -> trio.CancelScope:
    """Return a scope for tidying up: shielded from cancellation, but not for longer than ``seconds``."""
    return trio.CancelScope(deadline=trio.current_time() + seconds, shield=True)


async def run_guarded(handler: Handler, stream: Stream, name: str, penalise: Penalise) -> None:
    """Run one handler on one stream; afterwards the stream is closed, or reset where the handler failed."""
    clean = await survive(lambda: handler(stream), f"{name} from {stream.peer}", stream.peer, penalise, stream)
    with briefly(1):
        await (stream.aclose() if clean else stream.reset())


async def survive(
    work: Callable[[], Awaitable[None]],
    what: str,
    peer: PeerId,
    penalise: Penalise,
    stream: Stream | None = None,
) -> bool:
    """Await ``work``; True if it ended well, False if it failed, which is then logged and scored.

    Cancellation passes; the stream, if given, is reset first.
    """
    try:
        await work()
    except BaseExceptionGroup as group:
        stop, faults = group.split((trio.Cancelled, KeyboardInterrupt, SystemExit))
        if faults is not None:
            _judge(faults, what, peer, penalise)
        if stop is not None:
            await _abandon(stream)
            raise stop from None
        return False
    except Exception as error:  # noqa: BLE001 the one place that may: see the module docstring
        _judge(error, what, peer, penalise)
        return False
    except BaseException:
        await _abandon(stream)
        raise
    return True


async def _abandon(stream: Stream | None) -> None:
    if stream is not None:
        with briefly(1):
            await stream.reset()


def _judge(error: BaseException, what: str, peer: PeerId, penalise: Penalise) -> None:
    """Log a fault, and count it where it is the peer's."""
    for leaf in _leaves(error):
        if isinstance(leaf, ProtocolViolation | RuleError):
            penalise(peer, VIOLATION, f"{what}: {leaf}")
        elif isinstance(leaf, PeerError):
            logger.debug("%s ended: %s", what, leaf)
        elif isinstance(leaf, LocalError):
            logger.warning("%s failed: %s", what, leaf)
        else:
            logger.error("%s failed: %s", what, leaf, exc_info=leaf)


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for part in error.exceptions for leaf in _leaves(part)]
    return [error]
