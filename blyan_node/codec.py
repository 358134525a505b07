"""Canonical msgpack: the one encoder and decoder of everything that is hashed or sent.

Values are ints in 0..2**63-1, bytes, bools, None and arrays of these; no maps, strings, floats or extensions.
Decoding is strict: one value, nothing after it, nesting at most ``MAX_DEPTH``, and re-encoding must give the same
bytes, so one value has one encoding. Callers bound the size of the bytes before they read them.

Frozen dataclasses are arrays of their fields in order. Field types may be int, bytes, bool, str (UTF-8 bytes),
``X | None``, ``tuple[X, ...]``, ``tuple[A, B]``, other dataclasses, and ``Annotated`` with :class:`Size` (bytes, str
and tuples) or :class:`Bound` (ints). The compiled readers check every type and bound.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import msgpack

from blyan_node.errors import CodecError

MAX_DEPTH = 6
MAX_INT = 2**63 - 1

T = TypeVar("T")
Value = Any  # int | bytes | bool | None | list[Value]: mypy cannot express the recursion usefully


@dataclasses.dataclass(frozen=True)
class Size:
    """Bounds, inclusive, on the length of bytes, of a str's UTF-8 form, or of a tuple."""

    most: int
    least: int = 0


@dataclasses.dataclass(frozen=True)
class Bound:
    """Bounds, inclusive, on an int."""

    most: int
    least: int = 0


def exactly(length: int) -> Size:
    """Bounds that allow one length only."""
    return Size(length, length)


def encode(value: Value) -> bytes:
    """Encode a value; raise CodecError where it has no canonical form."""
    _check(value, 1)
    return typing.cast(bytes, msgpack.packb(value, use_bin_type=True))


def decode(data: bytes | memoryview, *, most: int) -> Value:
    """Decode exactly one canonical value of at most ``most`` bytes; raise CodecError for anything else."""
    if len(data) > most:
        raise CodecError(f"{len(data)} bytes where at most {most} are allowed")
    try:
        value = msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            max_map_len=0,
            max_ext_len=0,
            max_str_len=0,
            max_bin_len=len(data),
            max_array_len=len(data),
        )
    except (ValueError, msgpack.UnpackException, RecursionError, OverflowError) as error:
        raise CodecError(f"not msgpack of the allowed subset: {type(error).__name__}") from error
    _check(value, 1)
    if msgpack.packb(value, use_bin_type=True) != data:
        raise CodecError("not the canonical encoding of its value")
    return value


def _check(value: Value, depth: int) -> None:
    kind = type(value)
    if kind is int:
        if not 0 <= value <= MAX_INT:
            raise CodecError(f"integer {value} is outside 0..2**63-1")
    elif kind is list or kind is tuple:
        if depth > MAX_DEPTH:
            raise CodecError(f"nested deeper than {MAX_DEPTH}")
        for item in value:
            _check(item, depth + 1)
    elif not (kind is bytes or kind is bool or value is None):
        raise CodecError(f"{kind.__name__} has no canonical encoding")


def pack(message: Any) -> bytes:
    """Encode a dataclass instance as the array of its fields."""
    return encode(to_value(message))


def unpack(cls: type[T], data: bytes | memoryview, *, most: int) -> T:
    """Decode a dataclass from at most ``most`` bytes; raise CodecError where a type or a bound is broken."""
    return from_value(cls, decode(data, most=most))


def to_value(item: Any) -> Value:
    """Turn dataclasses, tuples and strings into plain values; raise CodecError for text that has no UTF-8 form."""
    if isinstance(item, str):
        try:
            return item.encode()
        except UnicodeEncodeError as error:  # half of a surrogate pair, as JSON can smuggle in
            raise CodecError("text that has no UTF-8 form") from error
    if isinstance(item, tuple | list):
        return [to_value(part) for part in item]
    if (names := _field_names(typing.cast(Any, type(item)))) is not None:
        return [to_value(getattr(item, name)) for name in names]
    return item


@cache
def _field_names(cls: type) -> tuple[str, ...] | None:
    """Return the names of a dataclass's fields in order; None for any other type."""
    if not dataclasses.is_dataclass(cls):
        return None
    return tuple(field.name for field in dataclasses.fields(cls))


def from_value(cls: type[T], value: Value) -> T:
    """Build a dataclass from a decoded array; raise CodecError where a type or a bound is broken."""
    return typing.cast(T, _reader(typing.cast(Any, cls))(value))


Reader = Callable[[Value], Any]


@cache
def _reader(hint: Any) -> Reader:
    """Compile a type hint into a function that checks a decoded value and converts it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _bounded(_reader(arguments[0]), arguments[1:])
    if origin is typing.Union or origin is types.UnionType:
        (inner,) = (part for part in arguments if part is not type(None))
        return _optional(_reader(inner))
    if origin is tuple:
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return _repeated(_reader(arguments[0]))
        return _fixed(tuple(_reader(part) for part in arguments), tuple)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint, include_extras=True)
        readers = tuple(_reader(hints[field.name]) for field in dataclasses.fields(hint))
        return _fixed(readers, lambda parts: typing.cast(Any, hint)(*parts), name=hint.__name__)
    if hint is str:
        return _text
    if hint in (int, bytes, bool):
        return _plain(hint)
    raise TypeError(f"{hint!r} cannot be a field of a message")


def _plain(kind: type) -> Reader:
    def read(value: Value) -> Any:
        if type(value) is not kind:
            raise CodecError(f"{type(value).__name__} where {kind.__name__} belongs")
        return value

    return read


def _text(value: Value) -> str:
    if type(value) is not bytes:
        raise CodecError(f"{type(value).__name__} where text belongs")
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise CodecError("text that is not UTF-8") from error


def _optional(inner: Reader) -> Reader:
    return lambda value: None if value is None else inner(value)


def _repeated(inner: Reader) -> Reader:
    def read(value: Value) -> tuple[Any, ...]:
        if type(value) is not list:
            raise CodecError(f"{type(value).__name__} where an array belongs")
        return tuple(inner(item) for item in value)

    return read


def _fixed(readers: tuple[Reader, ...], build: Callable[[list[Any]], Any], name: str = "tuple") -> Reader:
    def read(value: Value) -> Any:
        if type(value) is not list or len(value) != len(readers):
            raise CodecError(f"{name} takes an array of {len(readers)}")
        return build([reader(item) for reader, item in zip(readers, value, strict=True)])

    return read


def _bounded(inner: Reader, limits: tuple[Any, ...]) -> Reader:
    """Check bounds on the raw value, before anything is built from it."""

    def read(value: Value) -> Any:
        for limit in limits:
            measured: Any = None
            if isinstance(limit, Size) and isinstance(value, bytes | list):
                measured = len(value)
            elif isinstance(limit, Bound) and type(value) is int:
                measured = value
            if measured is not None and not limit.least <= measured <= limit.most:
                raise CodecError(f"{measured} is outside {limit.least}..{limit.most}")
        return inner(value)

    return read
