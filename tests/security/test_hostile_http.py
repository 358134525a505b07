"""Hostile clients of the HTTP API: each gets a clear answer or is cut off, nothing hangs, and the others are served."""

from __future__ import annotations

import json

import httpx
import trio

from blyan_node.api import body, serve
from tests.support.api import TOKEN, Served, served
from tests.support.service import ScriptedService

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
JSON = {"Content-Type": "application/json"}


async def raw(api: Served, data: bytes, *, within: float = 10) -> bytes:
    """Send bytes on a connection of their own; return all that comes back until the other side ends it or is idle."""
    host, port = api.url.removeprefix("http://").split(":")
    got = b""
    with trio.fail_after(within):
        async with await trio.open_tcp_stream(host, int(port)) as stream:
            try:
                await stream.send_all(data)
                while part := await stream.receive_some(65536):
                    got += part
            except trio.BrokenResourceError:
                pass  # cut off while we still sent
    return got


def request(*headers: str, path: str = "/chat", method: str = "POST", content: bytes = b"") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", f"X-API-Key: {TOKEN}", "Connection: close", *headers, "", ""]
    return "\r\n".join(lines).encode("latin-1") + content


def is_clear(response: httpx.Response, status: int) -> bool:
    error = response.json()["error"]
    return response.status_code == status and bool(error["message"]) and error.keys() >= {"type", "param", "code"}


async def is_alive(api: Served) -> bool:
    with trio.fail_after(10):
        return (await api.client.get("/status")).status_code == 200


async def test_a_body_that_does_not_come(monkeypatch) -> None:
    monkeypatch.setattr(body, "READ_TIMEOUT_S", 0.3)
    async with served() as api:
        host, port = api.url.removeprefix("http://").split(":")
        async with await trio.open_tcp_stream(host, int(port)) as stream:
            await stream.send_all(request("Host: localhost", "Content-Type: application/json", "Content-Length: 99"))
            await stream.send_all(b'{"prompt"')
            with trio.fail_after(10):
                assert (await stream.receive_some(65536)).startswith(b"HTTP/1.1 408")
        assert await is_alive(api)


async def test_headers_that_never_end() -> None:
    async with served() as api:
        host, port = api.url.removeprefix("http://").split(":")
        async with await trio.open_tcp_stream(host, int(port)) as stream:
            await stream.send_all(b"GET /health HTTP/1.1\r\n")
            with trio.fail_after(30):
                try:
                    while True:
                        await stream.send_all(b"X: y\r\n")
                        with trio.move_on_after(0.2):
                            if not await stream.receive_some(100):
                                break
                except trio.BrokenResourceError:
                    pass
        assert await is_alive(api)


FRAMINGS = [
    "Content-Length: 1000000000000",
    "Content-Length: -1",
    "Content-Length: +5",
    "Content-Length: 0x5",
    "Content-Length: 5\r\nContent-Length: 6",
    "Content-Length: 5\r\nTransfer-Encoding: chunked",
    "Transfer-Encoding: chunked, identity",
    "Transfer-Encoding: xchunked",
    "Transfer-Encoding : chunked",
    "Content-Length: ٥".encode().decode("latin-1"),
]


async def test_framings_that_lie_or_smuggle() -> None:
    smuggled = b"0\r\n\r\nGET /status HTTP/1.1\r\nHost: localhost\r\n\r\n"
    async with served() as api:
        for framing in FRAMINGS:
            got = await raw(
                api, request("Host: localhost", "Content-Type: application/json", framing, content=smuggled)
            )
            assert got == b"" or got.startswith((b"HTTP/1.1 4", b"HTTP/1.1 501")), got
            assert got.count(b"HTTP/1.1") <= 1
            assert api.service.asked == []
            assert await is_alive(api)


