"""Blocks as bytes: pinned vectors, so that the encoding cannot change unnoticed, and round trips."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blyan_node.chain.block import Anchor, Header, decode_block, encode_body, peek_id
from blyan_node.chain.keys import Key
from blyan_node.chain.records import BlobRef, Layer, Manifest, make_record, sign_record
from blyan_node.chain.rules import check_in_isolation
from blyan_node.codec import MAX_INT, pack, unpack
from tests.support.chains import GENESIS, KEYS, NETWORK, Forge

VECTORS = json.loads((Path(__file__).parent / "vectors" / "chain.json").read_text())


def vectors() -> dict[str, str]:
    """What this version of the program makes of fixed input; printed by ``python -m tests.unit.test_block``."""
    owner = Key(bytes([1]) * 32)
    blob = BlobRef(bytes([5]) * 32, 1_048_577)
    manifest = make_record(
        owner, NETWORK, Manifest("tiny", b'{"family":"llama"}', ("embed", "head"), blob), nonce=0, fee=7
    )
    layer = make_record(owner, NETWORK, Layer(manifest.id, 1, blob), nonce=1)
    data = sign_record(owner, NETWORK, "data", b"\x00\xff", nonce=2, expires_at_cut=10)
    forge = Forge()
    first = forge.block(owner, records=(manifest,), chain="A", type="manifest", timestamp_ms=1_700_000_000_001)
    second = forge.block(KEYS[1], records=(layer, data), chain="B", type="layer", timestamp_ms=1_700_000_000_002)
    merge = forge.block(owner, (first.id, second.id), timestamp_ms=0)
    made = {"genesis": GENESIS.unsigned, "network": NETWORK}
    for name, record in [("manifest", manifest), ("layer", layer), ("data", data)]:
        made |= {f"{name} record": pack(record), f"{name} record id": record.id}
    for name, block in [("first", first), ("second", second), ("merge", merge)]:
        made |= {f"{name} block": block.raw, f"{name} block id": block.id}
    return {name: value.hex() for name, value in made.items()}


@pytest.mark.parametrize("name", sorted(VECTORS))
def test_pinned_vectors(name):
    assert vectors()[name] == VECTORS[name]


def test_pinned_blocks_decode():
    assert set(vectors()) == set(VECTORS)
    for name in ("first", "second", "merge"):
        raw = bytes.fromhex(VECTORS[f"{name} block"])
        block = decode_block(raw)
        check_in_isolation(block, bytes.fromhex(VECTORS["network"]))
        assert block.raw == raw
        assert block.calculate_hash() == peek_id(raw).hex() == VECTORS[f"{name} block id"]


HASHES = st.binary(min_size=32, max_size=32)
INTS = st.integers(0, MAX_INT)
HEADERS = st.builds(
    Header,
    version=INTS,
    network=HASHES,
    chain=st.sampled_from("ABT"),
    type=st.text("abcdefghij-_.", min_size=1, max_size=32),
    author=st.binary(min_size=20, max_size=20),
    seq=INTS,
    prev=st.none() | HASHES,
    parents=st.lists(HASHES, min_size=1, max_size=16).map(tuple),
    height=INTS,
    anchor=st.builds(Anchor, INTS, HASHES),
    timestamp_ms=INTS,
    body_hash=HASHES,
    body_len=INTS,
)


@given(HEADERS)
def test_headers_survive_encoding(header):
    assert unpack(Header, pack(header), most=4096) == header


@settings(deadline=None)
@given(st.lists(st.binary(max_size=50), max_size=5))
def test_blocks_survive_encoding(datas):
    records = tuple(sign_record(KEYS[0], NETWORK, "data", data, nonce=n) for n, data in enumerate(datas))
    block = Forge().block(records=records)
    again = decode_block(block.raw)
    assert again == block
    assert again.records == records
    assert again.body == encode_body(records)
    check_in_isolation(again, NETWORK)


def test_the_signature_does_not_change_the_id():
    block = Forge().block()
    assert Forge.reforge(KEYS[1], block).id == block.id


if __name__ == "__main__":
    print(json.dumps(vectors(), indent=1))  # noqa: T201
