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
    _check(value)
    return _pack(value)


def decode(data: bytes | memoryview, *, most: int) -> Value:
    """Decode exactly one canonical value of at most ``most`` bytes; raise CodecError for anything else."""
    value = _parse(data, most)
    _check(value)
    _check_canonical(value, data)
    return value


def pack(message: Any) -> bytes:
    """Encode a dataclass instance as the array of its fields; raise CodecError where it has no canonical form."""
    return _pack(to_value(message))


def unpack(cls: type[T], data: bytes | memoryview, *, most: int) -> T:
    """Decode a dataclass from at most ``most`` bytes; raise CodecError where a type or a bound is broken.

    The same as :func:`from_value` of :func:`decode`, in one pass: what a reader takes is of the subset.
    """
    value = _parse(data, most)
    message = _reader(typing.cast(Any, cls))(value)
    _check_canonical(value, data)
    return typing.cast(T, message)


def _pack(value: Value) -> bytes:
    return typing.cast(bytes, msgpack.packb(value, use_bin_type=True))


def _parse(data: bytes | memoryview, most: int) -> Value:
    """Parse what may be more than the subset (floats and empty strings, say), in any encoding."""
    if len(data) > most:
        raise CodecError(f"{len(data)} bytes where at most {most} are allowed")
    try:
        return msgpack.unpackb(
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


def _check_canonical(value: Value, data: bytes | memoryview) -> None:
    if _pack(value) != data:
        raise CodecError("not the canonical encoding of its value")


def _check(value: Value, depth: int = 1) -> None:
    kind = type(value)
    if kind is int:
        if not 0 <= value <= MAX_INT:
            raise CodecError(f"integer {value} is outside 0..2**63-1")
    elif kind is list or kind is tuple:
        if depth > MAX_DEPTH:
            raise CodecError(f"nested deeper than {MAX_DEPTH}")
        for item in value:
            if type(item) is not bytes:  # most are: spares a call
                _check(item, depth + 1)
    elif not (kind is bytes or kind is bool or value is None):
        raise CodecError(f"{kind.__name__} has no canonical encoding")


def to_value(item: Any, depth: int = 1) -> Value:
    """Turn dataclasses, tuples and strings into plain values; raise CodecError for what has no canonical form."""
    kind: Any = type(item)
    if kind is bytes:
        return item
    if isinstance(item, str):
        try:
            return item.encode()
        except UnicodeEncodeError as error:  # half of a surrogate pair, as JSON can smuggle in
            raise CodecError("text that has no UTF-8 form") from error
    if isinstance(item, tuple | list):
        parts = item
    elif (names := _field_names(kind)) is not None:
        parts = [getattr(item, name) for name in names]
    else:
        _check(item)
        return item
    if depth > MAX_DEPTH:
        raise CodecError(f"nested deeper than {MAX_DEPTH}")
    return [part if type(part) is bytes else to_value(part, depth + 1) for part in parts]


@cache
def _field_names(cls: Any) -> tuple[str, ...] | None:
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
    """Compile the type of a message. Its arrays may not nest deeper than ``MAX_DEPTH``: TypeError, our own mistake."""
    if _depth(hint) > MAX_DEPTH:
        raise TypeError(f"{hint!r} nests deeper than {MAX_DEPTH}")
    return _compile(hint)


def _compile(hint: Any, limits: tuple[Any, ...] = ()) -> Reader:
    """Compile a type hint and its bounds into a function that checks a parsed value and converts it.

    Whatever a reader takes is of the canonical subset, and bounds are checked before anything is built.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _compile(arguments[0], (*limits, *arguments[1:]))
    if origin is typing.Union or origin is types.UnionType:
        (inner,) = (part for part in arguments if part is not type(None))
        return _optional(_compile(inner, limits))
    if hint is int:
        return _integer(*_limits(limits, Bound, MAX_INT))
    size = _limits(limits, Size, MAX_INT)
    if hint is bytes:
        return _bytes(*size)
    if hint is str:
        return _text(_bytes(*size))
    if hint is bool:
        return _bool
    if origin is tuple:
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return _repeated(_compile(arguments[0]), *size)
        return _fixed(tuple(_compile(part) for part in arguments), lambda *parts: parts, "tuple")
    if (parts := _fields(hint)) is not None:
        return _fixed(tuple(_compile(part) for part in parts), hint, hint.__name__)
    raise TypeError(f"{hint!r} cannot be a field of a message")


def _fields(hint: Any) -> list[Any] | None:
    """Return the types of a dataclass's fields; None for another type."""
    if not isinstance(hint, type) or (names := _field_names(hint)) is None:
        return None
    hints = typing.get_type_hints(hint, include_extras=True)
    return [hints[name] for name in names]


def _depth(hint: Any) -> int:
    """Return how deep the arrays of a type nest."""
    is_array = typing.get_origin(hint) is tuple
    if (parts := _fields(hint)) is not None:
        is_array = True
    else:
        parts = [part for part in typing.get_args(hint) if not isinstance(part, Size | Bound)]
    return is_array + max(map(_depth, parts), default=0)


def _limits(limits: tuple[Any, ...], kind: type[Size | Bound], most: int) -> tuple[int, int]:
    """Return the least and the most that all bounds of a kind allow."""
    chosen = [limit for limit in limits if isinstance(limit, kind)]
    return max([0, *(limit.least for limit in chosen)]), min([most, *(limit.most for limit in chosen)])


def _integer(least: int, most: int) -> Reader:
    def read(value: Value) -> int:
        if type(value) is not int:
            raise CodecError(f"{type(value).__name__} where int belongs")
        if not least <= value <= most:
            raise CodecError(f"{value} is outside {least}..{most}")
        return value

    return read


def _bytes(least: int, most: int) -> Reader:
    def read(value: Value) -> bytes:
        if type(value) is not bytes:
            raise CodecError(f"{type(value).__name__} where bytes belong")
        if not least <= len(value) <= most:
            raise CodecError(f"{len(value)} is outside {least}..{most}")
        return value

    return read


def _text(utf8: Reader) -> Reader:
    def read(value: Value) -> str:
        try:
            return typing.cast(bytes, utf8(value)).decode()
        except UnicodeDecodeError as error:
            raise CodecError("text that is not UTF-8") from error

    return read


def _bool(value: Value) -> bool:
    if type(value) is not bool:
        raise CodecError(f"{type(value).__name__} where bool belongs")
    return value


def _optional(inner: Reader) -> Reader:
    return lambda value: None if value is None else inner(value)


def _repeated(inner: Reader, least: int, most: int) -> Reader:
    def read(value: Value) -> tuple[Any, ...]:
        if type(value) is not list:
            raise CodecError(f"{type(value).__name__} where an array belongs")
        if not least <= len(value) <= most:
            raise CodecError(f"{len(value)} is outside {least}..{most}")
        return tuple(map(inner, value))

    return read


def _fixed(readers: tuple[Reader, ...], build: Callable[..., Any], name: str) -> Reader:
    count = len(readers)

    def read(value: Value) -> Any:
        if type(value) is not list or len(value) != count:
            raise CodecError(f"{name} takes an array of {count}")
        return build(*[reader(item) for reader, item in zip(readers, value, strict=True)])

    return read
