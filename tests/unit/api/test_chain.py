"""The chain's routes over real HTTP, on a chain of real blocks, cuts and payments."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
import trio

from blyan_node.api.chain import MAX_RECORD
from blyan_node.api.client import Client, NodeRefused
from blyan_node.chain.genesis import parse_genesis
from blyan_node.chain.keys import Key, show_address
from blyan_node.chain.ledger import Void
from blyan_node.chain.records import (
    MAX_ARGUMENTS,
    Arguments,
    BlobRef,
    Bond,
    Layer,
    Manifest,
    Record,
    Transfer,
    make_record,
    sign_record,
)
from blyan_node.codec import pack
from blyan_node.errors import Overloaded, RequestError
from tests.support.api import TOKEN, Served, served
from tests.support.chain_service import CUTS, PAYEE, PAYER, PAYMENTS
from tests.support.chains import GENESIS, NETWORK, STRANGER, Forge
from tests.support.money import VALIDATORS, double_block

PATHS = [
    "/chain/T/blocks",
    f"/blocks/{'00' * 32}",
    "/cuts",
    f"/balance/{show_address(PAYER.address)}",
    f"/transactions?address={show_address(PAYER.address)}",
    f"/transactions/{'00' * 32}",
    "/validators",
    "/network",
]


async def get(api: Served, path: str, **query: Any) -> Any:
    response = await api.client.get(path, params=query or None)
    assert response.status_code == 200, response.text
    return response.json()


async def pages(api: Served, path: str, limit: int, **query: Any) -> list[list[Any]]:
    """Read a list to its end."""
    found, after = [], {}
    while True:
        page = await get(api, path, limit=limit, **query, **after)
        assert page["object"] == "list"
        found.append(page["data"])
        if page["next"] is None:
            return found
        after = {"after": page["next"]}


async def refused(api: Served, path: str, status: int, param: str | None = None) -> dict[str, Any]:
    response = await api.client.get(path)
    assert response.status_code == status, (path, response.text)
    error: dict[str, Any] = response.json()["error"]
    assert error["param"] == param, path
    assert error["message"]
    return error


async def submit(api: Served, record: Record | bytes | str) -> httpx.Response:
    packed = pack(record) if isinstance(record, Record) else record
    return await api.client.post("/transactions", json={"record": packed if isinstance(packed, str) else packed.hex()})


def payment(key: Key = PAYER, network: bytes = NETWORK, nonce: int = 50) -> Record:
    return make_record(key, network, Transfer(PAYEE.address, 5), nonce=nonce, fee=3)


# Blocks


async def test_blocks_newest_first() -> None:
    async with served() as api:
        page = await get(api, "/chain/T/blocks")
        places = [(block["height"], block["id"]) for block in page["data"]]
        assert places == sorted(places, reverse=True)
        assert len(places) == 3 * (CUTS + 1)
        assert page["next"] is None
        assert [(block["word"], block["cut"]) for block in page["data"]][2:5] == [
            ("tentative", None),
            ("final", CUTS),
            ("final", CUTS),
        ]
        written = {info.block.id.hex(): info.block for info in api.service.chain.written}
        for told in page["data"]:
            block = written[told["id"]]
            assert told["author"] == show_address(block.header.author)
            assert told["parents"] == [parent.hex() for parent in block.header.parents]
            assert told["anchor"] == {"k": 0, "cut": NETWORK.hex()}
            assert (told["seq"], told["chain"], told["type"]) == (block.header.seq, "T", "data")
            assert (told["records"], told["size"]) == (len(block.records), len(block.raw))
            assert told["timestamp_ms"] == block.header.timestamp_ms
        assert await get(api, "/chain/A/blocks") == {"object": "list", "data": [], "next": None}


@pytest.mark.parametrize("limit", [1, 4, 5, 12, 100])
async def test_pages_lose_and_double_nothing(limit: int) -> None:
    address = show_address(PAYER.address)
    lists: list[tuple[str, int, dict[str, Any]]] = [
        ("/chain/T/blocks", 3 * (CUTS + 1), {}),
        ("/cuts", CUTS, {}),
        ("/transactions", PAYMENTS * (CUTS + 1), {"address": address}),
    ]
    async with served() as api:
        for path, total, query in lists:
            found = await pages(api, path, limit, **query)
            assert [len(page) for page in found[:-1]] == [limit] * ((total - 1) // limit)
            whole = (await get(api, path, limit=100, **query))["data"]
            assert [item for page in found for item in page] == whole
            assert len(whole) == total


async def test_blocks_that_come_meanwhile_disturb_no_page() -> None:
    async with served() as api:
        first = await get(api, "/chain/T/blocks", limit=4)
        whole = (await get(api, "/chain/T/blocks", limit=100))["data"]
        chain = api.service.chain
        newest = type(chain.written[0])(Forge().block(STRANGER, height=99), None)
        chain.written.append(newest)
        second = await get(api, "/chain/T/blocks", limit=100, after=first["next"])
        assert first["data"] + second["data"] == whole


async def test_a_block_with_its_records() -> None:
    async with served() as api:
        chain = api.service.chain
        tentative = next(info for info in chain.written if info.cut is None and info.block.records)
        told = await get(api, f"/blocks/{tentative.block.id.hex()}")
        assert told["id"] == tentative.block.id.hex()
        assert [record["nonce"] for record in told["records"]] == list(range(12, 17))
        first, *_, last = told["records"]
        assert first == {
            "id": tentative.block.records[0].id.hex(),
            "kind": "transfer",
            "sender": show_address(PAYER.address),
            "nonce": 12,
            "fee_nano": "0",
            "expires_at_cut": None,
            "arguments": {"payee": show_address(PAYEE.address), "amount_nano": "10"},
            "word": "tentative",
            "void": None,
        }
        assert (last["void"], last["expires_at_cut"]) == (Void.INSUFFICIENT.value, 99)
        final = await get(api, f"/blocks/{chain.written[0].block.id.hex().upper()}")
        assert {record["word"] for record in final["records"]} == {"final"}


ARGUMENTS: list[tuple[Arguments, Any]] = [
    (Bond(PAYEE.address, 7), {"validator": show_address(PAYEE.address), "amount_nano": "7"}),
    (
        Layer(b"\1" * 32, 3, BlobRef(b"\2" * 32, 2**40), b"\4"),
        {"model": "01" * 32, "unit": 3, "blob": {"root": "02" * 32, "size": 2**40}, "beacon": "04"},
    ),
    (
        Manifest("tiny", '{"größe": 1}'.encode(), ("embed", "head"), BlobRef(b"\3" * 32, 9)),
        {
            "name": "tiny",
            "spec": '{"größe": 1}',
            "units": ["embed", "head"],
            "tokenizer": {"root": "03" * 32, "size": 9},
        },
    ),
]


async def test_arguments_of_every_form() -> None:
    evidence = double_block(PAYER)
    shown = {
        "fault": "double-block",
        "first": {"payload": evidence.first.payload.hex(), "signature": evidence.first.signature.hex()},
        "second": {"payload": evidence.second.payload.hex(), "signature": evidence.second.signature.hex()},
    }
    cases = [*ARGUMENTS, (evidence, shown)]
    records = [make_record(PAYER, NETWORK, arguments, nonce=0) for arguments, _ in cases]
    records += [
        sign_record(PAYER, NETWORK, kind, b"\xc1\xff", nonce=2**63 - 1, fee=10**18) for kind in ("transfer", "näh")
    ]
    async with served() as api:
        chain = api.service.chain
        block = Forge().block(records=tuple(records))
        chain.written = [type(chain.written[0])(block, None)]
        told = (await get(api, f"/blocks/{block.id.hex()}"))["records"]
        assert [each["arguments"] for each in told] == [shown for _, shown in cases] + ["c1ff", "c1ff"]
        assert [each["kind"] for each in told][-2:] == ["transfer", "näh"]
        assert (told[-1]["fee_nano"], told[-1]["nonce"]) == ("1000000000000000000", 2**63 - 1)


# Cuts, money


async def test_cuts() -> None:
    async with served() as api:
        told = (await get(api, "/cuts"))["data"]
        assert [each["k"] for each in told] == [3, 2, 1]
        assert told[0]["prev_cut"] == told[1]["id"]
        assert told[-1]["prev_cut"] == NETWORK.hex()
        decided = api.service.chain.decided[-1].cut
        assert told[0] == {
            "k": 3,
            "id": decided.id.hex(),
            "prev_cut": decided.prev_cut.hex(),
            "heads": [head.hex() for head in decided.heads],
            "prev_state_root": decided.prev_state_root.hex(),
            "round": 1,
            "signers": [show_address(address) for address in sorted(key.address for key in VALIDATORS)],
            "stake_nano": "300",
            "total_nano": "300",
        }


async def test_balance() -> None:
    async with served() as api:
        address = show_address(PAYER.address)
        paid = sum(range(10, 10 + PAYMENTS))
        told = await get(api, f"/balance/{address}")
        assert told == {
            "address": address,
            "final": {
                "k": CUTS,
                "balance_nano": str(1000 - CUTS * paid),
                "nonce": CUTS * PAYMENTS,
                "bonded_nano": "0",
                "unbonding_nano": "0",
            },
            "tentative": {
                "k": CUTS + 1,
                "balance_nano": str(1000 - (CUTS + 1) * paid),
                "nonce": (CUTS + 1) * PAYMENTS,
                "bonded_nano": "0",
                "unbonding_nano": "0",
            },
            "next_nonce": (CUTS + 1) * PAYMENTS,
            "bonds": [],
        }
        assert await get(api, f"/balance/{address.lower()}") == told
        validator = show_address(VALIDATORS[0].address)
        bonded = await get(api, f"/balance/{validator}")
        assert bonded["bonds"] == [{"validator": validator, "amount_nano": "100"}]
        assert bonded["final"]["bonded_nano"] == "100"
        stranger = await get(api, f"/balance/{show_address(STRANGER.address)}")
        assert (stranger["final"]["balance_nano"], stranger["bonds"]) == ("0", [])


async def test_transactions_of_an_address() -> None:
    async with served() as api:
        told = (await get(api, "/transactions", address=show_address(PAYEE.address)))["data"]
        assert [each["word"] for each in told] == ["tentative"] * PAYMENTS + ["final"] * CUTS * PAYMENTS
        assert [each["k"] for each in told] == [k for k in (4, 3, 2, 1) for _ in range(PAYMENTS)]
        payments = [record for info in api.service.chain.written for record in info.block.records]
        assert told[-1] == {
            "word": "final",
            "k": 1,
            "kind": "received",
            "record": payments[0].id.hex(),
            "other": show_address(PAYER.address),
            "amount_nano": "10",
            "fee_nano": "0",
            "balance_nano": "1010",
        }
        nobody = await get(api, "/transactions", address=show_address(STRANGER.address))
        assert nobody == {"object": "list", "data": [], "next": None}


async def test_where_a_record_stands() -> None:
    async with served() as api:
        records = [record for info in api.service.chain.written for record in info.block.records]
        for record, word, void in (
            (records[0], "final", None),
            (records[-2], "tentative", None),
            (records[-1], "tentative", Void.INSUFFICIENT.value),
        ):
            id = record.id.hex()
            assert await get(api, f"/transactions/{id}") == {"id": id, "word": word, "void": void}
        record = payment()
        await refused(api, f"/transactions/{record.id.hex()}", 404)
        accepted = await submit(api, record)
        assert (accepted.status_code, accepted.json()) == (202, {"id": record.id.hex(), "word": "pending"})
        assert api.service.chain.submitted == [record]
        told = await get(api, f"/transactions/{record.id.hex()}")
        assert told == {"id": record.id.hex(), "word": "pending", "void": None}


async def test_submitting_what_is_in_the_chain_tells_where_it_stands() -> None:
    async with served() as api:
        records = [record for info in api.service.chain.written for record in info.block.records]
        assert (await submit(api, records[0])).json()["word"] == "final"
        assert (await submit(api, records[-2])).json()["word"] == "tentative"


# The network


async def test_validators() -> None:
    async with served() as api:
        told = await get(api, "/validators")
        assert (told["k"], told["total_nano"], told["quorum_nano"]) == (CUTS, "300", "201")
        seats = {each["address"]: each for each in told["data"]}
        here, behind, unheard = (show_address(key.address) for key in VALIDATORS)
        assert seats[here] == {
            "address": here,
            "stake_nano": "100",
            "next_stake_nano": "100",
            "here": True,
            "connected": True,
            "behind": 0,
        }
        assert (seats[behind]["here"], seats[behind]["connected"], seats[behind]["behind"]) == (False, True, 2)
        assert (seats[unheard]["connected"], seats[unheard]["behind"]) == (False, None)
        assert told["missing"] == [unheard]
        assert told["slashed"] == []
        api.service.chain.heard[VALIDATORS[1].address] = CUTS + 5  # it is ahead of us
        seats = {each["address"]: each for each in (await get(api, "/validators"))["data"]}
        assert seats[behind]["behind"] == 0
        api.service.chain.view.final.slashed[VALIDATORS[2].address] = 1
        assert (await get(api, "/validators"))["slashed"] == [unheard]


async def test_network() -> None:
    async with served() as api:
        await submit(api, payment())
        told = await get(api, "/network")
        assert parse_genesis(told["genesis"]) == GENESIS
        assert (told["name"], told["network"], told["created_ms"]) == ("test", NETWORK.hex(), GENESIS.created_ms)
        assert told["parameters"]["cap_nano"] == str(10**18)
        assert (told["parameters"]["epoch"], told["parameters"]["min_stake_nano"]) == (10, "1")
        chain = api.service.chain
        assert told["final"] == {
            "k": CUTS,
            "cut": chain.decided[-1].cut.id.hex(),
            "state_root": chain.view.final.root().hex(),
        }
        assert (told["supply_nano"], told["pending"]) == (str(chain.view.final.supply), 1)


# What is refused


async def test_all_of_it_needs_a_key() -> None:
    async with served() as api, httpx.AsyncClient(base_url=api.url) as anonymous:
        for method, path in [*(("GET", path) for path in PATHS), ("POST", "/transactions")]:
            response = await anonymous.request(method, path)
            assert (response.status_code, response.json()["error"]["code"]) == (401, "missing_api_key"), path
            for other in ("PUT", "DELETE"):
                assert (await api.client.request(other, path)).status_code == 405, path


async def test_bad_queries() -> None:
    mine = f"address={show_address(PAYER.address)}"
    mistyped = show_address(PAYER.address).swapcase().replace("0X", "0x")
    lists = ["/chain/T/blocks?", "/cuts?", f"/transactions?{mine}&"]
    async with served() as api:
        for path in lists:
            for limit in ("0", "101", "-1", "x", "", "1.5", "٣", "1e1", "%2B1", " 1", "9" * 5000):
                await refused(api, f"{path}limit={limit}", 400, "limit")
            for after in ("", "x", "-1", "1.", ".1", "1.2.3", "9" * 19, "1" * 5000, "1.%00", f"1.{'0' * 63}g"):
                await refused(api, f"{path}after={after}", 400, "after")
        await refused(api, f"/cuts?after=1.{'00' * 32}", 400, "after")
        await refused(api, "/chain/T/blocks?after=1", 400, "after")
        for path in ("/balance/", "/transactions?address="):
            for address in ("x", "0x", "0x00", "00" * 20, "0x" + "00" * 21, mistyped):
                await refused(api, path + address, 400, "address")
        await refused(api, "/transactions", 400, "address")
        for path in ("/blocks/", "/transactions/"):
            await refused(api, path + "00" * 32, 404)
            for id in ("x", "00" * 31, "00" * 33, "0g" * 32, "0x" + "00" * 31):
                await refused(api, path + id, 400, "id")
        for chain in ("t", "X", "AB", "A%00"):
            assert (await refused(api, f"/chain/{chain}/blocks", 404))["code"] == "not_found"
        assert (await api.client.get("/cuts?after=0")).json()["data"] == []


async def test_records_that_are_refused() -> None:
    good = pack(payment())
    other = make_record(PAYER, bytes(32), Transfer(PAYEE.address, 5), nonce=0)
    forged = Record(**{**vars(payment()), "signature": payment(STRANGER).signature})
    bad: list[tuple[Any, str]] = [
        ("xyz", "hex"),
        ("0", "hex"),
        ("0x" + good.hex(), "hex"),
        (" " + good.hex(), "hex"),
        (b"\xc0", "array"),
        (b"\x81\x01\x02", "msgpack"),
        (good[:-1], "msgpack"),
        (good + b"\0", "msgpack"),
        (b"\x91" * 1000, "msgpack"),
        (pack(other), "another network"),
        (pack(forged), "did not sign"),
    ]
    async with served() as api:
        for record, why in bad:
            response = await submit(api, record)
            error = response.json()["error"]
            assert (response.status_code, error["code"], error["param"]) == (400, "refused_record", "record"), record
            assert why in error["message"], record
        assert api.service.chain.submitted == []


async def test_bodies_that_are_no_submission() -> None:
    async with served() as api:
        for body, param in (
            ({}, "record"),
            ({"record": ""}, "record"),
            ({"record": 5}, "record"),
            ({"record": "00" * (MAX_RECORD + 1)}, "record"),
            ({"record": pack(payment()).hex(), "fee": 1}, "fee"),
        ):
            response = await api.client.post("/transactions", json=body)
            assert response.status_code == 400
            assert response.json()["error"]["param"] == param
        form = await api.client.post("/transactions", data={"record": "00"})
        assert form.status_code == 415
        assert api.service.chain.submitted == []


async def test_the_largest_record_is_taken() -> None:
    async with served() as api:
        record = sign_record(
            PAYER, NETWORK, "k" * 32, bytes(MAX_ARGUMENTS), nonce=2**63 - 1, fee=2**63 - 1, expires_at_cut=2**62
        )
        assert (await submit(api, record)).status_code == 202
        assert api.service.chain.submitted == [record]


async def test_what_the_node_says_to_a_record() -> None:
    async with served() as api:
        api.service.chain.refusal = RequestError(f"would be void: {Void.NONCE_GAP.value}", param="nonce")
        response = await submit(api, payment())
        assert response.status_code == 400
        assert response.json()["error"] == {
            "message": f"would be void: {Void.NONCE_GAP.value}",
            "type": "invalid_request_error",
            "param": "record",
            "code": "refused_record",
        }
        api.service.chain.refusal = Overloaded("too many records wait here")
        full = await submit(api, payment())
        assert (full.status_code, full.json()["error"]["code"]) == (503, "overloaded")


async def test_the_client_speaks_to_every_route() -> None:
    async with served() as api:
        record = payment()

        def talk() -> None:
            with Client(api.url, TOKEN, timeout=20) as client:
                page = client.blocks("T", limit=5)
                rest = client.blocks("T", limit=100, after=page["next"])
                assert len(page["data"] + rest["data"]) == 3 * (CUTS + 1)
                blocks = [client.block(block["id"]) for block in page["data"]]
                assert [len(block["records"]) for block in blocks] == [block["records"] for block in page["data"]]
                assert client.cuts(limit=1, after="3")["data"][0]["k"] == 2
                address = show_address(PAYER.address)
                assert client.balance(address)["address"] == address
                assert len(client.transactions(address, limit=3)["data"]) == 3
                assert client.submit(pack(record).hex())["word"] == "pending"
                assert client.transaction(record.id.hex())["word"] == "pending"
                assert client.validators()["quorum_nano"] == "201"
                assert client.network()["pending"] == 1
                for wrong in ("0x12", "../status", "", "?", "%2e"):
                    with pytest.raises(NodeRefused) as caught:
                        client.balance(wrong)
                    assert caught.value.status in (400, 404)

        await trio.to_thread.run_sync(talk)
