"""From JSON to :class:`Generate`: what is asked, in OpenAI's words and in ours."""

from __future__ import annotations

import secrets
from typing import Any

from blyan_node.api.body import Fields
from blyan_node.errors import RequestError
from blyan_node.inference.generation import Generate, Message, Sampling

MAX_TEXT = 1 << 20
MAX_MESSAGES = 1000
MAX_TOKENS = 10_000_000
DEFAULT_COMPLETION = 16
"""Tokens of a plain completion that names no bound, as at OpenAI."""
MAX_STOPS = 4
MAX_STOP = 256

_COMMON = frozenset({"model", "max_tokens", "temperature", "top_p", "seed", "stop"})
_OPENAI = _COMMON | {"stream", "stream_options", "n"}
_CHAT = _OPENAI | {"messages", "max_completion_tokens"}
_COMPLETION = _OPENAI | {"prompt", "best_of"}
_PROMPT = _COMMON | {"prompt"}
# Parameters of OpenAI's that change nothing about the text.
HARMLESS = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"})
# Those that would change it are accepted only where they ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "echo": (False,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
}


def read_chat(fields: Fields) -> Generate:
    """Read the body of ``POST /v1/chat/completions``; RequestError names the field at fault."""
    _only(fields, _CHAT)
    fields.integer("n", 1, 1)
    limit = fields.integer("max_completion_tokens", 1, MAX_TOKENS)
    return _generate(fields, _messages(fields.raw("messages")), limit)


def read_completion(fields: Fields) -> Generate:
    """Read the body of ``POST /v1/completions``: ``prompt`` is text to go on from, as it stands."""
    _only(fields, _COMPLETION)
    fields.integer("n", 1, 1)
    fields.integer("best_of", 1, 1)
    prompt = fields.raw("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str) or not 1 <= len(prompt) <= MAX_TEXT:
        raise RequestError(f"prompt must be a string of 1 to {MAX_TEXT} characters, or a list of one", param="prompt")
    limit = fields.integer("max_tokens", 1, MAX_TOKENS)
    return _generate(fields, prompt, DEFAULT_COMPLETION if limit is None else limit)


def read_prompt(fields: Fields) -> Generate:
    """Read the body of ``POST /chat``: ``prompt`` is one turn of a user."""
    _only(fields, _PROMPT)
    return _generate(fields, (Message("user", fields.needed_text("prompt", most=MAX_TEXT)),), None)


def include_usage(fields: Fields) -> bool:
    """Whether ``stream_options`` asks for a last chunk with the numbers of tokens."""
    options = fields.raw("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict) or not fields.flag("stream"):
        raise RequestError("stream_options must be an object, and is for stream = true only", param="stream_options")
    return Fields(options).flag("include_usage")


def _generate(fields: Fields, prompt: tuple[Message, ...] | str, limit: int | None) -> Generate:
    if limit is None:
        limit = fields.integer("max_tokens", 1, MAX_TOKENS)
    seed = fields.integer("seed", -(2**63), 2**63 - 1)
    top_p = fields.number("top_p", 0, 1, 1)
    if top_p == 0:
        raise RequestError("top_p must be above 0", param="top_p")
    return Generate(
        prompt=prompt,
        model=fields.text("model", most=256),
        max_tokens=limit,
        sampling=Sampling(
            temperature=fields.number("temperature", 0, 2, 1),
            top_p=top_p,
            # Seeds are 63 bits in the protocol; without one, every request draws anew.
            seed=secrets.randbits(63) if seed is None else seed & (2**63 - 1),
        ),
        stop=_stops(fields.raw("stop")),
    )


def _only(fields: Fields, known: frozenset[str]) -> None:
    for name in sorted(fields.names() - known - HARMLESS):
        if name not in NEUTRAL:
            raise RequestError(f"the parameter {name} is not known here", param=name)
        if fields.raw(name) not in NEUTRAL[name]:
            raise RequestError(f"this value of {name} is not supported by this node", param=name)


def _messages(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_MESSAGES:
        raise RequestError(f"messages must be a list of 1 to {MAX_MESSAGES} messages", param="messages")
    return tuple(_message(item, f"messages[{index}]") for index, item in enumerate(value))


def _message(item: Any, where: str) -> Message:
    if not isinstance(item, dict):
        raise RequestError(f"{where} must be an object with role and content", param=where)
    role = item.get("role")
    if role not in ("system", "developer", "user", "assistant"):
        raise RequestError(f"{where}.role must be system, user or assistant", param=f"{where}.role")
    # OpenAI renamed the role; the templates of open models know the old name.
    return Message("system" if role == "developer" else role, _content(item.get("content"), f"{where}.content"))


def _content(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        parts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in value]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) == len(parts):
            return "".join(texts)
    raise RequestError(f"{where} must be a string, or a list of parts of type text", param=where)


def _stops(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MAX_STOPS:
        raise RequestError(f"stop must be a string or a list of at most {MAX_STOPS}", param="stop")
    if not all(isinstance(stop, str) and 1 <= len(stop) <= MAX_STOP for stop in stops):
        raise RequestError(f"each stop string must have 1 to {MAX_STOP} characters", param="stop")
    return tuple(stops)
