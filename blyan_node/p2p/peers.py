"""Finding peers and keeping to them: bootstrap, an address book, redialling, and the exchange of addresses.

A node wants ``target`` neighbours. While it has fewer it dials those it knows, the bootstrap peers among them, each
with a backoff of its own that doubles from FIRST_DELAY to LAST_DELAY with jitter; so a net that fell apart, or a
bootstrap peer that starts late, is found again. Each new neighbour is told our addresses and asked for those of its
neighbours; until it has answered, the dial counts as a failure, for one who refuses us lets us in and hangs up.
Nothing else dials.
"""

from __future__ import annotations

import json
import logging
import math
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import trio

from blyan_node.codec import Size
from blyan_node.errors import ConfigError, PeerError, Unreachable
from blyan_node.p2p.address import MOST_CHARACTERS, parse_dialable
from blyan_node.p2p.identity import MOST_ID_CHARACTERS
from blyan_node.p2p.rpc import Method, call, serve
from blyan_node.p2p.transport import Network, PeerId

logger = logging.getLogger(__name__)

FIRST_DELAY = 0.5
LAST_DELAY = 30.0
"""Seconds between attempts to reach a peer: the first and the longest, each within a factor of 0.5 to 1.5."""

BOOK_PEERS = 512
PEER_ADDRESSES = 4
"""Bounds of the address book; when full, the peer that failed most often is forgotten, never a bootstrap peer."""

HOPELESS = 10
"""Failures in a row after which a peer that is no bootstrap peer is forgotten."""

EXCHANGED_PEERS = 32
EXCHANGE_EVERY = 60.0
SAVE_EVERY = 10.0
DIALS_AT_ONCE = 8


@dataclass(frozen=True)
class PeerAddresses:
    """A peer and where it can be dialled."""

    peer: Annotated[str, Size(MOST_ID_CHARACTERS)]
    addresses: Annotated[tuple[Annotated[str, Size(MOST_CHARACTERS)], ...], Size(PEER_ADDRESSES)]


@dataclass(frozen=True)
class Introduction:
    """The asker's own addresses."""

    addresses: Annotated[tuple[Annotated[str, Size(MOST_CHARACTERS)], ...], Size(PEER_ADDRESSES)]


@dataclass(frozen=True)
class Acquaintances:
    """Some peers whom the answerer has talked to."""

    peers: Annotated[tuple[PeerAddresses, ...], Size(EXCHANGED_PEERS)]


EXCHANGE = Method(
    protocol="/blyan/peers/1",
    request=Introduction,
    response=Acquaintances,
    max_request=4 * 1024,
    max_response=64 * 1024,
    timeout=10.0,
)


@dataclass
class _Entry:
    addresses: tuple[str, ...]
    met: bool = False
    failures: int = 0
    next_try: float = -math.inf


