"""The unmodified `openai` client against the real server. It is synchronous, so it runs in a thread."""

from __future__ import annotations

import openai
import pytest
import trio

from blyan_node.errors import GenerationFailed, ModelUnavailable, Overloaded, RequestError
from tests.support.api import TOKEN, served
from tests.support.service import ROUTE, ScriptedService

MESSAGES = [{"role": "user", "content": "Hi"}]


def client_for(url: str, key: str = TOKEN) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=20)


async def test_whole_answer() -> None:
    async with served() as api:

        def ask():
            with client_for(api.url) as client:
                return client.chat.completions.create(
                    model="tiny",
                    messages=MESSAGES,
                    max_tokens=5,
                    temperature=0.5,
                    top_p=0.9,
                    seed=-1,
                    stop=["\n", "END"],
                )

        answer = await trio.to_thread.run_sync(ask)
    assert answer.choices[0].message.content == "Hello wörld!"
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (7, 3, 10)
    assert answer.blyan["route"][1]["peer"] == ROUTE[1].peer
    (asked,) = api.service.asked
    assert (asked.model, asked.max_tokens, asked.stop) == ("tiny", 5, ("\n", "END"))
    assert (asked.sampling.temperature, asked.sampling.top_p) == (0.5, 0.9)
    assert 0 <= asked.sampling.seed < 2**63


async def test_stream_with_usage() -> None:
    async with served(ScriptedService(reason="length")) as api:

        def ask():
            with client_for(api.url) as client:
                stream = client.chat.completions.create(
                    model="tiny", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
                )
                return list(stream)

        chunks = await trio.to_thread.run_sync(ask)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "Hello wörld!"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == 10
    assert len({chunk.id for chunk in chunks}) == 1


async def test_completions_of_a_text() -> None:
    async with served() as api:

        def ask():
            with client_for(api.url) as client:
                whole = client.completions.create(model="tiny", prompt="Once", seed=1, stop="x")
                stream = client.completions.create(
                    model="tiny", prompt="Once", max_tokens=9, stream=True, stream_options={"include_usage": True}
                )
                return whole, list(stream)

        whole, chunks = await trio.to_thread.run_sync(ask)
    assert (whole.object, whole.choices[0].text, whole.choices[0].finish_reason) == (
        "text_completion",
        "Hello wörld!",
        "stop",
    )
    assert whole.usage.total_tokens == 10
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == "Hello wörld!"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], 3)
    assert [(asked.prompt, asked.max_tokens) for asked in api.service.asked] == [("Once", 16), ("Once", 9)]


async def test_models() -> None:
    async with served() as api:

        def ask():
            with client_for(api.url) as client:
                return [model.id for model in client.models.list()]

        assert await trio.to_thread.run_sync(ask) == ["tiny"]


@pytest.mark.parametrize(
    ("error", "expected", "status"),
    [
        (RequestError("too long", param="messages"), openai.BadRequestError, 400),
        (ModelUnavailable("nobody serves layer.3"), openai.InternalServerError, 503),
        (Overloaded("full"), openai.InternalServerError, 503),
        (GenerationFailed("lost", partial="abc"), openai.InternalServerError, 502),
    ],
)
async def test_errors_before_the_first_token(error, expected, status) -> None:
    async with served(ScriptedService(before=error)) as api:
        for stream in (False, True):

            def ask(stream=stream):
                with client_for(api.url) as client, pytest.raises(expected) as caught:
                    client.chat.completions.create(model="tiny", messages=MESSAGES, stream=stream)
                return caught.value

            told = await trio.to_thread.run_sync(ask)
            assert told.status_code == status
            assert str(error) in told.message
            if status == 400:
                assert told.param == "messages"
            if status == 503:
                assert int(told.response.headers["retry-after"]) >= 1


async def test_unknown_model_and_wrong_key() -> None:
    async with served() as api:

        def ask():
            with client_for(api.url) as client, pytest.raises(openai.NotFoundError) as unknown:
                client.chat.completions.create(model="gpt-5", messages=MESSAGES)
            with client_for(api.url, "wrong") as client, pytest.raises(openai.AuthenticationError):
                client.models.list()
            return unknown.value

        told = await trio.to_thread.run_sync(ask)
        assert told.code == "model_not_found"
        assert "tiny" in told.message


async def test_a_failure_in_the_middle_ends_the_stream_with_an_error() -> None:
    async with served(ScriptedService(after=GenerationFailed("a stage was lost", partial="Hello"))) as api:

        def ask():
            pieces = []
            with client_for(api.url) as client, pytest.raises(openai.APIError) as caught:
                pieces.extend(
                    chunk.choices[0].delta.content or ""
                    for chunk in client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
                )
            return "".join(pieces), caught.value

        text, told = await trio.to_thread.run_sync(ask)
        assert text == "Hello wörld!"
        assert "a stage was lost" in told.message
        assert told.body["partial"] == text


async def test_a_client_that_leaves_cancels_its_generation() -> None:
    async with served(ScriptedService(hang=True)) as api:

        def ask():
            with client_for(api.url) as client:
                stream = client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
                first = next(iter(stream))
                stream.close()
                return first

        await trio.to_thread.run_sync(ask)
        with trio.fail_after(5):
            await api.service.left.wait()
        assert api.service.open == 0