BROKEN = [
    (b'{"prompt": "\xff"}', "JSON"),
    (b'{"prompt": "\\ud800"}', "surrogate"),
    (b'{"\\udfff": 1}', "surrogate"),
    (b'{"prompt": "Hi", "model": "\\ud83d"}', "surrogate"),
    (b'{"prompt": "Hi", "temperature": NaN}', "NaN"),
    (b'{"prompt": "Hi", "temperature": -Infinity}', "Infinity"),
    (b'{"prompt": "Hi", "temperature": 1e999}', "temperature"),
    (b'{"prompt": "Hi", "seed": ' + b"9" * 5000 + b"}", "JSON"),
    (b'{"prompt": "Hi", "seed": ' + b"9" * 4000 + b"}", "seed"),
    (b"[" * 500_000, "JSON"),
    (b'{"a":' * 100_000, "JSON"),
    (b"null", "object"),
    (b"", "JSON"),
    (b"\0" * 1000, "JSON"),
]


async def test_json_that_is_none_or_too_much() -> None:
    async with served() as api:
        for content, said in BROKEN:
            for path in ("/chat", "/v1/chat/completions", "/transactions", "/models", "/auth/siwe"):
                response = await api.client.post(path, content=content, headers=JSON)
                assert is_clear(response, 400), path
                assert path != "/chat" or said in response.json()["error"]["message"]
            assert api.service.asked == []


async def test_whole_emoji_written_as_surrogates_are_text() -> None:
    async with served() as api:
        response = await api.client.post("/chat", content=b'{"prompt": "\\ud83d\\ude00"}', headers=JSON)
        assert response.status_code == 200
        assert api.service.asked[0].prompt[0].content == "\N{GRINNING FACE}"


ODD = [
    "/%ff%fe",
    "/blocks/%00",
    "/blocks/" + "a" * 9000,
    "/balance/%F0%9F%98%80",
    "/transactions?address=%ff",
    "/cuts?after=%0d%0aX:%20y",
    "/cuts?limit=١",
    "/..%2f..%2fetc/passwd",
    "/chain/T/blocks?limit=1&limit=bogus",
    "/nothing" + "?" * 3000,
]


async def test_paths_and_queries_that_are_odd() -> None:
    async with served() as api:
        for path in ODD:
            response = await api.client.get(httpx.URL(api.url + path))
            assert is_clear(response, response.status_code)
            assert response.status_code in (400, 404)
            assert "y" not in response.headers.get("x", "")


SIMPLE = [
    None,
    "text/plain",
    "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=x",
    "application/jsonx",
    "application/json, text/plain",
    "text/plain; application/json",
    "\xff",
]


async def test_what_a_web_page_may_send_without_asking_is_no_json() -> None:
    async with served() as api:
        for content_type in SIMPLE:
            headers = {} if content_type is None else {"Content-Type": content_type.encode("latin-1")}
            for path in ("/chat", "/v1/completions", "/transactions", "/models", "/auth/siwe"):
                assert is_clear(await api.client.post(path, content=b'{"prompt": "Hi"}', headers=headers), 415)
            assert api.service.asked == []


FOREIGN = [
    "evil.example",
    "localhost.evil.example",
    "127.0.0.1.evil.example",
    "localhost@evil.example",
    "evil.example@localhost",
    "evil.example#localhost",
    "localhost#evil.example",
    "localhost/evil.example",
    "localhost:80:80",
    "localhost:x",
    "[::1",
    "[::1]evil.example",
    "2130706433",
    "0x7f.1",
    "localhost\\evil.example",
    "node.example.",
    "",
    "\xff",
]


async def test_names_that_are_not_ours() -> None:
    async with served() as api:
        for host in FOREIGN:
            got = await raw(api, request(f"Host: {host}", path="/status", method="GET"))
            assert got.startswith((b"HTTP/1.1 403", b"HTTP/1.1 400")), got[:100]


async def test_what_a_proxy_would_add_changes_nothing() -> None:
    async with served(requests_per_minute=2) as api, httpx.AsyncClient(base_url=api.url) as anonymous:
        codes = []
        for number in range(4):
            forged = {
                "X-Forwarded-For": f"10.0.0.{number}",
                "Forwarded": f"for=10.0.0.{number}",
                "X-Real-IP": "1.1.1.1",
            }
            codes.append((await anonymous.get("/v1/models", headers=forged)).status_code)
        assert codes == [200, 200, 429, 429]
        for headers in ({"X-Forwarded-Host": "localhost", "Host": "evil.example"}, {"X-Original-URL": "/status"}):
            response = await anonymous.get("/health", headers=headers)
            assert response.status_code == (403 if "Host" in headers else 200)
            assert "sessions" not in response.text
        two = await raw(api, request("Host: localhost", "Host: evil.example", path="/status", method="GET"))
        assert two.startswith(b"HTTP/1.1 400")
        absolute = await raw(api, request("Host: evil.example", path="http://localhost/status", method="GET"))
        assert absolute.startswith((b"HTTP/1.1 403", b"HTTP/1.1 4"))


