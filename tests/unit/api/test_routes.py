"""Every route and every refusal, over real HTTP."""

from __future__ import annotations

import json

import httpx
import pytest
import trio

from blyan_node.api.body import MAX_BODY
from blyan_node.api.serve import api_url, open_api_listener
from blyan_node.errors import AlreadyRunning, CheckpointError, ConfigError, GenerationFailed, IntegrityError
from blyan_node.inference.generation import Progress
from tests.support.api import TOKEN, served
from tests.support.service import ScriptedService

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


def error_of(response: httpx.Response) -> dict:
    return response.json()["error"]


async def test_chat() -> None:
    async with served(price_nano=3) as api:
        response = await api.client.post("/chat", json={"prompt": "Hi", "max_tokens": 10, "temperature": 0})
        assert response.status_code == 200
        answer = response.json()
        assert answer["text"] == "Hello wörld!"
        assert answer["tokens_used"] == 10
        assert answer["nodes_used"] == ["16Uiu2alice", "16Uiu2bob"]
        assert answer["latency_ms"] == 30.0
        assert (answer["cost_nano"], answer["cost_bly"]) == (30, 30e-9)
        assert answer["model"] == "tiny"
        assert [hop["first"] for hop in answer["route"]] == ["embed", "layer.2"]
        assert api.service.asked[0].sampling.temperature == 0


async def test_terms_need_a_right_key() -> None:
    async with served() as api:
        assert (await api.client.get("/chat", headers={"X-API-Key": "invalid"})).status_code == 401
        async with httpx.AsyncClient(base_url=api.url) as anonymous:
            assert (await anonymous.get("/chat")).status_code == 401
            right = await anonymous.get("/chat", headers={"X-API-Key": TOKEN})
        assert right.status_code == 200
        assert right.json()["models"] == ["tiny"]
        assert right.json()["limits"]["requests_per_minute"] == 100


async def test_public_paths_refuse_a_wrong_key_but_need_none() -> None:
    async with served() as api, httpx.AsyncClient(base_url=api.url) as anonymous:
        for path in ("/health", "/v1/models"):
            assert (await anonymous.get(path)).status_code == 200
            for headers in ({"X-API-Key": "no"}, {"Authorization": "Bearer no"}, {"Authorization": "Basic eDp5"}):
                refused = await anonymous.get(path, headers=headers)
                assert refused.status_code == 401
                assert refused.headers["www-authenticate"] == "Bearer"
        for method, path in (
            ("GET", "/status"),
            ("POST", "/chat"),
            ("POST", "/v1/chat/completions"),
            ("POST", "/models"),
        ):
            refused = await anonymous.request(method, path)
            assert refused.status_code == 401
            assert error_of(refused)["code"] == "missing_api_key"


async def test_health() -> None:
    async with served(ScriptedService(why_not_ready="nobody serves layer.3")) as api:
        response = await api.client.get("/health")
        assert response.json() == {"live": True, "ready": False, "why": "nobody serves layer.3"}


async def test_the_101st_health_in_a_minute_is_refused_and_chats_are_not() -> None:
    async with served() as api:
        codes = [(await api.client.get("/health")).status_code for _ in range(101)]
        assert codes == [200] * 100 + [429]
        refused = await api.client.get("/health")
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert (await api.client.post("/chat", json={"prompt": "Hi"})).status_code == 200


async def test_chats_have_a_limit_of_their_own() -> None:
    async with served(requests_per_minute=2) as api:
        answers = [
            await api.client.post(path, json=CHAT | {"prompt": "Hi"} if path == "/chat" else CHAT)
            for path in ["/v1/chat/completions"] * 3
        ]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["1", "0", "0"]
        assert error_of(answers[-1])["type"] == "rate_limit_error"
        assert (await api.client.get("/health")).status_code == 200


