"""The part of a network implementation that is the same in each: subscribers, watchers, background tasks."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from blyan_node.p2p.transport import Gossip, PeerChange, PeerId, Validator

logger = logging.getLogger(__name__)

WATCHER_CAPACITY = 1024
"""Changes of the neighbourhood that may wait for one watcher; beyond that the newest is dropped and logged."""


@asynccontextmanager
async def background() -> AsyncIterator[trio.Nursery]:
    """Open a nursery for the time of a context; its tasks are cancelled at the end.

    An exception of the context's body comes out as it is, not in a group: ``except ConfigError`` outside goes on
    working.
    """
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        try:
            yield nursery
        except Exception as error:  # noqa: BLE001 raised again below
            failure = error
        finally:
            nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


@dataclass
class _Subscription:
    validator: Validator
    queue: trio.MemorySendChannel[Gossip]
    dropped: int = 0


class Subscriptions:
    """The topics that this node listens to. Each queue is bounded; when full, the newest message is dropped."""

    def __init__(self) -> None:
        self._topics: dict[str, _Subscription] = {}

    @asynccontextmanager
    async def open(
        self, topic: str, validator: Validator, capacity: int
    ) -> AsyncIterator[trio.MemoryReceiveChannel[Gossip]]:
        """Listen to a topic; raise ValueError where somebody does already."""
        if topic in self._topics:
            raise ValueError(f"topic {topic} is subscribed to already")
        send, receive = trio.open_memory_channel[Gossip](capacity)
        self._topics[topic] = _Subscription(validator, send)
        try:
            yield receive
        finally:
            del self._topics[topic]
            send.close()

    def offer(self, topic: str, origin: PeerId, data: bytes) -> bool:
        """Judge a message and queue it; False if the validator says that it is wrong."""
        subscription = self._topics.get(topic)
        if subscription is None:
            return True
        if not subscription.validator(origin, data):
            return False
        try:
            subscription.queue.send_nowait(Gossip(origin, data))
        except trio.WouldBlock:
            subscription.dropped += 1
            logger.warning("gossip on %s: queue full, %d dropped so far", topic, subscription.dropped)
        except trio.BrokenResourceError:
            pass  # the subscriber closed its end and is about to leave
        return True

    def __contains__(self, topic: str) -> bool:
        return topic in self._topics


class Watchers:
    """Those who want to know of changes of the neighbourhood."""

    def __init__(self) -> None:
        self._queues: list[trio.MemorySendChannel[PeerChange]] = []

    @asynccontextmanager
    async def open(self, current: Iterable[PeerId]) -> AsyncIterator[trio.MemoryReceiveChannel[PeerChange]]:
        """Deliver the current neighbours, then what changes."""
        send, receive = trio.open_memory_channel[PeerChange](WATCHER_CAPACITY)
        self._queues.append(send)
        for peer in current:
            self._put(send, PeerChange(peer, True))
        try:
            yield receive
        finally:
            self._queues.remove(send)
            send.close()

    def tell(self, change: PeerChange) -> None:
        """Tell every watcher of a change."""
        for queue in self._queues:
            self._put(queue, change)

    def _put(self, queue: trio.MemorySendChannel[PeerChange], change: PeerChange) -> None:
        try:
            queue.send_nowait(change)
        except trio.WouldBlock:
            logger.warning("a watcher of peers lags %d changes behind: %s dropped", WATCHER_CAPACITY, change)
        except trio.BrokenResourceError:
            pass  # the watcher closed its end and is about to leave
