from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Annotated

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blyan_node.codec import MAX_DEPTH, MAX_INT, Bound, Size, decode, encode, exactly, from_value, pack, unpack
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


def canonical(data: bytes) -> tuple[bool, object]:
    """Read canonical msgpack by its definition, slowly: whether all of ``data`` is that, and the value."""
    try:
        value, rest = _read(memoryview(data), 1)
    except ValueError:
        return False, None
    return not rest, value


def _read(data: memoryview, depth: int) -> tuple[object, memoryview]:
    if not data:
        raise ValueError("cut off")
    tag, rest = data[0], data[1:]
    if tag in (0xC0, 0xC2, 0xC3):
        return {0xC0: None, 0xC2: False, 0xC3: True}[tag], rest
    if tag < 0x80:
        return tag, rest
    if 0xCC <= tag <= 0xCF:
        number, rest = _number(rest, 1 << (tag - 0xCC), (0x80, 0x100, 0x10000, 0x100000000)[tag - 0xCC])
        if number > MAX_INT:
            raise ValueError("too large")
        return number, rest
    if 0xC4 <= tag <= 0xC6:
        size, rest = _number(rest, 1 << (tag - 0xC4), (0, 0x100, 0x10000)[tag - 0xC4])
        if size > len(rest):
            raise ValueError("cut off")
        return bytes(rest[:size]), rest[size:]
    if 0x90 <= tag < 0xA0:
        count = tag - 0x90
    elif tag in (0xDC, 0xDD):
        count, rest = _number(rest, 2 if tag == 0xDC else 4, 0x10 if tag == 0xDC else 0x10000)
    else:
        raise ValueError("not of the subset")
    if depth > MAX_DEPTH:
        raise ValueError("too deep")
    items = []
    for _ in range(count):
        item, rest = _read(rest, depth + 1)
        items.append(item)
    return items, rest


def _number(data: memoryview, width: int, least: int) -> tuple[int, memoryview]:
    if len(data) < width or (number := int.from_bytes(data[:width])) < least:
        raise ValueError("cut off, or not in the shortest form")
    return number, data[width:]


@st.composite
def loosely_encoded(draw, values):
    """Encode a value in any of the forms that msgpack allows: now and then it is the canonical one."""

    def form(least: int, tags: list[tuple[int, str]]) -> bytes:
        able = [struct.pack(">B" + width, tag, least) for tag, width in tags if least < 1 << 8 * struct.calcsize(width)]
        return able[draw(st.sampled_from([0, 0, 0, 0, 0, 0, *range(len(able))]))]

    def put(value) -> bytes:
        if value is None or isinstance(value, bool):
            return msgpack.packb(value)
        if isinstance(value, int):
            if value < 0x80 and draw(st.integers(0, 6)):
                return bytes([value])
            return form(value, [(0xCC, "B"), (0xCD, "H"), (0xCE, "I"), (0xCF, "Q")])
        if isinstance(value, bytes):
            return form(len(value), [(0xC4, "B"), (0xC5, "H"), (0xC6, "I")]) + value
        short = len(value) < 16 and draw(st.integers(0, 6))
        prefix = bytes([0x90 + len(value)]) if short else form(len(value), [(0xDC, "H"), (0xDD, "I")])
        return prefix + b"".join(map(put, value))

    return put(draw(values))


ODD = st.sampled_from([b"\xa0", b"\x80", b"\xff", b"\xd0\x01", b"\xca\0\0\0\0", b"\xcb" + bytes(8), b"\xc1"])
TOO_DEEP = st.integers(0, 3).map(lambda more: b"\x91" * (MAX_DEPTH - 1 + more) + b"\x01")
PARTS = loosely_encoded(VALUES) | loosely_encoded(OUTERS.map(lambda outer: decode(pack(outer), most=1000)))
ANY_BYTES = (
    st.binary(max_size=40) | ODD | TOO_DEEP | PARTS | st.builds(lambda a, b: b"\x92" + a + b, PARTS, ODD | PARTS)
)


@given(ANY_BYTES)
def test_what_is_canonical_by_definition_decodes_and_nothing_else(data):
    is_canonical, value = canonical(data)
    if is_canonical:
        assert decode(data, most=1 << 20) == value
        assert encode(value) == data
    else:
        with pytest.raises(CodecError):
            decode(data, most=1 << 20)


@given(ANY_BYTES)
def test_a_message_is_read_where_its_canonical_value_would_be_and_nowhere_else(data):
    is_canonical, value = canonical(data)
    try:
        expected = from_value(Outer, value) if is_canonical else None
    except CodecError:
        expected = None
    if expected is None:
        with pytest.raises(CodecError):
            unpack(Outer, data, most=1 << 20)
    else:
        message = unpack(Outer, data, most=1 << 20)
        assert message == expected
        assert pack(message) == data


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


def test_a_message_that_nests_too_deep_is_our_own_mistake():
    @dataclass(frozen=True)
    class Leaf:
        value: int

    nested = Leaf
    for _ in range(MAX_DEPTH - 1):
        nested = tuple[nested, ...]  # type: ignore[misc]
    assert unpack(nested, encode([]), most=10) == ()
    with pytest.raises(TypeError):
        unpack(tuple[nested, ...], encode([]), most=10)


@pytest.mark.parametrize("value", [[b"a", True, None, [], [-1, b""]], [b"a", True, None, [], [1 << 63, b""]]])
def test_an_integer_of_a_message_is_in_the_range_of_all_integers(value):
    with pytest.raises(CodecError):
        unpack(Outer, msgpack.packb(value, use_bin_type=True), most=100)