async def test_status_and_models() -> None:
    async with served() as api:
        status = (await api.client.get("/status")).json()
        assert status["state"] == "serving"
        assert status["models"][0]["coverage"] == [1, 1, 1]
        models = (await api.client.get("/v1/models")).json()
        assert models["data"][0] | {"created": 0} == {
            "id": "tiny",
            "object": "model",
            "created": 0,
            "owned_by": "0xabc",
            "context_length": 512,
            "missing": [],
        }


async def test_what_is_not_there() -> None:
    async with served() as api:
        missing = await api.client.get("/nothing")
        assert (missing.status_code, error_of(missing)["code"]) == (404, "not_found")
        wrong = await api.client.delete("/chat")
        assert (wrong.status_code, wrong.headers["allow"]) == (405, "GET, POST")


@pytest.mark.parametrize(
    ("host", "code"),
    [
        ("localhost:1", 200),
        ("127.0.0.1", 200),
        ("[::1]:80", 200),
        ("node.example", 200),
        ("evil.example", 403),
        ("", 403),
    ],
)
async def test_hosts(host: str, code: int) -> None:
    async with served() as api:
        response = await api.client.get("/status", headers={"Host": host})
        assert response.status_code == code
        assert code == 200 or error_of(response)["code"] == "host_not_allowed"


async def test_origins() -> None:
    async with served() as api:
        own = api.url
        for headers, code in (
            ({"Origin": own}, 200),
            ({"Origin": "http://evil.example"}, 403),
            ({"Origin": "null"}, 403),
            ({"Sec-Fetch-Site": "cross-site"}, 403),
            ({"Sec-Fetch-Site": "same-origin"}, 200),
        ):
            assert (await api.client.get("/status", headers=headers)).status_code == code, headers


async def test_bodies_that_are_not_json() -> None:
    async with served() as api:
        for content, kind, code in (
            ("prompt=Hi", "application/x-www-form-urlencoded", 415),
            ("{}", "text/plain", 415),
            ("{", "application/json", 400),
            ("[]", "application/json", 400),
            ("[" * 100_000, "application/json", 400),
            (b"\xff\xfe", "application/json", 400),
        ):
            response = await api.client.post("/chat", content=content, headers={"Content-Type": kind})
            assert response.status_code == code, content[:20]
            assert error_of(response)["message"]


