from __future__ import annotations

import hashlib
import random
import re

import pytest

from blyan_node.chain.catalog import Catalog, Entry
from blyan_node.chain.records import BlobRef, Layer, Manifest, Record, make_record, sign_record
from blyan_node.errors import CodecError
from tests.support.chains import KEYS, NETWORK

OWNER, OTHER = KEYS[:2]
BLOB = BlobRef(b"\7" * 32, 7)
MANIFEST = Manifest("model", b'{"family":"llama"}', ("embed", "layer.0", "head"), BLOB)
MODEL = make_record(OWNER, NETWORK, MANIFEST, nonce=0)


def blob(number: int) -> BlobRef:
    return BlobRef(bytes([number]) * 32, number)


def layer(unit: int, number: int, nonce: int, key=OWNER, model: bytes = MODEL.id) -> Record:
    return make_record(key, NETWORK, Layer(model, unit, blob(number)), nonce=nonce)


def fold(*records: Record) -> Catalog:
    entries = [Entry(height, bytes([height]) * 32, 0, record) for height, record in enumerate(records)]
    random.Random(1).shuffle(entries)
    return Catalog(entries)


def test_a_manifest_and_its_layers_make_a_model():
    catalog = fold(MODEL, layer(0, 1, 1), layer(1, 2, 2))
    (model,) = catalog.models()
    assert (model.id, model.name, model.owner) == (MODEL.id, "model", OWNER.address)
    assert (model.spec, model.units, model.tokenizer) == (MANIFEST.spec, MANIFEST.units, BLOB)
    assert model.layers == {0: blob(1), 1: blob(2)}
    assert not model.complete
    catalog = fold(MODEL, layer(0, 1, 1), layer(1, 2, 2), layer(2, 3, 3))
    (model,) = catalog.models()
    assert model.complete
    assert model.version == hashlib.sha256(MODEL.id + b"\1" * 32 + b"\2" * 32 + b"\3" * 32).digest()
    assert catalog.model(MODEL.id) == model
    assert catalog.model(bytes(32)) is None
    assert catalog.next_nonce(OWNER.address) == 4
    assert catalog.next_nonce(OTHER.address) == 0


@pytest.mark.parametrize(
    ("records", "bad", "reason"),
    [
        ((MODEL,), layer(0, 1, 1, key=OTHER), "only the owner"),
        ((MODEL,), layer(3, 1, 1), "unit 3 of a model of 3"),
        ((MODEL,), layer(0, 1, 1, model=bytes(32)), "no manifest"),
        ((MODEL, layer(0, 1, 5)), layer(0, 2, 3), "later record"),
        ((MODEL, layer(0, 1, 5)), layer(1, 2, 5), "used nonce 5 before"),
        ((), sign_record(OWNER, NETWORK, "manifest", b"\xff", nonce=0), "canonical|msgpack|int"),
        ((), sign_record(OWNER, NETWORK, "delta", b"", nonce=0), "unknown kind"),
        (
            (),
            make_record(OWNER, NETWORK, Manifest("twice", b"", ("a", "a"), BLOB), nonce=0),
            "two units",
        ),
    ],
)
def test_what_means_nothing_is_ignored_with_a_reason(records, bad, reason):
    catalog = fold(*records, bad)
    assert catalog.models() == fold(*records).models()
    assert re.search(reason, catalog.reason(bad.id))
    assert [catalog.reason(record.id) for record in records] == [None] * len(records)


def test_a_layer_before_its_manifest_is_ignored():
    early = layer(0, 1, 1)
    catalog = fold(early, MODEL)
    assert catalog.models()[0].layers == {}
    assert "no manifest" in catalog.reason(early.id)


def test_the_owner_replaces_a_layer_by_a_later_record_wherever_it_stands():
    old, new = layer(0, 1, 1), layer(0, 2, 2)
    versions = set()
    for records in [(old, new), (new, old), (old, new, old), (old, old, new)]:
        catalog = fold(MODEL, *records)
        assert catalog.models()[0].layers == {0: blob(2)}
        versions.add(catalog.models()[0].version)
    assert len(versions) == 1
    assert versions != {fold(MODEL, old).models()[0].version}


def test_a_record_carried_in_twice_counts_once():
    catalog = fold(MODEL, layer(0, 1, 1), MODEL, layer(0, 1, 1))
    assert len(catalog.models()) == 1
    assert catalog.reason(MODEL.id) is None
    assert catalog.models()[0].layers == {0: blob(1)}


def test_names_are_not_unique_and_ids_are():
    again = make_record(OTHER, NETWORK, MANIFEST, nonce=0)
    assert [model.owner for model in fold(MODEL, again).models()] == [OWNER.address, OTHER.address]


@pytest.mark.parametrize(
    "arguments",
    [
        Manifest("", b"", ("a",), BLOB),
        Manifest("x" * 129, b"", ("a",), BLOB),
        Manifest("m", bytes(8 * 1024 + 1), ("a",), BLOB),
        Manifest("m", b"", (), BLOB),
        Manifest("m", b"", tuple(map(str, range(1025))), BLOB),
        Manifest("m", b"", ("x" * 65,), BLOB),
        Manifest("m", b"", ("a",), BlobRef(bytes(31), 1)),
        Manifest("m", b"", ("a",), BlobRef(bytes(32), 2**40 + 1)),
        Layer(bytes(31), 0, BLOB),
        Layer(bytes(32), 1024, BLOB),
        Layer(bytes(32), -1, BLOB),
    ],
)
def test_what_nobody_could_read_is_not_signed(arguments):
    with pytest.raises(CodecError):
        make_record(OWNER, NETWORK, arguments, nonce=0)


def test_the_largest_manifest_fits_a_record():
    largest = Manifest("m" * 128, bytes(8 * 1024), tuple(f"{n:064}" for n in range(1024)), BLOB)
    assert make_record(OWNER, NETWORK, largest, nonce=0).parsed() == largest
