"""The routes of the chain: blocks, cuts, balances, transactions, validators, the network."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from blyan_node.api.body import read_json
from blyan_node.api.chain_json import (
    block_json,
    cut_json,
    entry_json,
    holdings_json,
    network_json,
    record_json,
    standing_json,
    validators_json,
)
from blyan_node.api.chain_service import ChainService
from blyan_node.api.endpoints import JSON, Endpoint, Parameter, asked, plain
from blyan_node.api.errors import ApiError
from blyan_node.api.schemas import (
    ADDRESS,
    BALANCE,
    BLOCK,
    BLOCKS,
    CUTS,
    ID,
    MOVEMENTS,
    NETWORK,
    STANDING,
    SUBMIT_REQUEST,
    SUBMITTED,
    VALIDATORS,
)
from blyan_node.chain.block import CHAINS
from blyan_node.chain.keys import parse_address
from blyan_node.chain.records import MAX_ARGUMENTS, Record
from blyan_node.codec import unpack
from blyan_node.errors import RequestError, RuleError

DEFAULT_LIMIT = 20
MAX_LIMIT = 100
MAX_RECORD = MAX_ARGUMENTS + 512
"""Bytes of a packed record: its arguments, and all else with the framing."""

_NUMBER = r"([0-9]{1,18})"
_ID = r"([0-9a-fA-F]{64})"

T = TypeVar("T")


_LIMIT = Parameter(
    "limit", "entries of a page", {"type": "integer", "minimum": 1, "maximum": MAX_LIMIT, "default": DEFAULT_LIMIT}
)


def _after_parameter(form: str) -> Parameter:
    return Parameter("after", "next of the page before", {"type": "string", "pattern": f"^{form}$"})


_ID_PARAMETER = Parameter("id", "64 hex digits", ID)


def chain_endpoints(service: ChainService) -> tuple[Endpoint, ...]:
    """Endpoints over the chain."""
    chain = _Chain(service)
    return (
        Endpoint(
            "GET",
            "/chain/{chain}/blocks",
            asked(chain.blocks),
            "Blocks of a chain, newest first",
            "read",
            {JSON: BLOCKS},
            parameters=(
                Parameter("chain", "meta, parameters or transactions", {"enum": list(CHAINS)}),
                _LIMIT,
                _after_parameter(rf"{_NUMBER}\.{_ID}"),
            ),
            errors=(404,),
        ),
        Endpoint(
            "GET",
            "/blocks/{id}",
            asked(chain.block),
            "A block with its records",
            "read",
            {JSON: BLOCK},
            parameters=(_ID_PARAMETER,),
            errors=(404,),
        ),
        Endpoint(
            "GET",
            "/cuts",
            asked(chain.cuts),
            "Final cuts, newest first",
            "read",
            {JSON: CUTS},
            parameters=(_LIMIT, _after_parameter(_NUMBER)),
        ),
        Endpoint(
            "GET",
            "/balance/{address}",
            asked(chain.balance),
            "What an address owns",
            "read",
            {JSON: BALANCE},
            parameters=(Parameter("address", "with or without its checksum (EIP-55)", ADDRESS),),
        ),
        Endpoint(
            "GET",
            "/transactions",
            asked(chain.transactions),
            "Movements of an address, newest first",
            "read",
            {JSON: MOVEMENTS},
            parameters=(
                Parameter("address", "whose", ADDRESS, required=True),
                _LIMIT,
                _after_parameter(rf"{_NUMBER}\.{_NUMBER}"),
            ),
        ),
        Endpoint(
            "POST",
            "/transactions",
            _Submit(service),
            "Hand in a signed record",
            "send",
            {JSON: SUBMITTED},
            status=202,
            body=SUBMIT_REQUEST,
            errors=(502, 503),
        ),
        Endpoint(
            "GET",
            "/transactions/{id}",
            asked(chain.transaction),
            "Where a record stands",
            "read",
            {JSON: STANDING},
            parameters=(_ID_PARAMETER,),
            errors=(404,),
        ),
        Endpoint(
            "GET",
            "/validators",
            plain(lambda: validators_json(service.validators())),
            "Who decides what is final",
            "read",
            {JSON: VALIDATORS},
        ),
        Endpoint(
            "GET",
            "/network",
            plain(lambda: network_json(service.network())),
            "The network and its final state",
            "read",
            {JSON: NETWORK},
        ),
    )


class _Chain:
    """Answers what depends on a path or a query."""

    def __init__(self, service: ChainService) -> None:
        self._service = service

    def blocks(self, request: Request) -> object:
        chain = request.path_params["chain"]
        if chain not in CHAINS:
            raise ApiError(404, "not_found", f"there is no chain {chain!r}; there are {', '.join(CHAINS)}")
        limit, after = _limit(request), _after(request, rf"{_NUMBER}\.{_ID}")
        before = (int(after[1]), bytes.fromhex(after[2])) if after else None
        found = self._service.blocks(chain, before=before, limit=limit + 1)
        return _page(found, limit, block_json, lambda info: f"{info.block.height}.{info.block.id.hex()}")

    def block(self, request: Request) -> object:
        id = _id(request)
        if (info := self._service.block(id)) is None:
            raise ApiError(404, "not_found", f"block {id.hex()} is not here")
        block = block_json(info)
        if not info.block.is_stripped:
            block["records"] = [record_json(each, self._service.standing(each.id)) for each in info.block.records]
        return block

    def cuts(self, request: Request) -> object:
        limit, after = _limit(request), _after(request, _NUMBER)
        found = self._service.cuts(before=int(after[1]) if after else None, limit=limit + 1)
        return _page(found, limit, cut_json, lambda info: str(info.cut.k))

    def balance(self, request: Request) -> object:
        address = _address(request.path_params["address"])
        return holdings_json(address, self._service.holdings(address))

    def transactions(self, request: Request) -> object:
        address = _address(request.query_params.get("address", ""))
        limit, after = _limit(request), _after(request, rf"{_NUMBER}\.{_NUMBER}")
        before = (int(after[1]), int(after[2])) if after else None
        found = self._service.movements(address, before=before, limit=limit + 1)
        return _page(found, limit, entry_json, lambda entry: f"{entry.movement.k}.{entry.movement.index}")

    def transaction(self, request: Request) -> object:
        id = _id(request)
        standing = self._service.standing(id)
        if standing is None and not self._service.is_pending(id):
            raise ApiError(404, "not_found", f"no record {id.hex()} is here; it may still be on its way")
        return {"id": id.hex()} | standing_json(standing)


class _Submit:
    """``POST /transactions`` {record}: take in a signed record."""

    def __init__(self, service: ChainService) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        fields = await read_json(scope, receive)
        text = fields.needed_text("record", most=2 * MAX_RECORD)
        fields.only("record")
        try:
            record = _record(text)
            await self._service.submit(record)
        except RuleError as error:
            raise ApiError(400, "refused_record", str(error), param="record") from error
        standing = self._service.standing(record.id)
        answer = {"id": record.id.hex(), "word": standing_json(standing)["word"]}
        await JSONResponse(answer, status_code=202)(scope, receive, send)


def _record(text: str) -> Record:
    if re.fullmatch(r"(?:[0-9a-fA-F]{2})+", text) is None:
        raise RequestError("a record is handed in as the hex of its packed form", param="record")
    return unpack(Record, bytes.fromhex(text), most=MAX_RECORD)


def _page(found: list[T], limit: int, shape: Callable[[T], Any], place: Callable[[T], str]) -> dict[str, Any]:
    """A page of a list, of which one entry more than ``limit`` was asked for, to know whether there are more."""
    shown = found[:limit]
    return {
        "object": "list",
        "data": [shape(item) for item in shown],
        "next": place(shown[-1]) if len(found) > limit else None,
    }


def _limit(request: Request) -> int:
    text = request.query_params.get("limit", str(DEFAULT_LIMIT))
    if re.fullmatch(r"[0-9]{1,3}", text) is None or not 1 <= int(text) <= MAX_LIMIT:
        raise RequestError(f"limit must be a whole number from 1 to {MAX_LIMIT}", param="limit")
    return int(text)


def _after(request: Request, form: str) -> re.Match[str] | None:
    """The cursor of a page, as this API gave it out with the page before."""
    if (text := request.query_params.get("after")) is None:
        return None
    if (match := re.fullmatch(form, text)) is None:
        raise RequestError("after must be the value of next in the page before", param="after")
    return match


def _id(request: Request) -> bytes:
    text = request.path_params["id"]
    if re.fullmatch(_ID, text) is None:
        raise RequestError("an id has 64 hex digits", param="id")
    return bytes.fromhex(text)


def _address(text: str) -> bytes:
    try:
        return parse_address(text)
    except RuleError as error:
        raise RequestError(str(error), param="address") from error