async def test_a_large_body_is_refused_and_the_connection_is_not_stuck() -> None:
    async with served() as api:
        host, port = api.url.removeprefix("http://").split(":")
        head = f"POST /chat HTTP/1.1\r\nHost: {host}\r\nX-API-Key: {TOKEN}\r\nContent-Type: application/json\r\n"
        chunk = b"%x\r\n%s\r\n" % (MAX_BODY // 32, b" " * (MAX_BODY // 32))
        for framing, pieces in (
            (f"Content-Length: {MAX_BODY + 1}\r\n\r\n", [b" " * (MAX_BODY + 1)]),
            ("Transfer-Encoding: chunked\r\n\r\n", [chunk] * 64),
        ):
            stream = await trio.open_tcp_stream(host, int(port))
            sent, got = [(head + framing).encode(), *pieces], b""
            try:
                for piece in sent:
                    await stream.send_all(piece)
            except trio.BrokenResourceError:
                pass  # refused before all was sent, as it should be
            try:
                while data := await stream.receive_some(65536):
                    got += data
            except trio.BrokenResourceError:
                pass
            assert got.startswith(b"HTTP/1.1 413") or not got  # a reset may overtake the answer
            await stream.aclose()
        assert (await api.client.get("/status")).status_code == 200


BAD_CHATS = [
    ({}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "Hi"}, "messages"),
    ({"messages": ["Hi"]}, "messages[0]"),
    ({"messages": [{"role": "king", "content": "Hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
    (CHAT | {"n": 2}, "n"),
    (CHAT | {"max_tokens": 0}, "max_tokens"),
    (CHAT | {"max_tokens": True}, "max_tokens"),
    (CHAT | {"max_completion_tokens": "5"}, "max_completion_tokens"),
    (CHAT | {"temperature": 3}, "temperature"),
    (CHAT | {"top_p": 0}, "top_p"),
    (CHAT | {"top_p": 1.5}, "top_p"),
    (CHAT | {"seed": 2**63}, "seed"),
    (CHAT | {"stop": ["a"] * 5}, "stop"),
    (CHAT | {"stop": [""]}, "stop"),
    (CHAT | {"stop": 5}, "stop"),
    (CHAT | {"stream": "yes"}, "stream"),
    (CHAT | {"stream_options": {"include_usage": True}}, "stream_options"),
    (CHAT | {"model": 5}, "model"),
    (CHAT | {"tools": [{"type": "function"}]}, "tools"),
    (CHAT | {"frequency_penalty": 1}, "frequency_penalty"),
    (CHAT | {"bogus": 1}, "bogus"),
]


async def test_bad_parameters_are_named() -> None:
    async with served() as api:
        for body, param in BAD_CHATS:
            response = await api.client.post("/v1/chat/completions", json=body)
            assert response.status_code == 400, body
            assert error_of(response)["param"] == param
            assert error_of(response)["type"] == "invalid_request_error"
        assert api.service.asked == []
        nan = await api.client.post(
            "/v1/chat/completions",
            content=json.dumps(CHAT | {"temperature": float("nan")}),
            headers={"Content-Type": "application/json"},
        )
        assert nan.status_code == 400


BAD_COMPLETIONS = [
    ({}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": ["a", "b"]}, "prompt"),
    ({"prompt": [1, 2]}, "prompt"),
    ({"prompt": "a", "n": 2}, "n"),
    ({"prompt": "a", "best_of": 2}, "best_of"),
    ({"prompt": "a", "echo": True}, "echo"),
    ({"prompt": "a", "suffix": "b"}, "suffix"),
    ({"prompt": "a", "logprobs": 5}, "logprobs"),
    ({"prompt": "a", "seed": 1.5}, "seed"),
    ({"prompt": "a", "messages": []}, "messages"),
]


async def test_bad_parameters_of_completions_are_named() -> None:
    async with served() as api:
        for body, param in BAD_COMPLETIONS:
            response = await api.client.post("/v1/completions", json=body)
            assert (response.status_code, error_of(response)["param"]) == (400, param), body
        assert api.service.asked == []


async def test_whole_numbers_may_be_written_with_a_point() -> None:
    async with served() as api:
        body = {"prompt": ["a"], "max_tokens": 5.0, "seed": 2.0, "n": 1.0}
        assert (await api.client.post("/v1/completions", json=body)).status_code == 200
        (asked,) = api.service.asked
        assert (asked.prompt, asked.max_tokens, asked.sampling.seed) == ("a", 5, 2)


async def test_accepted_forms() -> None:
    async with served() as api:
        body = {
            "model": None,
            "messages": [
                {"role": "developer", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            ],
            "max_tokens": 9,
            "max_completion_tokens": 4,
            "stop": "x",
            "user": "me",
            "frequency_penalty": 0,
        }
        assert (await api.client.post("/v1/chat/completions", json=body)).status_code == 200
        (asked,) = api.service.asked
        assert [(turn.role, turn.content) for turn in asked.prompt] == [("system", "Be brief."), ("user", "ab")]
        assert (asked.max_tokens, asked.stop, asked.model) == (4, ("x",), None)


async def test_partial_text_is_kept_in_the_error() -> None:
    async with served(ScriptedService(after=GenerationFailed("a stage was lost", partial="Hello"))) as api:
        response = await api.client.post("/chat", json={"prompt": "Hi"})
        assert response.status_code == 502
        assert error_of(response)["partial"] == "Hello"


async def test_a_whole_answer_is_cancelled_when_the_client_leaves() -> None:
    service = ScriptedService(hang=True)
    begun = trio.Event()
    service.on_generate = begun.set
    async with served(service) as api:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(lambda: api.client.post("/chat", json={"prompt": "Hi"}))
                await begun.wait()
                scope.cancel()
        with trio.fail_after(5):
            await service.left.wait()


async def test_import_reports_progress() -> None:
    async with served() as api:
        response = await api.client.post("/models", json={"path": "/m.gguf", "name": "m"})
        lines = [json.loads(line) for line in response.text.splitlines()]
        assert lines == [
            {"stage": "read", "done": 1, "total": 2},
            {"stage": "read", "done": 2, "total": 2},
            {"published": True},
        ]


async def test_import_errors() -> None:
    async with served(ScriptedService(before=CheckpointError("no such architecture"))) as api:
        assert (await api.client.post("/models", json={"path": "/m"})).status_code == 422
        assert (await api.client.post("/models", json={})).status_code == 400
        assert (await api.client.post("/models", json={"path": "/m", "x": 1})).status_code == 400
    service = ScriptedService(import_error=CheckpointError("a tensor is missing"), steps=(Progress("read", 1, 2),))
    async with served(service) as api:
        response = await api.client.post("/models", json={"path": "/m"})
        assert "a tensor is missing" in json.loads(response.text.splitlines()[-1])["error"]["message"]


async def test_a_bug_is_an_error_without_its_details() -> None:
    def bug() -> None:
        raise ZeroDivisionError("secret")

    async with served(ScriptedService(on_generate=bug)) as api:
        response = await api.client.post("/chat", json={"prompt": "Hi"})
        assert response.status_code == 500
        assert "secret" not in response.text
        assert (await api.client.get("/status")).status_code == 200


async def test_ports() -> None:
    async with await open_api_listener("127.0.0.1", 0) as listener:
        port = int(api_url(listener).rpartition(":")[2])
        with pytest.raises(AlreadyRunning, match=f"port {port} .* in use"):
            await open_api_listener("127.0.0.1", port)
    with pytest.raises(ConfigError, match="cannot listen"):
        await open_api_listener("192.0.2.1", 0)


async def test_a_client_that_reads_nothing_does_not_hold_up_the_end() -> None:
    service = ScriptedService(words=("x" * 100_000,) * 400)
    async with served(service) as api:
        host, port = api.url.removeprefix("http://").split(":")
        stream = await trio.open_tcp_stream(host, int(port))
        body = json.dumps(CHAT | {"stream": True}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nX-API-Key: {TOKEN}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        await stream.send_all(head.encode() + body)
        await stream.receive_some(1000)
        began = trio.current_time()
        api.stop.set()
        with trio.fail_after(5):
            await service.left.wait()
        assert trio.current_time() - began < 5
        await stream.aclose()


async def test_garbage_on_the_port() -> None:
    async with served() as api:
        host, port = api.url.removeprefix("http://").split(":")
        for garbage in (
            b"\x00\xff" * 500,
            b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: " + b"y" * 100_000,
            b"POST /chat HTTP/1.1\r\n\r\n",
        ):
            stream = await trio.open_tcp_stream(host, int(port))
            try:
                await stream.send_all(garbage)
                assert (await stream.receive_some(100)).startswith((b"HTTP/1.1 4", b""))
            except trio.BrokenResourceError:
                pass
            await stream.aclose()
        assert (await api.client.get("/status")).status_code == 200


async def test_verify_names_what_is_served_or_what_is_damaged() -> None:
    async with served() as api:
        answer = await api.client.post("/models/verify", json={})
        assert answer.json() == {"verified": ["embed", "layer.0", "head"]}
        api.service.before = IntegrityError("layer.0 changed")
        answer = await api.client.post("/models/verify", json={})
        assert answer.status_code == 422
        assert answer.json()["error"]["code"] == "damaged_weights"
        assert "layer.0" in answer.json()["error"]["message"]
