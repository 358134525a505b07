"""``chat``: one question, or a conversation, streamed as it is generated."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blyan_node.cli.common import DataDirOption, JsonOption, data_dir_of, print_error, say, say_json, short
from blyan_node.errors import ConfigError

if TYPE_CHECKING:
    from blyan_node.api.client import Client

NOTICE = "Note: the peers that run a model's layers can read what they are given. Do not type what must stay private."


def chat(
    prompt: Annotated[str | None, typer.Argument(help="The question; without it, a conversation begins.")] = None,
    data_dir: DataDirOption = None,
    model: Annotated[str | None, typer.Option(help="Model to ask [default: the one there is].")] = None,
    system: Annotated[str | None, typer.Option(help="Instruction that comes before everything.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer, in tokens.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens of this total probability.")] = 0.95,
    seed: Annotated[int | None, typer.Option(help="Draw the same way again.")] = None,
    route: Annotated[bool, typer.Option("--route", help="Show which peers ran which layers.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Chat with the model through the running node. Ctrl-C stops an answer; Ctrl-D ends the conversation."""
    from blyan_node.api.client import connect

    directory = data_dir_of(data_dir)
    parameters = {
        "model": model,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
    }
    history = [{"role": "system", "content": system}] if system else []
    if as_json and prompt is None:
        raise ConfigError("--json needs a question: blyan-node chat --json 'What is a block?'")
    with connect(directory) as client:
        _notice_once(directory)
        if prompt is not None:
            answer = _answer(client, [*history, {"role": "user", "content": prompt}], parameters, quiet=as_json)
            if as_json:
                say_json(answer)
            elif route:
                show_route(answer["route"])
            if answer["finish_reason"] == "interrupted":
                raise KeyboardInterrupt
            return
        for question in _questions():
            history.append({"role": "user", "content": question})
            answer = _answer(client, history, parameters, quiet=False)
            history.append({"role": "assistant", "content": answer["text"]})
            if route:
                show_route(answer["route"])


def _notice_once(directory: Path) -> None:
    marker = directory / "chat-notice-shown"
    if not marker.exists():
        sys.stderr.write(NOTICE + "\n")
        with suppress(OSError):  # a directory that cannot be written must not stop a chat; the notice comes again
            marker.touch()


def _questions() -> Iterator[str]:
    """Ask a person for questions, until the input ends."""
    if sys.stdin.isatty():
        say("Type a question; Ctrl-D ends.")
    while True:
        try:
            question = input("› " if sys.stdin.isatty() else "").strip()
        except EOFError:
            say()
            return
        if question:
            yield question


def _answer(
    client: Client, messages: list[dict[str, str]], parameters: dict[str, Any], *, quiet: bool
) -> dict[str, Any]:
    """Stream one answer to stdout, unless ``quiet``, and return its text and numbers."""
    from blyan_node.api.client import NodeRefused

    answer: dict[str, Any] = {"text": "", "finish_reason": None, "model": None, "route": []}
    try:
        with client.stream(messages, stream_options={"include_usage": True}, **parameters) as chunks:
            for chunk in chunks:
                answer["model"] = chunk.get("model")
                answer |= chunk.get("blyan", {})
                answer |= {"usage": chunk["usage"]} if "usage" in chunk else {}
                for choice in chunk["choices"]:
                    text = choice["delta"].get("content") or ""
                    answer["text"] += text
                    answer["finish_reason"] = choice["finish_reason"] or answer["finish_reason"]
                    if text and not quiet:
                        say(text, end="")
    except KeyboardInterrupt:
        answer["finish_reason"] = "interrupted"
        print_error("stopped")
    except NodeRefused:
        if answer["text"] and not quiet:
            say()  # what came so far stands, on its own line
        raise
    if not quiet:
        say()
    return answer


def show_route(route: list[dict[str, Any]]) -> None:
    """Print which peers ran which units, and how long each took for one token."""
    for hop in route:
        say(
            f"  {short(hop['peer'])}  {hop['first']} to {hop['last']}"
            f"  {hop['compute_ms']:.1f} ms computing, {hop['network_ms']:.1f} ms on the way"
        )