class Peers:
    """Keeps a node among peers; see the module."""

    def __init__(
        self,
        network: Network,
        *,
        bootstrap: tuple[str, ...] = (),
        path: Path | None = None,
        target: int = 8,
        most: int = 64,
        rng: random.Random | None = None,
    ) -> None:
        """Start from ``bootstrap`` and from the book kept in the JSON file at ``path``, if there is one.

        Raises ConfigError for a bootstrap address that is none. Of more than ``most`` neighbours the newest go.
        """
        self._network, self._path, self._target, self._most = network, path, target, most
        self._random = rng or random.Random()
        self._book: dict[PeerId, _Entry] = {}
        self._bootstrap: set[PeerId] = set()
        self._dialling: dict[PeerId, trio.Event] = {}
        self._blocked: frozenset[PeerId] = frozenset()
        self._wake = trio.Event()
        self._dirty = False
        for address in bootstrap:
            try:
                _, peer = parse_dialable(address)
            except ConfigError as error:
                raise ConfigError(f"bootstrap address: {error}") from error
            self._bootstrap.add(peer)
            self.learn(peer, (address,))
        if path is not None:
            self._load(path)

    def learn(self, peer: PeerId, addresses: Iterable[str]) -> None:
        """Remember where a peer can be dialled; what cannot be an address of this peer is ignored."""
        good = tuple(dict.fromkeys(address for address in addresses if _names(address, peer)))[:PEER_ADDRESSES]
        if not good or peer == self._network.peer_id:
            return
        entry = self._book.get(peer)
        if entry is None:
            self._make_room()
            entry = self._book[peer] = _Entry(())
        known = tuple(dict.fromkeys(good + entry.addresses))[:PEER_ADDRESSES]
        if known != entry.addresses:
            entry.addresses = known
            self._dirty = True
            self._wake.set()

    def known(self) -> dict[PeerId, tuple[str, ...]]:
        """The address book."""
        return {peer: entry.addresses for peer, entry in self._book.items()}

    def block(self, peers: frozenset[PeerId]) -> None:
        """Have nothing to do with exactly these peers, see :meth:`Network.block`; dial those soon who were let go."""
        for peer in sorted(self._blocked - peers):
            if (entry := self._book.get(peer)) is not None:
                entry.failures = 0
                self._put_off(entry)
        self._blocked = peers
        self._network.block(peers)
        self._wake.set()

    async def ensure(self, peer: PeerId) -> None:
        """Connect to a peer unless connected.

        Raises Unreachable if none of its addresses answers, none is known, or the peer is blocked.
        """
        while peer in self._dialling:
            await self._dialling[peer].wait()
        if peer in self._network.neighbours():
            return
        entry = self._book.get(peer)
        if entry is None:
            raise Unreachable(f"no address of {peer} is known")
        if peer in self._blocked:
            raise Unreachable(f"{peer} is blocked here")
        done = self._dialling[peer] = trio.Event()
        try:
            await self._dial(peer, entry)
        finally:
            del self._dialling[peer]
            done.set()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep up the neighbourhood until cancelled."""
        serve(self._network, EXCHANGE, self._introduce, concurrency=8)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._redial)
                nursery.start_soon(self._exchange_now_and_then)
                nursery.start_soon(self._save_now_and_then)
                await nursery.start(self._watch)
                task_status.started()
        finally:
            self._save()

    async def _dial(self, peer: PeerId, entry: _Entry) -> None:
        reasons = []
        for address in entry.addresses:
            try:
                await self._network.connect(address)
            except Unreachable as error:
                reasons.append(str(error))
                continue
            # what worked is tried first next time
            entry.addresses = tuple(dict.fromkeys((address, *entry.addresses)))
            entry.met, self._dirty = True, True
            entry.failures += 1  # until the exchange has worked
            self._put_off(entry)
            return
        entry.failures += 1
        delay = self._put_off(entry)
        if peer in self._bootstrap:
            logger.warning("bootstrap peer not reached (%s); trying again in %.1f s", "; ".join(reasons), delay)
        elif entry.failures >= HOPELESS:
            self._book.pop(peer, None)
            self._dirty = True
        raise Unreachable("; ".join(reasons))

    def _put_off(self, entry: _Entry) -> float:
        """Make it the peer's turn in so many seconds: the more, the more often it failed."""
        delay: float = min(FIRST_DELAY * 2 ** max(0, entry.failures - 1), LAST_DELAY) * self._random.uniform(0.5, 1.5)
        entry.next_try = trio.current_time() + delay
        return delay

    async def _redial(self) -> None:
        """Dial, while there are too few neighbours, whoever's turn has come."""
        slots = trio.CapacityLimiter(DIALS_AT_ONCE)
        async with trio.open_nursery() as nursery:
            while True:
                self._wake = trio.Event()
                neighbours, now, next_try = self._network.neighbours(), trio.current_time(), math.inf
                if len(neighbours) < self._target:
                    others = neighbours | self._blocked | self._dialling.keys()
                    strangers = [peer for peer in self._book if peer not in others]
                    due = [peer for peer in strangers if self._book[peer].next_try <= now]
                    for peer in self._random.sample(due, min(len(due), self._target - len(neighbours))):
                        # until the attempt has ended the peer is nobody's turn
                        self._book[peer].next_try = now + LAST_DELAY
                        nursery.start_soon(self._try, peer, slots)
                    next_try = min((self._book[peer].next_try for peer in strangers), default=math.inf)
                with trio.CancelScope(deadline=next_try):
                    await self._wake.wait()

    async def _try(self, peer: PeerId, slots: trio.CapacityLimiter) -> None:
        async with slots:
            try:
                await self.ensure(peer)
            except Unreachable as error:
                logger.debug("redial: %s", error)
        self._wake.set()

    async def _watch(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with self._network.watch_peers() as changes, trio.open_nursery() as nursery:
            task_status.started()
            async for change in changes:
                entry = self._book.get(change.peer)
                if entry is not None:
                    self._put_off(entry)  # one who left is dialled again, but not by everybody at once
                if change.connected and len(self._network.neighbours()) > self._most:
                    await self._network.disconnect(change.peer)
                elif change.connected:
                    nursery.start_soon(self._exchange, change.peer)
                self._wake.set()

    async def _exchange_now_and_then(self) -> None:
        while True:
            await trio.sleep(EXCHANGE_EVERY * self._random.uniform(0.5, 1.5))
            neighbours = sorted(self._network.neighbours())
            if neighbours and len(neighbours) < self._target:
                await self._exchange(self._random.choice(neighbours))

    async def _exchange(self, peer: PeerId) -> None:
        """Tell a neighbour where we are, and learn whom it knows."""
        own = tuple(address for address in self._network.addresses() if len(address) <= MOST_CHARACTERS)
        try:
            answer = await call(self._network, peer, EXCHANGE, Introduction(own[:PEER_ADDRESSES]))
        except PeerError as error:
            logger.debug("no exchange of peers with %s: %s", peer, error)
            return
        if (entry := self._book.get(peer)) is not None:
            entry.failures = 0
        for acquaintance in answer.peers:
            self.learn(PeerId(acquaintance.peer), acquaintance.addresses)

    async def _introduce(self, peer: PeerId, request: Introduction) -> Acquaintances:
        await trio.lowlevel.checkpoint()
        self.learn(peer, request.addresses)
        neighbours = self._network.neighbours()
        if peer in self._book:
            self._book[peer].met = True
        others = [other for other, entry in self._book.items() if other != peer and (entry.met or other in neighbours)]
        chosen = self._random.sample(others, min(len(others), EXCHANGED_PEERS))
        return Acquaintances(tuple(PeerAddresses(other, self._book[other].addresses) for other in chosen))

    def _make_room(self) -> None:
        """Forget the peer that failed most often, or else the oldest, if the book is full."""
        if len(self._book) >= BOOK_PEERS:
            others = [peer for peer in self._book if peer not in self._bootstrap]
            if others:
                del self._book[max(others, key=lambda peer: (self._book[peer].failures, not self._book[peer].met))]

    async def _save_now_and_then(self) -> None:
        while True:
            await trio.sleep(SAVE_EVERY)
            self._save()

    def _save(self) -> None:
        """Write those who were met. A book that cannot be written is a pity, no more."""
        if self._path is None or not self._dirty:
            return
        self._dirty = False
        met = {peer: list(entry.addresses) for peer, entry in self._book.items() if entry.met}
        draft = self._path.with_suffix(".new")
        try:
            draft.write_text(json.dumps({"peers": met}, indent=1))
            draft.replace(self._path)
        except OSError as error:
            logger.warning("cannot write the address book %s: %s", self._path, error)

    def _load(self, path: Path) -> None:
        """Read the book, if it is one."""
        try:
            if path.stat().st_size > BOOK_PEERS * 2 * PEER_ADDRESSES * MOST_CHARACTERS:
                raise ValueError("too large")
            peers = json.loads(path.read_text())["peers"]
            for peer, addresses in peers.items():
                self.learn(PeerId(peer), [address for address in addresses if isinstance(address, str)])
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("the address book %s is unusable and is begun anew: %s", path, error)
        for entry in self._book.values():
            entry.met = True


def _names(address: str, peer: PeerId) -> bool:
    """Whether this is an address of that peer which can be dialled."""
    try:
        where, named = parse_dialable(address)
    except ConfigError:
        return False
    return named == peer and where.host not in ("0.0.0.0", "::")  # noqa: S104 refused, not listened on
