"""The served document: every endpoint in it answers as it says, and every route is in it."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from blyan_node.chain.keys import show_address
from blyan_node.codec import pack
from tests.support.api import Served, served
from tests.support.chain_service import PAYER
from tests.support.jsonschema import faults
from tests.unit.api.test_chain import payment
from tests.unit.api.test_siwe import asked, personal_sign

MESSAGES = [{"role": "user", "content": "Hi"}]
# One good request to each endpoint: its path's values or its query, and its body.
GOOD: dict[tuple[str, str], dict[str, Any]] = {
    ("get", "/health"): {},
    ("get", "/v1/models"): {},
    ("get", "/auth/nonce"): {},
    ("post", "/auth/siwe"): {},  # its body is made in the test: it needs a nonce
    ("get", "/chat"): {},
    ("post", "/chat"): {"json": {"prompt": "Hi", "max_tokens": 3, "temperature": 0, "stop": None}},
    ("post", "/v1/chat/completions"): {"json": {"messages": MESSAGES, "user": "me", "seed": 1, "stream": False}},
    ("post", "/v1/completions"): {"json": {"prompt": ["Once"], "stop": ["a", "b"]}},
    ("get", "/status"): {},
    ("get", "/peers"): {},
    ("get", "/layers"): {},
    ("get", "/metrics"): {},
    ("post", "/models"): {"json": {"path": "/m.gguf", "name": "m"}},
    ("post", "/models/verify"): {"json": {}},
    ("get", "/chain/{chain}/blocks"): {"values": {"chain": "T"}, "params": {"limit": 2}},
    ("get", "/blocks/{id}"): {},
    ("get", "/cuts"): {"params": {"after": "3"}},
    ("get", "/balance/{address}"): {"values": {"address": show_address(PAYER.address)}},
    ("get", "/transactions"): {"params": {"address": show_address(PAYER.address)}},
    ("post", "/transactions"): {"json": {"record": pack(payment()).hex()}},
    ("get", "/transactions/{id}"): {},
    ("get", "/validators"): {},
    ("get", "/network"): {},
    ("get", "/openapi.json"): {},
}


async def described(api: Served) -> dict[str, Any]:
    return (await api.client.get("/openapi.json")).json()


def operations(document: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(method, path): told for path, methods in document["paths"].items() for method, told in methods.items()}


def good(api: Served, operation: tuple[str, str]) -> dict[str, Any]:
    """The arguments of a request that ends well."""
    method, path = operation
    request = dict(GOOD[operation])
    newest = next(info.block for info in reversed(api.service.chain.written) if info.block.records)
    values = {"/blocks/{id}": {"id": newest.id.hex()}, "/transactions/{id}": {"id": newest.records[0].id.hex()}}
    if operation == ("post", "/auth/siwe"):
        text = asked(api.access.signin)
        request["json"] = {"message": text, "signature": personal_sign(text)}
    url = path.format(**values.get(path, request.pop("values", {})))
    return {"method": method.upper(), "url": url} | request


async def test_every_endpoint_answers_as_described() -> None:
    async with served() as api:
        document = await described(api)
        assert operations(document).keys() == GOOD.keys()
        for operation, told in operations(document).items():
            request = good(api, operation)
            response = await api.client.request(**request)
            answer = told["responses"][str(response.status_code)]
            assert response.status_code in (200, 202), (operation, response.text)
            media = response.headers["content-type"].partition(";")[0]
            schema = answer["content"][media]["schema"]
            value = response.json() if media == "application/json" else response.text
            assert faults(value, schema) == [], operation
            if "json" in request:
                body = told["requestBody"]["content"]["application/json"]["schema"]
                assert faults(request["json"], body) == [], operation


async def test_every_endpoint_keeps_strangers_out_as_described() -> None:
    async with served() as api, httpx.AsyncClient(base_url=api.url) as anonymous:
        document = await described(api)
        reader, chatter = api.key("read"), api.key("chat")
        for operation, told in operations(document).items():
            request = good(api, operation)
            wrong = await anonymous.request(**request, headers={"X-API-Key": "wrong"})
            assert wrong.status_code == 401, operation
            assert faults(wrong.json(), document["components"]["schemas"]["Error"]) == []
            nobody = await anonymous.request(**request)
            if {} in told["security"]:
                assert nobody.status_code == 200, operation
                continue
            assert (nobody.status_code, nobody.json()["error"]["code"]) == (401, "missing_api_key"), operation
            poor = reader if operation[1] in ("/chat", "/v1/chat/completions", "/v1/completions") else chatter
            refused = await anonymous.request(**request, headers={"X-API-Key": poor})
            assert (refused.status_code, refused.json()["error"]["code"]) == (403, "missing_scope"), operation
            assert {"401", "403", "429"} <= told["responses"].keys()


async def test_bodies_and_parameters_are_refused_as_described() -> None:
    async with served() as api:
        document = await described(api)
        for (method, path), told in operations(document).items():
            if "requestBody" in told:
                for content, status in ((b"{", 400), (b"[]", 400), (b'{"bogus": 1}', 400)):
                    response = await api.client.request(
                        method, path, content=content, headers={"Content-Type": "application/json"}
                    )
                    assert response.status_code == status, path
                    assert str(status) in told["responses"]
                assert (await api.client.request(method, path, content=b"x")).status_code == 415
                assert {"408", "413", "415"} <= told["responses"].keys()
            for parameter in told.get("parameters", ()):
                if parameter["in"] == "query":
                    request = good(api, (method, path))
                    request["params"] = request.get("params", {}) | {parameter["name"]: "bogus"}
                    response = await api.client.request(**request)
                    assert response.status_code == 400, (path, parameter)
                    assert response.json()["error"]["param"] == parameter["name"]
                    assert "400" in told["responses"]


async def test_what_is_not_described_is_not_there() -> None:
    async with served() as api:
        document = await described(api)
        for path, methods in document["paths"].items():
            for method in ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"):
                if method.lower() not in methods:
                    response = await api.client.request(method, path.replace("{", "").replace("}", ""))
                    assert response.status_code == 405, (method, path)
                    assert set(response.headers["allow"].split(", ")) == {each.upper() for each in methods}
        for path in ("/docs", "/redoc", "/v1", "/auth", "/models/x", "/chat/", "/health/", "/../etc/passwd"):
            assert (await api.client.get(path)).status_code in (404, 405), path


@pytest.mark.parametrize(
    ("value", "schema", "fine"),
    [
        (1, {"type": "integer"}, True),
        (True, {"type": "integer"}, False),
        ({"a": 1}, {"properties": {"a": {"type": "string"}}, "required": ["a"]}, False),
        ({}, {"properties": {"a": {}}, "required": ["a"]}, False),
        ({"b": 1}, {"properties": {"a": {}}, "additionalProperties": False}, False),
        ([1, "x"], {"items": {"type": "integer"}}, False),
        (None, {"anyOf": [{"type": "string"}, {"type": "null"}]}, True),
        ("ab", {"pattern": "^a$"}, False),
        (0, {"exclusiveMinimum": 0}, False),
        ([1], {"minItems": 1, "maxItems": 1}, True),
        ({"a": 1}, {"if": {"properties": {"a": {"const": 1}}}, "then": {"required": ["b"], "properties": {}}}, False),
    ],
)
def test_the_checker_finds_faults(value, schema, fine) -> None:
    assert (faults(value, schema) == []) == fine
