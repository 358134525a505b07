"""Keys, wallets and limits over real HTTP."""

from __future__ import annotations

import time

import httpx
import pytest
import trio

from blyan_node.api import keys
from blyan_node.api.auth import _network_of
from blyan_node.api.client import Client
from tests.support.api import SITE, TOKEN, Served, served
from tests.support.service import ScriptedService
from tests.unit.api.test_siwe import ADDRESS, asked, personal_sign

PROMPT = {"prompt": "Hi"}


def error_of(response: httpx.Response) -> dict:
    return response.json()["error"]


def with_key(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def sign_in(api: Served, **changes) -> httpx.Response:
    text = asked(api.access.signin, **changes)
    return await api.client.post("/auth/siwe", json={"message": text, "signature": personal_sign(text)})


async def test_a_key_opens_what_its_scopes_name() -> None:
    async with served() as api, httpx.AsyncClient(base_url=api.url) as client:
        opened = {}
        for scope in ("chat", "read", "send", "admin"):
            headers = {"X-API-Key": api.key(scope)}
            answers = {
                "chat": await client.post("/chat", json=PROMPT, headers=headers),
                "read": await client.get("/status", headers=headers),
                "send": await client.post("/transactions", json={}, headers=headers),
                "admin": await client.post("/models", json={"path": "/m"}, headers=headers),
            }
            opened[scope] = {name for name, answer in answers.items() if answer.status_code != 403}
        everything = {"chat", "read", "send", "admin"}
        assert opened == {"chat": {"chat"}, "read": {"read"}, "send": {"send"}, "admin": everything}


async def test_keys_that_are_no_longer_valid() -> None:
    async with served() as api, httpx.AsyncClient(base_url=api.url) as client:
        key = api.key("chat")
        assert (await client.get("/chat", headers=with_key(key))).status_code == 200
        (made,) = keys.load(api.folder / "api-keys.json")
        keys.revoke(api.folder / "api-keys.json", made.id, now=int(time.time()))
        for path in ("/chat", "/health", "/v1/models"):
            assert (await client.get(path, headers=with_key(key))).status_code == 401


async def test_a_second_key_does_not_hide_a_wrong_one() -> None:
    async with served() as api, httpx.AsyncClient(base_url=api.url) as client:
        for headers, status in (
            ([("X-API-Key", TOKEN), ("Authorization", f"Bearer {TOKEN}")], 200),
            ([("X-API-Key", TOKEN), ("Authorization", "Bearer wrong")], 401),
            ([("X-API-Key", "wrong"), ("X-API-Key", TOKEN)], 401),
            ([("Authorization", "Basic eDp5")], 401),
            ([("X-API-Key", "")], 401),
            ([("X-API-Key", b"\xff\xfe")], 401),
        ):
            assert (await client.get("/chat", headers=headers)).status_code == status, headers


async def test_a_quota_ends_a_day() -> None:
    async with served() as api, httpx.AsyncClient(base_url=api.url) as client:
        headers = with_key(api.key("chat", tokens_per_day=15))  # an answer takes 7 + 3 tokens
        terms = (await client.get("/chat", headers=headers)).json()
        assert terms["limits"]["tokens_per_day"] == 15
        stream = {"messages": [{"role": "user", "content": "Hi"}], "stream": True}
        first = await client.post("/v1/chat/completions", json=stream, headers=headers)
        assert first.status_code == 200
        assert (await client.post("/chat", json=PROMPT, headers=headers)).status_code == 200
        refused = await client.post("/v1/completions", json=PROMPT, headers=headers)
        assert (refused.status_code, error_of(refused)["code"]) == (429, "insufficient_quota")
        assert 0 < int(refused.headers["retry-after"]) <= 86_400
        assert (await api.client.post("/chat", json=PROMPT)).status_code == 200


async def test_the_tokens_of_a_client_that_leaves_are_counted() -> None:
    service = ScriptedService(hang=True)
    async with served(service) as api, httpx.AsyncClient(base_url=api.url) as client:
        key = api.key("chat", tokens_per_day=10)

        def chat_and_leave() -> None:
            with Client(api.url, key) as caller, caller.stream([{"role": "user", "content": "Hi"}]) as chunks:
                while next(chunks)["choices"][0]["delta"].get("content") != "!":
                    pass

        await trio.to_thread.run_sync(chat_and_leave)
        await service.left.wait()
        assert (await client.post("/chat", json=PROMPT, headers=with_key(key))).status_code == 429


async def test_each_caller_has_a_window_of_its_own() -> None:
    async with served(requests_per_minute=3) as api, httpx.AsyncClient(base_url=api.url) as client:
        one, other = with_key(api.key("chat", "read")), with_key(api.key("chat", "read"))
        codes = [(await client.post("/chat", json=PROMPT, headers=one)).status_code for _ in range(4)]
        assert codes == [200, 200, 200, 429]
        assert (await client.post("/chat", json=PROMPT, headers=other)).status_code == 200
        # Reading has a window of its own, and the operator's own programs have none.
        codes = [(await client.get("/status", headers=one)).status_code for _ in range(4)]
        assert codes == [200, 200, 200, 429]
        refused = await client.get("/peers", headers=one)
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert refused.headers["x-ratelimit-limit-requests"] == "3"
        assert [(await api.client.get("/status")).status_code for _ in range(5)] == [200] * 5
        # Who has no key is counted by address.
        codes = [(await client.get("/v1/models")).status_code for _ in range(4)]
        assert codes == [200, 200, 200, 429]


async def test_a_bad_request_tells_what_is_left_too() -> None:
    async with served(requests_per_minute=3) as api:
        refused = await api.client.post("/chat", json={})
        assert (refused.status_code, refused.headers["x-ratelimit-remaining-requests"]) == (400, "2")


async def test_health_is_counted_by_address_whatever_the_key() -> None:
    async with served() as api, httpx.AsyncClient(base_url=api.url) as client:
        for headers in ({}, with_key(TOKEN)):
            for _ in range(50):
                assert (await client.get("/health", headers=headers)).status_code == 200
        for headers in ({}, with_key(TOKEN), with_key(api.key("chat"))):
            assert (await client.get("/health", headers=headers)).status_code == 429
        assert (await client.post("/chat", json=PROMPT, headers=with_key(api.key("chat")))).status_code == 200


async def test_a_caller_has_only_so_many_answers_under_way() -> None:
    service = ScriptedService(hang=True)
    async with served(service, concurrent=2) as api, httpx.AsyncClient(base_url=api.url, timeout=20) as client:
        headers = with_key(api.key("chat"))
        async with trio.open_nursery() as nursery:

            async def chat(headers: dict[str, str]) -> None:
                await client.post("/chat", json=PROMPT, headers=headers)

            for _ in range(2):
                nursery.start_soon(chat, headers)
            for _ in range(3):
                nursery.start_soon(chat, with_key(TOKEN))  # the operator may
            with trio.fail_after(10):
                while service.open < 5:
                    await trio.sleep(0.01)
            refused = await client.post("/chat", json=PROMPT, headers=headers)
            assert (refused.status_code, error_of(refused)["code"]) == (429, "too_many_at_once")
            assert refused.headers["retry-after"] == "1"
            nursery.cancel_scope.cancel()
        service.hang = False
        with trio.fail_after(10):
            while service.open:
                await trio.sleep(0.01)
        assert (await client.post("/chat", json=PROMPT, headers=headers)).status_code == 200


async def test_chats_without_a_key_where_the_operator_allows_them() -> None:
    async with served(public_chats_per_minute=2) as api, httpx.AsyncClient(base_url=api.url) as client:
        assert (await client.get("/chat")).json()["limits"]["requests_per_minute"] == 2
        codes = [(await client.post("/chat", json=PROMPT)).status_code for _ in range(3)]
        assert codes == [200, 200, 429]
        assert (await client.get("/status")).status_code == 401
        assert (await client.post("/chat", json=PROMPT, headers=with_key("wrong"))).status_code == 401


async def test_a_wallet_chats() -> None:
    async with served() as api, httpx.AsyncClient(base_url=api.url) as client:
        challenge = (await client.get("/auth/nonce")).json()
        assert (challenge["domain"], challenge["uri"], challenge["chain_id"]) == ("node.example", SITE, 1)
        told = (await sign_in(api, nonce=challenge["nonce"])).json()
        assert (told["address"], told["scopes"]) == (ADDRESS, ["chat"])
        headers = with_key(told["token"])
        assert (await client.post("/chat", json=PROMPT, headers=headers)).status_code == 200
        assert (await client.get("/status", headers=headers)).status_code == 403
        again = await sign_in(api, nonce=challenge["nonce"])
        assert (again.status_code, error_of(again)["code"]) == (401, "siwe_refused")


async def test_wallets_that_may_not() -> None:
    async with served() as api:
        # The Host header, which the caller chooses, is not what the message is compared with.
        evil = await sign_in(api, domain="127.0.0.1", uri=api.url)
        assert evil.status_code == 401
        api.access.signin.allowed = frozenset()
        refused = await sign_in(api)
        assert (refused.status_code, error_of(refused)["code"]) == (403, "wallet_not_allowed")
        for body in ({}, {"message": "x"}, {"message": "x", "signature": "0x"}, {"message": 1, "signature": "0x"}):
            assert (await api.client.post("/auth/siwe", json=body)).status_code == 400


async def test_new_wallets_bring_no_new_allowance() -> None:
    async with served(requests_per_minute=2) as api, httpx.AsyncClient(base_url=api.url) as client:
        tokens = [(await sign_in(api)).json()["token"] for _ in range(3)]
        codes = [(await client.post("/chat", json=PROMPT, headers=with_key(token))).status_code for token in tokens]
        assert codes == [200, 200, 429]


@pytest.mark.parametrize(
    ("client", "network"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("unknown", "unknown"),
    ],
)
def test_an_ipv6_host_is_one_caller(client: str, network: str) -> None:
    assert _network_of(client) == network


async def test_metrics() -> None:
    async with served() as api:
        await api.client.post("/chat", json=PROMPT)
        await api.client.get("/nothing")
        await api.client.request("BREW", "/chat")
        text = (await api.client.get("/metrics")).text
        for line in (
            'blyan_http_requests_total{method="POST",path="/chat",status="200"} 1.0',
            'blyan_http_requests_total{method="GET",path="other",status="404"} 1.0',
            'blyan_http_requests_total{method="other",path="other",status="405"} 1.0',
            'blyan_generations_total{outcome="finished"} 1.0',
            "blyan_prompt_tokens_total 7.0",
            "blyan_generated_tokens_total 3.0",
            "blyan_first_token_seconds_count 1.0",
            "blyan_ready 1.0",
            "blyan_final_cut 2.0",
            'blyan_model_units{model="tiny",state="served_by_nobody"} 0.0',
        ):
            assert line in text.splitlines(), line
        assert "memory_limit" not in text  # there is none
        named = [line for line in text.splitlines() if not line.startswith(("#", "blyan_"))]
        assert named == []


async def test_layers_and_peers() -> None:
    async with served() as api:
        (model,) = (await api.client.get("/layers")).json()["data"]
        assert model["units"] == [{"name": "embed", "served_by": ["16Uiu2alice"], "stored_by": ["16Uiu2bob"]}]
        (peer,) = (await api.client.get("/peers")).json()["data"]
        assert (peer["peer"], peer["first"], peer["last"]) == ("16Uiu2bob", 3, 5)