CROSS_SITE = [
    {"Origin": "http://evil.example"},
    {"Origin": "null"},
    {"Origin": ""},
    {"Origin": "file://"},
    {"Origin": "http://[::1"},
    {"Origin": "http://localhost:3000", "Host": "localhost:8645"},
    {"Origin": "http://localhost:8645.evil.example", "Host": "localhost:8645"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
]


async def test_other_sites() -> None:
    async with served(public_chats_per_minute=100) as api, httpx.AsyncClient(base_url=api.url) as page:
        for headers in CROSS_SITE:
            for method, path in (("POST", "/chat"), ("GET", "/health"), ("POST", "/auth/siwe"), ("OPTIONS", "/chat")):
                response = await page.request(method, path, json={"prompt": "Hi"}, headers=headers)
                assert is_clear(response, 403), path
                assert not [name for name in response.headers if name.startswith("access-control")]
            assert api.service.asked == []


async def test_no_answer_lets_other_sites_read_it() -> None:
    async with served() as api:
        for path in ("/health", "/v1/models", "/status", "/nothing"):
            response = await api.client.get(path, headers={"Origin": api.url})
            assert not [name for name in response.headers if name.startswith("access-control")]


async def test_more_connections_than_there_may_be(monkeypatch) -> None:
    monkeypatch.setattr(serve, "MAX_CONNECTIONS", 20)
    async with served() as api:
        host, port = api.url.removeprefix("http://").split(":")
        streams = [await trio.open_tcp_stream(host, int(port)) for _ in range(60)]
        with trio.fail_after(30):
            for stream in streams:  # those beyond are closed at once, the idle ones within seconds
                try:
                    while await stream.receive_some(100):
                        pass
                except trio.BrokenResourceError:
                    pass
                await stream.aclose()
        assert await is_alive(api)


async def test_upgrades_go_nowhere() -> None:
    async with served() as api:
        websocket = (
            "Upgrade: websocket",
            "Connection: Upgrade",
            "Sec-WebSocket-Version: 13",
            "Sec-WebSocket-Key: AAAA",
        )
        for path in ("/", "/chat", "/v1/chat/completions"):
            got = await raw(api, request("Host: localhost", *websocket, path=path, method="GET"))
            assert not got.startswith(b"HTTP/1.1 101")
        assert await is_alive(api)


async def test_http2_meets_the_same_checks() -> None:
    async with (
        served() as api,
        httpx.AsyncClient(base_url=api.url, http1=False, http2=True) as client,
    ):
        assert (await client.get("/status")).status_code == 401
        assert (await client.get("/status", headers={"X-API-Key": TOKEN})).status_code == 200
        assert is_clear(await client.get("/status", headers={"Host": "evil.example", "X-API-Key": TOKEN}), 403)


async def test_a_prompt_comes_back_as_text_only() -> None:
    nasty = '</script><script>alert(1)</script>\x1b]0;x\x07\r\nX-Evil: 1\0"'
    async with served(ScriptedService(words=(nasty,))) as api:
        response = await api.client.post("/chat", json={"prompt": nasty})
        assert response.json()["text"] == nasty
        assert response.headers["content-type"] == "application/json"
        assert response.headers["x-content-type-options"] == "nosniff"
        assert "x-evil" not in response.headers
        stream = await api.client.post("/v1/chat/completions", json=CHAT | {"stream": True})
        events = [line for line in stream.text.split("\n") if line]
        assert all(line.startswith("data: ") for line in events)
        assert json.loads(events[1][6:])["choices"][0]["delta"]["content"] == nasty
