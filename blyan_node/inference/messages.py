"""What peers say to each other about inference: the heartbeat, the opening of a session, the frames of the pipeline.

Every frame carries the session and its epoch. A stage takes frames only from the peer that the session named at open,
and drops those of another epoch, so a stage that was replaced can do no harm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from blyan_node.codec import Bound, Size, exactly
from blyan_node.p2p.rpc import Method

Id = Annotated[bytes, exactly(32)]
SessionId = Annotated[bytes, exactly(16)]
PeerText = Annotated[str, Size(80)]
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


@dataclass(frozen=True)
class Open:
    """Reserve a place for a session on a stage. ``stage`` is the receiver's index in ``route``.

    The last stage draws tokens by (seed, position) until one of ``stop_tokens`` or position ``limit``; stage 0 feeds
    each back without asking the entry.
    """

    session: SessionId
    epoch: int
    model: Id
    version: Id
    route: Annotated[tuple[Leg, ...], Size(MAX_STAGES, 1)]
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
    """A stage to the entry: this session cannot go on here. ``culprit`` is the peer at fault, "" for the sender."""

    session: SessionId
    epoch: int
    reason: Annotated[str, Size(2000)]
    culprit: PeerText


@dataclass(frozen=True)
class Close:
    """Entry to a stage: forget the session."""

    session: SessionId


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

CHALLENGE = Method("/blyan/challenge/1", Challenge, Answer, max_request=256, max_response=512, timeout=20)

HEARTBEAT_TOPIC = "blyan/heartbeats/1"
