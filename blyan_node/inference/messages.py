"""What peers say to each other about inference: the heartbeat, the opening of a session, the frames of the pipeline.

Every frame carries the session and its epoch, which the entry raises with each change of the route. A stage takes
frames only from the peer that the session names at that epoch, so a stage that was replaced can do no harm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from blyan_node.codec import Bound, Size, exactly
from blyan_node.p2p.rpc import Method

Id = Annotated[bytes, exactly(32)]
SessionId = Annotated[bytes, exactly(16)]
PeerText = Annotated[str, Size(80)]
Position = Annotated[int, Bound(2**24)]
Token = Annotated[int, Bound(2**31)]

MAX_STAGES = 64
MAX_PROMPT = 128 * 1024
MAX_FRAME = 16 * 1024 * 1024
"""Largest frame of the pipeline: a prefill chunk of 512 positions by hidden 8192 in fp32."""

MILLION = 1_000_000
"""Fractions travel as integer millionths: floats have no canonical encoding."""

LOADING, SERVING, DRAINING = 1, 2, 3


@dataclass(frozen=True)
class Held:
    """Units ``first`` to ``last`` inclusive of one version of a model, and whether they are loading or served."""

    model: Id
    version: Id
    first: Annotated[int, Bound(4096)]
    last: Annotated[int, Bound(4096)]
    state: Annotated[int, Bound(DRAINING, LOADING)]


@dataclass(frozen=True)
class Stored:
    """Which units of a model a peer has on disk: bit i of ``units`` (little-endian) is unit i."""

    model: Id
    units: Annotated[bytes, Size(512)]


@dataclass(frozen=True)
class Heartbeat:
    """A peer's signed word about itself, valid for ``LIFETIME`` seconds after it is heard; the newest sequence wins."""

    network: Id
    peer: PeerText
    sequence: int
    addresses: Annotated[tuple[Annotated[str, Size(256)], ...], Size(8)]
    held: Annotated[tuple[Held, ...], Size(4)]
    stored: Annotated[tuple[Stored, ...], Size(16)]
    layer_us: Annotated[int, Bound(10**9, 1)]
    free_tokens: int
    queue: Annotated[int, Bound(10**6)]
    price: int
    cut: int
    height: int


@dataclass(frozen=True)
class Signed:
    """A packed heartbeat and the recoverable signature of its author's node key."""

    body: Annotated[bytes, Size(8192)]
    signature: Annotated[bytes, exactly(65)]


@dataclass(frozen=True)
class Leg:
    """One stage of a route: this peer runs units ``first`` to ``last`` inclusive."""

    peer: PeerText
    first: Annotated[int, Bound(4096)]
    last: Annotated[int, Bound(4096)]


Route = Annotated[tuple[Leg, ...], Size(MAX_STAGES, 1)]


@dataclass(frozen=True)
class Open:
    """Reserve a place for a session on a stage. ``stage`` is the receiver's index in ``route``.

    A place that the stage has in the session at a lower epoch is given up for it.

    The last stage draws tokens by (seed, position) until one of ``stop_tokens`` or position ``limit``; stage 0 feeds
    each back without asking the entry.
    """

    session: SessionId
    epoch: int
    model: Id
    version: Id
    route: Route
    stage: Annotated[int, Bound(MAX_STAGES - 1)]
    limit: Annotated[int, Bound(2**24, 1)]
    temperature: Annotated[int, Bound(100 * MILLION)]
    top_p: Annotated[int, Bound(MILLION)]
    seed: int
    stop_tokens: Annotated[tuple[Token, ...], Size(64)]


@dataclass(frozen=True)
class Opened:
    """The place is reserved."""

    epoch: int


@dataclass(frozen=True)
class Resume:
    """Entry to a stage that stays in a session: the route is another, and what waits or is under way is void.

    The stage drops all frames of lower epochs from here on, and forgets positions from ``position`` on: those that the
    entry's log does not prove, or that have to pass once more for a token to be drawn.
    """

    session: SessionId
    epoch: int
    route: Route
    stage: Annotated[int, Bound(MAX_STAGES - 1)]
    position: Position


