from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blyan_node.codec import MAX_DEPTH, MAX_INT, Bound, Size, decode, encode, exactly, pack, unpack
from blyan_node.errors import CodecError

SCALARS = st.none() | st.booleans() | st.integers(0, MAX_INT) | st.binary(max_size=300)


def _nested(depth: int) -> st.SearchStrategy:
    return SCALARS if depth == 0 else SCALARS | st.lists(_nested(depth - 1), max_size=5)


VALUES = _nested(MAX_DEPTH)


@dataclass(frozen=True)
class Inner:
    root: Annotated[bytes, exactly(4)]
    size: Annotated[int, Bound(100)]


@dataclass(frozen=True)
class Outer:
    name: Annotated[str, Size(8, 1)]
    flag: bool
    maybe: Inner | None
    many: Annotated[tuple[Inner, ...], Size(3)]
    pair: tuple[int, bytes]


INNERS = st.builds(Inner, st.binary(min_size=4, max_size=4), st.integers(0, 100))
OUTERS = st.builds(
    Outer,
    st.text(min_size=1, max_size=2),
    st.booleans(),
    st.none() | INNERS,
    st.lists(INNERS, max_size=3).map(tuple),
    st.tuples(st.integers(0, MAX_INT), st.binary(max_size=9)),
)


@given(VALUES)
def test_a_value_survives_encoding(value):
    assert decode(encode(value), most=1 << 20) == value


@given(OUTERS)
def test_a_message_survives_packing(message):
    assert unpack(Outer, pack(message), most=1 << 20) == message


@given(st.binary(max_size=400))
def test_any_bytes_decode_canonically_or_raise_codec_error(data):
    try:
        value = decode(data, most=400)
    except CodecError:
        return
    assert encode(value) == data


@given(OUTERS, st.data())
def test_a_mutated_message_is_another_message_or_raises_codec_error(message, data):
    raw = bytearray(pack(message))
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    try:
        other = unpack(Outer, bytes(raw), most=1 << 20)
    except CodecError:
        return
    assert other != message
    assert pack(other) == bytes(raw)


@given(VALUES, st.binary(min_size=1, max_size=3))
def test_nothing_may_follow_or_be_cut_off(value, more):
    raw = encode(value)
    for wrong in (raw + more, raw[:-1]):
        with pytest.raises(CodecError):
            decode(wrong, most=1 << 20)


@pytest.mark.parametrize(
    "raw",
    [
        b"\xcc\x01",  # 1 in two bytes
        b"\xcd\x00\xff",  # 255 in three
        b"\xcf" + bytes(7) + b"\x01",  # 1 in nine
        b"\xd0\x01",  # a signed 1
        b"\xff",  # -1
        b"\xcf" + b"\xff" * 8,  # 2**64 - 1
        b"\xc5\x00\x01a",  # one byte with a two-byte length
        b"\xdc\x00\x01\x01",  # an array of one with a two-byte length
        b"\xa1a",  # a string
        b"\x80",  # a map
        b"\xcb" + bytes(8),  # a float
        b"\xd4\x01\x00",  # an extension
        b"\xd6\xff" + bytes(4),  # a timestamp
        b"\xc1",  # never used
        b"\xdd\xff\xff\xff\xff",  # an array of four billion
        b"\xc6\xff\xff\xff\xff",  # bytes of four gigabytes
        b"",
    ],
)
def test_what_is_not_canonical_is_refused(raw):
    with pytest.raises(CodecError):
        decode(raw, most=100)


@pytest.mark.parametrize("value", [-1, MAX_INT + 1, 0.5, "text", {1: 2}, {1}, [0.5], bytearray(b"a")])
def test_what_has_no_canonical_form_is_not_encoded(value):
    with pytest.raises(CodecError):
        encode(value)


def test_depth_is_bounded():
    deep: list = []
    for _ in range(MAX_DEPTH - 1):
        deep = [deep]
    assert decode(encode(deep), most=100) == deep
    with pytest.raises(CodecError):
        encode([deep])
    with pytest.raises(CodecError):
        decode(msgpack.packb([deep]), most=100)
    with pytest.raises(CodecError):
        decode(b"\x91" * 100_000, most=100_000)


def test_size_is_bounded_before_decoding():
    assert decode(encode(bytes(98)), most=100)
    with pytest.raises(CodecError, match="at most 99"):
        decode(encode(bytes(98)), most=99)


GOOD = [b"a", True, [b"root", 5], [[b"root", 5]], [1, b"x"]]


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (0, b""),
        (0, b"123456789"),
        (0, b"\xff"),
        (0, 1),
        (1, 1),
        (1, None),
        (2, [b"roots", 5]),
        (2, [b"root", 101]),
        (2, [b"root", True]),
        (2, [b"root"]),
        (2, [b"root", 5, 5]),
        (2, b"root"),
        (3, [[b"root", 5]] * 4),
        (3, None),
        (3, [None]),
        (4, [1]),
        (4, [b"x", 1]),
    ],
)
def test_each_field_is_checked(at, value):
    assert unpack(Outer, encode(GOOD), most=100)
    wrong = list(GOOD)
    wrong[at] = value
    with pytest.raises(CodecError):
        unpack(Outer, encode(wrong), most=100)


def test_text_without_a_utf8_form_is_not_packed():
    with pytest.raises(CodecError):
        pack(Outer("\ud800", True, None, (), (1, b"")))


def test_a_field_of_an_unknown_type_is_our_own_mistake():
    @dataclass(frozen=True)
    class Wrong:
        value: float

    with pytest.raises(TypeError):
        unpack(Wrong, encode([1]), most=10)
