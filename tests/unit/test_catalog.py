from __future__ import annotations

import hashlib

import pytest

from blyan_node.chain.catalog import Catalog
from blyan_node.chain.records import BlobRef, Layer, Manifest, Record, make_record
from blyan_node.chain.state import State
from blyan_node.errors import CodecError
from tests.support.chains import KEYS, NETWORK
from tests.support.money import carry, cut, start

OWNER, OTHER = KEYS[:2]
BLOB = BlobRef(b"\7" * 32, 7)
MANIFEST = Manifest("model", b'{"family":"llama"}', ("embed", "layer.0", "head"), BLOB)
MODEL = make_record(OWNER, NETWORK, MANIFEST, nonce=0)


def blob(number: int) -> BlobRef:
    return BlobRef(bytes([number]) * 32, number)


def layer(unit: int, number: int, nonce: int) -> Record:
    return make_record(OWNER, NETWORK, Layer(MODEL.id, unit, blob(number)), nonce=nonce)


def fold(*records: Record) -> State:
    folded = cut(start(), *map(carry, records))
    assert {result.void for result in folded.results} <= {None}
    return folded.state


def test_a_state_without_models_has_an_empty_catalog():
    catalog = Catalog(start())
    assert catalog.models() == ()
    assert catalog.blobs() == set()


def test_a_manifest_and_its_layers_make_a_model():
    (model,) = Catalog(fold(MODEL, layer(1, 2, 1), layer(0, 1, 2))).models()
    assert (model.id, model.name, model.owner) == (MODEL.id, "model", OWNER.address)
    assert (model.spec, model.units, model.tokenizer) == (MANIFEST.spec, MANIFEST.units, BLOB)
    assert list(model.layers.items()) == [(0, blob(1)), (1, blob(2))]
    assert not model.complete
    catalog = Catalog(fold(MODEL, layer(0, 1, 1), layer(1, 2, 2), layer(2, 3, 3)))
    (model,) = catalog.models()
    assert model.complete
    assert model.version == hashlib.sha256(MODEL.id + b"\1" * 32 + b"\2" * 32 + b"\3" * 32).digest()
    assert catalog.model(MODEL.id) == model
    assert catalog.model(bytes(32)) is None
    assert catalog.blobs() == {BLOB, blob(1), blob(2), blob(3)}


def test_replacing_a_layer_makes_another_version_of_the_same_model():
    state = fold(MODEL, *(layer(unit, 1, 1 + unit) for unit in range(3)))
    (before,) = Catalog(state).models()
    (after,) = Catalog(cut(state, carry(layer(1, 9, 4))).state).models()
    assert before.layers == {0: blob(1), 1: blob(1), 2: blob(1)}
    assert after.layers == {0: blob(1), 1: blob(9), 2: blob(1)}
    assert before.id == after.id
    assert before.version != after.version


def test_a_catalog_stays_as_it_was_when_the_state_moves_on():
    state = fold(MODEL)
    catalog = Catalog(state)
    cut(state, carry(layer(0, 1, 1)))
    state.models.clear()
    assert [model.layers for model in catalog.models()] == [{}]


def test_names_are_not_unique_and_ids_are():
    again = make_record(OTHER, NETWORK, MANIFEST, nonce=0)
    assert [model.owner for model in Catalog(fold(MODEL, again)).models()] == [OWNER.address, OTHER.address]
    assert [model.owner for model in Catalog(fold(again, MODEL)).models()] == [OTHER.address, OWNER.address]


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
        Layer(bytes(32), 0, BLOB, bytes(257)),
    ],
)
def test_what_nobody_could_read_is_not_signed(arguments):
    with pytest.raises(CodecError):
        make_record(OWNER, NETWORK, arguments, nonce=0)


def test_the_largest_manifest_fits_a_record():
    largest = Manifest("m" * 128, bytes(8 * 1024), tuple(f"{n:064}" for n in range(1024)), BLOB)
    assert make_record(OWNER, NETWORK, largest, nonce=0).parsed() == largest