@dataclass(frozen=True)
class Resumed:
    """What the stage holds: positions 0 to ``held`` - 1, and of what it sent for these those from ``journal`` on."""

    epoch: int
    held: Position
    journal: Position


@dataclass(frozen=True)
class Replay:
    """Entry to a stage: forget positions from ``keep`` on, and send the next stage those from ``send_from`` on.

    Those below ``keep`` come from the journal, the others follow when they are computed.
    """

    session: SessionId
    epoch: int
    keep: Position
    send_from: Position


@dataclass(frozen=True)
class Replaying:
    """The stage has begun to."""

    epoch: int


@dataclass(frozen=True)
class Probe:
    """Entry to a stage: tell how far the session got there."""

    session: SessionId


@dataclass(frozen=True)
class Probed:
    """Positions below ``computed`` are done here; ``waiting`` positions of all sessions stand in front of the stage."""

    computed: Position
    waiting: Position


@dataclass(frozen=True)
class Tokens:
    """Entry to stage 0: token ids for positions from ``position`` on. ``more`` says that further chunks follow."""

    session: SessionId
    epoch: int
    position: int
    ids: Annotated[tuple[Token, ...], Size(512, 1)]
    more: bool


Trace = Annotated[tuple[tuple[int, int], ...], Size(MAX_STAGES)]
"""Per stage so far: microseconds that it computed, microseconds to reach the next (0 from the last)."""


@dataclass(frozen=True)
class Activations:
    """Stage to next stage: hidden states [count, hidden] of ``dtype``, row-major, for positions from ``position``."""

    session: SessionId
    epoch: int
    position: int
    count: Annotated[int, Bound(512, 1)]
    more: bool
    dtype: Annotated[str, Size(16)]
    data: Annotated[bytes, Size(MAX_FRAME)]
    trace: Trace


@dataclass(frozen=True)
class Drawn:
    """Last stage to stage 0 and to the entry: the token at ``position``."""

    session: SessionId
    epoch: int
    position: int
    token: Token
    trace: Trace


@dataclass(frozen=True)
class Failed:
    """A stage to the entry: this session cannot go on along its route.

    ``culprit`` is the peer at fault, "" for the sender.
    """

    session: SessionId
    epoch: int
    reason: Annotated[str, Size(2000)]
    culprit: PeerText


@dataclass(frozen=True)
class Close:
    """Entry to a stage: forget the session, as it was up to this epoch."""

    session: SessionId
    epoch: int


@dataclass(frozen=True)
class Challenge:
    """Run units ``first`` to ``last`` on the input that cut, nonce and the asker's id give: see challenge.py."""

    model: Id
    version: Id
    first: Annotated[int, Bound(4096)]
    last: Annotated[int, Bound(4096)]
    cut: Id
    nonce: SessionId


@dataclass(frozen=True)
class Answer:
    """What the weights were computed in, and the summary of the output as :mod:`blyan_node.model.beacon` makes it."""

    dtype: Annotated[str, Size(16)]
    summary: Annotated[bytes, Size(256)]


FRAMES: tuple[type, ...] = (Tokens, Activations, Drawn, Failed, Close)

OPEN = Method("/blyan/open/1", Open, Opened, max_request=16_384, max_response=64, timeout=10)
RESUME = Method("/blyan/resume/1", Resume, Resumed, max_request=16_384, max_response=64, timeout=20)
"""The time out leaves room for a step that is under way, which has to end first."""
REPLAY = Method("/blyan/replay/1", Replay, Replaying, max_request=64, max_response=64, timeout=20)
PROBE = Method("/blyan/probe/1", Probe, Probed, max_request=64, max_response=64, timeout=5)

CHALLENGE = Method("/blyan/challenge/1", Challenge, Answer, max_request=256, max_response=512, timeout=20)

HEARTBEAT_TOPIC = "blyan/heartbeats/1"
