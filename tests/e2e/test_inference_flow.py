"""The main job: a model published on one node, and a prompt given to any node walks through several."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from blyan_node.api.client import NodeRefused
from blyan_node.testnet.local import Node, Testnet, wait_until
from tests.support.daemons import EXACT, PART, WITHIN, Reference, command, greedy, idle, publish
from tests.support.models import tiny_checkpoint

pytestmark = pytest.mark.e2e

PROMPT = "Tell me of the sea"
ASK = [{"role": "user", "content": PROMPT}]
LENGTH = 40
MODEL = "tiny"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Iterator[Testnet]:
    """Four daemons, none of which can hold the model alone; the first has published it."""
    settings = EXACT | {"BLYAN_REQUESTS_PER_MINUTE": "10000"}
    with Testnet(tmp_path_factory.mktemp("net"), nodes=4, memory_limit=str(PART), settings=settings) as net:
        publish(net.node(0).client, checkpoint, MODEL)
        wait_until(net.serving, timeout=WITHIN, what="all nodes serving")
        yield net


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Reference:
    """What one process alone makes of the prompt."""
    return greedy(checkpoint, tmp_path_factory.mktemp("units"), PROMPT, LENGTH)


def openai_for(node: Node) -> openai.OpenAI:
    client = node.client
    return openai.OpenAI(
        base_url=f"{client.url}/v1", api_key=node.directory.read_token(), max_retries=0, timeout=WITHIN
    )


def test_every_node_holds_a_part_and_knows_the_same_chain(net: Testnet) -> None:
    def settled() -> bool:
        statuses[:] = [node.client.status() for node in net.nodes]
        stored = all(status["models"][0]["stored"] == list(range(6)) for status in statuses)
        return stored and len({tuple(status["heads"]) for status in statuses}) == 1

    statuses: list[dict[str, Any]] = []
    wait_until(settled, timeout=WITHIN, what="all units stored everywhere, as in any small net, and one chain")
    assert len({status["blocks"] for status in statuses}) == 1
    owner = net.node(0).client.status()["address"]
    nonces = {int(node.client.balance(owner)["tentative"]["nonce"]) for node in net.nodes}
    assert nonces == {7}  # a manifest and six units
    for status in statuses:
        (model,) = status["models"]
        assert 0 < len(model["served"]) < len(model["units"])
        assert 0 < status["memory_used"] <= status["memory_limit"] == PART
        assert status["resident"] > status["memory_used"]
        assert len(status["peers"]) == 3


def test_a_prompt_through_each_node_gives_the_text_of_one_machine(net: Testnet, reference: Reference) -> None:
    for node in net.nodes:
        answer = node.client.chat(PROMPT, max_tokens=LENGTH, temperature=0)
        assert answer["text"] == reference.text
        assert answer["tokens_used"] == reference.prompt_tokens + reference.completion_tokens > 0
        assert len(answer["nodes_used"]) > 1
        assert answer["finish_reason"] == reference.finish_reason
        assert answer["latency_ms"] > 0
        assert (answer["route"][0]["first"], answer["route"][-1]["last"]) == ("embed", "head")
        assert sum(hop["layers"] for hop in answer["route"]) == 4
        assert all(hop["compute_ms"] > 0 for hop in answer["route"])
    wait_until(lambda: idle(net.nodes), timeout=WITHIN, what="all seats free")


def test_a_seed_draws_the_same_text_through_any_node(net: Testnet) -> None:
    answers = {node.client.chat(PROMPT, max_tokens=16, temperature=0.9, seed=7)["text"] for node in net.nodes}
    assert len(answers) == 1
    assert net.node(0).client.chat(PROMPT, max_tokens=16, temperature=0.9, seed=8)["text"] not in answers


def test_many_prompts_at_once_do_not_mix(net: Testnet, reference: Reference) -> None:
    """Streams through all nodes are read in turns, so that all are under way together."""
    streams = [
        openai_for(node).chat.completions.create(
            model=MODEL, messages=ASK, stream=True, temperature=0, max_tokens=LENGTH
        )
        for node in net.nodes * 2
    ]
    texts = [""] * len(streams)
    open_still = set(range(len(streams)))
    while open_still:
        for index in sorted(open_still):
            if (chunk := next(streams[index], None)) is None:
                open_still.discard(index)
            elif chunk.choices:
                texts[index] += chunk.choices[0].delta.content or ""
    assert texts == [reference.text] * len(streams)


def test_openai_whole_answer(net: Testnet, reference: Reference) -> None:
    with openai_for(net.node(1)) as client:
        assert [model.id for model in client.models.list()] == [MODEL]
        answer = client.chat.completions.create(model=MODEL, messages=ASK, temperature=0, max_tokens=LENGTH)
    assert answer.choices[0].message.content == reference.text
    assert answer.choices[0].finish_reason == reference.finish_reason
    assert answer.usage.prompt_tokens == reference.prompt_tokens
    assert answer.usage.completion_tokens == reference.completion_tokens


def test_openai_stream_with_usage(net: Testnet, reference: Reference) -> None:
    with openai_for(net.node(2)) as client:
        chunks = list(
            client.chat.completions.create(
                model=MODEL,
                messages=ASK,
                temperature=0,
                max_tokens=LENGTH,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert "".join(pieces) == reference.text
    assert len(pieces) > reference.completion_tokens / 2  # it came as it was made, not in one piece
    assert chunks[-1].usage.total_tokens == reference.prompt_tokens + reference.completion_tokens


def test_openai_stop(net: Testnet, reference: Reference) -> None:
    word = re.findall(r"[a-z]{3,}", reference.text)[1]
    before = reference.text[: reference.text.index(word)]
    with openai_for(net.node(3)) as client:
        chunks = list(
            client.chat.completions.create(
                model=MODEL, messages=ASK, temperature=0, max_tokens=LENGTH, stop=[word], stream=True
            )
        )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == before
    assert chunks[-1].choices[0].finish_reason == "stop"
    wait_until(lambda: idle(net.nodes), timeout=WITHIN, what="all seats free")


def test_a_client_that_leaves_frees_the_seats_everywhere(net: Testnet) -> None:
    def seats() -> list[int]:
        return [node.client.status()["sessions"] for node in net.nodes]

    with openai_for(net.node(1)) as client:
        stream = client.chat.completions.create(model=MODEL, messages=ASK, seed=1, max_tokens=1000, stream=True)
        for _ in range(3):
            next(stream)
        assert sum(seats()) > 1
        stream.close()
    wait_until(lambda: idle(net.nodes), timeout=WITHIN, what="all seats free")
    loaded = [node.client.status()["memory_used"] for node in net.nodes]
    net.node(1).client.chat(PROMPT, max_tokens=4)
    wait_until(lambda: idle(net.nodes), timeout=WITHIN, what="all seats free")
    assert [node.client.status()["memory_used"] for node in net.nodes] == loaded


def test_a_prompt_longer_than_the_context_is_refused_by_name(net: Testnet) -> None:
    with pytest.raises(NodeRefused, match="the context of this model here is 2048") as refused:
        net.node(0).client.chat("word " * 5000)
    assert refused.value.status == 400
    with openai_for(net.node(1)) as client, pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "word " * 5000}])
    assert bad.value.param == "messages"
    with pytest.raises(NodeRefused, match="there is: tiny") as unknown:
        net.node(0).client.chat(PROMPT, model="other")
    assert unknown.value.status == 404
    assert net.node(0).client.health()["ready"]


def test_without_the_key_nothing_but_health_and_models(net: Testnet) -> None:
    url = net.node(0).client.url
    with httpx.Client(base_url=url, trust_env=False) as stranger:
        assert stranger.get("/health").json() == {"live": True, "ready": True, "why": None}
        assert stranger.get("/v1/models").json()["data"][0]["missing"] == []
        assert stranger.get("/status").status_code == 401
        assert stranger.post("/chat", json={"prompt": "Hello"}).status_code == 401
        wrong = {"X-API-Key": "invalid"}
        assert stranger.get("/chat", headers=wrong).status_code == 401
        right = {"X-API-Key": net.node(0).directory.read_token()}
        assert stranger.get("/chat", headers=right).status_code == 200


def test_the_command_line_against_the_running_net(net: Testnet, reference: Reference) -> None:
    data_dir = net.node(2).data_dir
    said = command("chat", "--temperature", "0", "--max-tokens", str(LENGTH), "--route", PROMPT, data_dir=data_dir)
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith(reference.text)
    assert "embed to" in said.stdout
    assert "can read what they are given" in said.stderr

    said = command("chat", "--json", "--temperature", "0", "--max-tokens", str(LENGTH), PROMPT, data_dir=data_dir)
    answer = json.loads(said.stdout)
    assert answer["text"] == reference.text
    assert answer["usage"]["completion_tokens"] == reference.completion_tokens
    assert said.stderr == ""  # the notice comes once

    said = command("chat", "--temperature", "0", "--max-tokens", "4", data_dir=data_dir, stdin="Hello\nAgain\n")
    assert said.returncode == 0

    said = command("model", "list", data_dir=data_dir)
    assert said.stdout.splitlines()[1].startswith("tiny\t2048\tcan run\t0x")

    status = json.loads(command("status", "--json", data_dir=data_dir).stdout)
    assert status["state"] == "serving"
    said = command("status", data_dir=data_dir)
    assert "tiny: can run, 6 units" in said.stdout
    assert status["peer_id"] in said.stdout

    wallet = json.loads(command("wallet", "show", "--json", data_dir=data_dir).stdout)
    assert (wallet["address"], wallet["peer_id"]) == (status["address"], status["peer_id"])
