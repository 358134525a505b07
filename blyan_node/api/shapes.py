"""OpenAI's two forms of an answer: chat completions, and plain completions of a text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from blyan_node.api.body import Fields
from blyan_node.api.requests import read_chat, read_completion
from blyan_node.inference.generation import Generate


@dataclass(frozen=True)
class Shape:
    """How an endpoint of OpenAI's reads and answers.

    ``choice`` makes a whole answer's only choice of its text; ``piece`` a chunk's of a piece of text. ``first`` is
    what a stream begins with.
    """

    read: Callable[[Fields], Generate]
    prefix: str
    whole: str
    chunk: str
    choice: Callable[[str], dict[str, Any]]
    piece: Callable[[str], dict[str, Any]]
    first: dict[str, Any]
    last: dict[str, Any]


def _message(text: str) -> dict[str, Any]:
    return {"message": {"role": "assistant", "content": text, "refusal": None}}


CHAT = Shape(
    read=read_chat,
    prefix="chatcmpl-",
    whole="chat.completion",
    chunk="chat.completion.chunk",
    choice=_message,
    piece=lambda text: {"delta": {"content": text}},
    first={"delta": {"role": "assistant", "content": ""}},
    last={"delta": {}},
)

TEXT = Shape(
    read=read_completion,
    prefix="cmpl-",
    whole="text_completion",
    chunk="text_completion",
    choice=lambda text: {"text": text},
    piece=lambda text: {"text": text},
    first={"text": ""},
    last={"text": ""},
)
