"""The genesis: what all nodes of a network agree on before the first block.

The genesis is not a block and nobody signs it: whoever runs a network hands out its file, and its id is the sha256 of
its canonical form. That one id names three things: the network (in every record and header), the root of the DAG (the
parent of the first blocks, at height 0) and cut 0 (what the first blocks are anchored at). So nodes of differing
genesis files cannot mix up each other's blocks.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from blyan_node.chain.keys import parse_address, show_address
from blyan_node.chain.records import Address
from blyan_node.codec import Bound, Size, from_value, pack, to_value
from blyan_node.errors import CodecError, ConfigError, RuleError

FORMAT = 1
MAX_STAKE = 10**18
MAX_VALIDATORS = 100


@dataclass(frozen=True)
class Validator:
    """A bonded key: it may author blocks. ``stake`` is in nano-BLY."""

    address: Address
    stake: Annotated[int, Bound(MAX_STAKE, 1)]


@dataclass(frozen=True)
class Genesis:
    """The parameters of a network; validators are sorted by address, so one set has one id."""

    format: Annotated[int, Bound(FORMAT, FORMAT)]
    name: Annotated[str, Size(64, 1)]
    created_ms: int
    validators: Annotated[tuple[Validator, ...], Size(MAX_VALIDATORS, 1)]

    @classmethod
    def make(cls, name: str, validators: dict[bytes, int], *, created_ms: int) -> Genesis:
        """Make a genesis from stakes by address. Raises ConfigError where it breaks a bound."""
        ordered = tuple(Validator(address, stake) for address, stake in sorted(validators.items()))
        try:
            genesis = from_value(cls, to_value([FORMAT, name, created_ms, ordered]))
            pack(genesis)
        except CodecError as error:
            raise ConfigError(f"not a usable genesis: {error}") from error
        if sum(validators.values()) > MAX_STAKE:
            raise ConfigError(f"the stakes of a genesis add up to at most {MAX_STAKE} nano-BLY")
        return genesis

    @cached_property
    def network(self) -> bytes:
        """The id of the network, of the root of its DAG and of cut 0: sha256 of the canonical form."""
        return hashlib.sha256(pack(self)).digest()

    @cached_property
    def bonded(self) -> frozenset[bytes]:
        """The addresses that may author blocks."""
        return frozenset(validator.address for validator in self.validators)

    def to_toml(self) -> str:
        """Return the text of the genesis file."""
        lines = [
            f"format = {self.format}",
            f"name = {_quoted(self.name)}",
            f"created_ms = {self.created_ms}",
        ]
        for validator in self.validators:
            address = show_address(validator.address)
            lines += ["", "[[validators]]", f'address = "{address}"', f"stake = {validator.stake}"]
        return "\n".join(lines) + "\n"

    def save(self, path: Path) -> None:
        """Write the genesis file."""
        path.write_text(self.to_toml(), encoding="utf-8")


def load_genesis(path: Path) -> Genesis:
    """Read a genesis file. Raises ConfigError that names the file and the fault."""
    try:
        return parse_genesis(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the genesis file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"the genesis file {path} is not UTF-8 text") from error
    except ConfigError as error:
        raise ConfigError(f"the genesis file {path}: {error}") from error


def parse_genesis(text: str) -> Genesis:
    """Parse the text of a genesis file. Raises ConfigError."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"not TOML: {error}") from error
    _only(table, {"format", "name", "created_ms", "validators"}, "the file")
    if (version := _get(table, "format", int)) != FORMAT:
        raise ConfigError(f"format {version} is not known to this version; it knows {FORMAT}")
    stakes: dict[bytes, int] = {}
    for entry in _get(table, "validators", list):
        if not isinstance(entry, dict):
            raise ConfigError("validators takes tables: write [[validators]]")
        _only(entry, {"address", "stake"}, "a validator")
        try:
            address = parse_address(_get(entry, "address", str))
        except RuleError as error:
            raise ConfigError(str(error)) from error
        if address in stakes:
            raise ConfigError(f"{show_address(address)} is listed twice")
        stakes[address] = _get(entry, "stake", int)
    return Genesis.make(_get(table, "name", str), stakes, created_ms=_get(table, "created_ms", int))


def _quoted(text: str) -> str:
    """Return a TOML basic string: JSON's, but TOML forbids a bare DEL and surrogate pairs."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _get(table: dict[str, Any], name: str, kind: type) -> Any:
    if name not in table:
        raise ConfigError(f"{name} is missing")
    if type(table[name]) is not kind:
        raise ConfigError(f"{name} takes {kind.__name__}, not {table[name]!r}")
    return table[name]


def _only(table: dict[str, Any], names: set[str], where: str) -> None:
    if unknown := sorted(set(table) - names):
        raise ConfigError(f"{where} has unknown names: {', '.join(unknown)}")
