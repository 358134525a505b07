"""What a stage knows of a session: its place in the route, its cache, the inputs that wait. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace

from blyan_node.errors import ProtocolViolation, Refused
from blyan_node.inference.generation import Sampling
from blyan_node.inference.messages import MILLION, Leg, Open, Resume
from blyan_node.model.activation import Activation
from blyan_node.model.cache import Cache
from blyan_node.model.shard import Shard
from blyan_node.p2p.transport import PeerId


@dataclass(frozen=True)
class Loaded:
    """A shard in memory: units ``first`` to ``last`` inclusive of one version of a model; ``size`` bytes of weights."""

    model: bytes
    version: bytes
    first: int
    last: int
    shard: Shard
    size: int


@dataclass
class Input:
    """What waits to be computed: token ids on stage 0, activations elsewhere."""

    epoch: int
    position: int
    count: int
    more: bool
    tokens: tuple[int, ...] | None
    activation: Activation | None
    trace: tuple[tuple[int, int], ...]
    number: int = 0  # in the order of arrival


@dataclass
class Seat:
    """A session's place here, on the shard that it began on, whatever was loaded since.

    ``inputs`` is bounded by the session's own limit: positions only go forward, up to it. A seat goes through the
    epochs of its session: ``open`` always tells the route of the newest.
    """

    open: Open
    entry: PeerId
    shard: Shard
    cache: Cache
    expected: int = 0
    touched: float = 0.0
    inputs: deque[Input] = field(default_factory=deque)
    computing: bool = False  # a step uses the cache: it must not be freed
    send_from: int = 0  # the next stage has all positions before
    replay: range = range(0)  # positions that are still to be sent out of the journal, before anything is computed
    blamed: set[PeerId] = field(default_factory=set)  # whose loss the entry was told of in this epoch

    @property
    def leg(self) -> Leg:
        """This stage's part of the route."""
        return self.open.route[self.open.stage]

    @property
    def span(self) -> tuple[int, int, int]:
        """Equal for sessions that one batch may join: the same units of the same shard."""
        return id(self.shard), self.leg.first, self.leg.last

    @property
    def cache_bytes(self) -> int:
        """Bytes reserved for the session's keys and values."""
        return self.cache.capacity * self.cache.layers * self.shard.spec.kv_bytes(self.shard.dtype)

    @property
    def is_last(self) -> bool:
        """Tell whether this stage draws the tokens."""
        return self.open.stage == len(self.open.route) - 1

    @property
    def before(self) -> PeerId:
        """Who sends the activations: the stage before, or on stage 0 (for token ids) the entry."""
        return PeerId(self.open.route[self.open.stage - 1].peer) if self.open.stage else self.entry

    @property
    def after(self) -> frozenset[PeerId]:
        """Who gets what is computed here: the stage after; of a token, stage 0 and the entry."""
        route = self.open.route
        if self.is_last:
            return frozenset((PeerId(route[0].peer), self.entry))
        return frozenset((PeerId(route[self.open.stage + 1].peer),))

    @property
    def drawer(self) -> PeerId:
        """The last stage."""
        return PeerId(self.open.route[-1].peer)

    @property
    def beside(self) -> frozenset[PeerId]:
        """Whom this stage hears from or sends to; without one of them the session cannot go on."""
        return self.after | {self.before} | ({self.drawer} if self.open.stage == 0 else set())

    def resume(self, request: Resume) -> None:
        """Take the place in another route. Raises Refused where that is not the seat's to take."""
        if request.epoch <= self.open.epoch:
            raise Refused(f"the session is at epoch {self.open.epoch} already")
        if request.stage >= len(request.route) or request.route[request.stage] != self.leg:
            raise Refused("the route does not name this peer with the units that the session runs here")
        check_route(request.route, len(self.shard.spec.units))
        if request.position >= self.open.limit:
            raise Refused(f"position {request.position} of a session of {self.open.limit}")
        self.open = replace(self.open, epoch=request.epoch, route=request.route, stage=request.stage)
        self.inputs.clear()
        self.blamed.clear()
        self.send_from, self.replay = 0, range(0)

    @property
    def sampling(self) -> Sampling:
        """How this session's tokens are drawn."""
        return sampling_of(self.open)


def sampling_of(request: Open) -> Sampling:
    """How the tokens of a session are drawn, from the millionths that travel."""
    return Sampling(request.temperature / MILLION, request.top_p / MILLION, request.seed)


def check_route(route: tuple[Leg, ...], units: int) -> None:
    """Raise ProtocolViolation unless a route runs over all units of a model, each once, no peer twice."""
    ends = [-1, *(leg.last for leg in route)]
    follows = all(end + 1 == leg.first <= leg.last for end, leg in zip(ends[:-1], route, strict=True))
    if not follows or ends[-1] != units - 1 or len({leg.peer for leg in route}) < len(route):
        raise ProtocolViolation("a route that does not run over each unit once, or names a peer twice")
