"""What a caller asks of the swarm and what it gets back: the words shared by the API and the session."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. ``temperature`` 0 is greedy; equal seeds and positions draw equal tokens."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True)
class Generate:
    """A request for one generation.

    ``prompt`` is either a chat, rendered with the model's own template, or raw text to go on from. ``max_tokens``
    None means as far as the context allows. ``stop`` holds strings at which the text ends, themselves left out.
    ``model`` None means the one this node knows, where there is just one.
    """

    prompt: tuple[Message, ...] | str
    model: str | None = None
    max_tokens: int | None = None
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Hop:
    """One stage of the route that a generation took: units ``first`` to ``last`` inclusive ran on ``peer``.

    ``compute_ms`` is the stage's own median time per decode step, ``network_ms`` the measured time to reach it.
    """

    peer: str
    first: str
    last: str
    layers: int
    compute_ms: float
    network_ms: float


@dataclass(frozen=True)
class Started:
    """First event: the route is open."""

    model: str
    prompt_tokens: int
    route: tuple[Hop, ...]


@dataclass(frozen=True)
class Piece:
    """A piece of text, safe to show: never half a character, never the beginning of a stop string."""

    text: str
    tokens: int


@dataclass(frozen=True)
class Finished:
    """Last event of a generation that ended as it should; ``reason`` is ``stop`` or ``length``."""

    reason: str
    text: str
    prompt_tokens: int
    completion_tokens: int
    first_token_ms: float
    latency_ms: float
    route: tuple[Hop, ...]


Event = Started | Piece | Finished


@dataclass(frozen=True)
class Progress:
    """How far a long piece of work is: ``done`` of ``total`` steps of ``stage``, a phrase to show to a person."""

    stage: str
    done: int
    total: int
