"""The genesis: what all nodes of a network agree on before the first block.

The genesis is not a block and nobody signs it: whoever runs a network hands out its file, and its id is the sha256 of
its canonical form. That one id names three things: the network (in every record and header), the root of the DAG (the
parent of the first blocks, at height 0) and cut 0 (what the first blocks are anchored at). So nodes of differing
genesis files cannot mix up each other's blocks.

A network that lost more than 1/3 of its stake for good decides no cut any more. It goes on as a new one, whose genesis
says so: see :mod:`blyan_node.chain.restart`. Only there the old validators sign; their signatures stand in the file,
outside the hashed form, so they can be added one by one.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, TypeVar

from blyan_node.chain.keys import parse_address, show_address
from blyan_node.chain.records import MAX_MONEY, Address, Amount, Hash, Signature
from blyan_node.codec import Bound, Size, encode, from_value, pack, to_value
from blyan_node.errors import CodecError, ConfigError, RuleError

FORMAT = 2
MAX_VALIDATORS = 100
MAX_BALANCES = 10_000
"""Such a file has about 1 MB, takes a second to read, and peers hand it to those who join."""
MAX_BARRED = 1000
MILLION = 1_000_000

V = TypeVar("V")

Money = Annotated[int, Bound(MAX_MONEY)]
_LISTS = ("validators", "balances", "signatures")


@dataclass(frozen=True)
class Parameters:
    """What a network fixes in its genesis. Amounts are in nano-BLY, periods in cuts.

    ``cap`` bounds the supply for ever. The validator set changes every ``epoch`` cuts. ``unbonding`` is how long money
    stays within reach of slashing after it was unbonded. ``min_stake`` is the least that makes a validator.
    ``slash_millionths`` of an offender's stake is burnt. A faucet gives at most ``faucet_per_record`` and
    ``faucet_per_cut``; both 0 except on test nets. Carriers ask at least ``fee_per_byte`` for each byte of a record.
    """

    cap: Money
    epoch: Annotated[int, Bound(MILLION, 1)]
    unbonding: Annotated[int, Bound(10**9, 1)]
    min_stake: Amount
    slash_millionths: Annotated[int, Bound(MILLION)]
    faucet_per_record: Money
    faucet_per_cut: Money
    fee_per_byte: Money

    def __post_init__(self) -> None:
        if self.unbonding < self.epoch + 2:
            raise ConfigError(
                f"unbonding takes {self.unbonding} cuts, but a validator decides until {self.epoch + 2} cuts after it "
                "has unbonded: it could cheat with nothing at stake. Make unbonding longer or the epoch shorter"
            )


DEVNET = Parameters(
    cap=MAX_MONEY,
    epoch=10,
    unbonding=100,
    min_stake=1,
    slash_millionths=50_000,
    faucet_per_record=1_000 * 10**9,
    faucet_per_cut=10_000 * 10**9,
    fee_per_byte=0,
)
"""For private and test nets: a faucet, no fees, short periods."""


PARAMETERS = tuple(each.name for each in fields(Parameters))


@dataclass(frozen=True)
class Validator:
    """A bonded key: it may author blocks. ``stake`` is in nano-BLY."""

    address: Address
    stake: Amount


@dataclass(frozen=True)
class Balance:
    """What an address owns from the start, in nano-BLY."""

    address: Address
    amount: Amount


@dataclass(frozen=True)
class Restart:
    """What a network continues: the old network after its cut ``k``, whose id is ``cut``.

    ``validators`` are those that would have decided cut k + 1, ``barred`` the keys that were proven to cheat.
    """

    network: Hash
    k: int
    cut: Hash
    state_root: Hash
    validators: Annotated[tuple[Validator, ...], Size(MAX_VALIDATORS, 1)]
    barred: Annotated[tuple[Address, ...], Size(MAX_BARRED)]

    @cached_property
    def stake(self) -> int:
        """The stake of all old validators, in nano-BLY."""
        return sum(validator.stake for validator in self.validators)


@dataclass(frozen=True)
class Endorsement:
    """The signature of an old validator under a restart."""

    address: Address
    signature: Signature


@dataclass(frozen=True)
class Genesis:
    """A network's beginning. Everything is sorted by address, so one beginning has one id.

    Signatures are no part of it: neither of its id nor of what makes two of them equal.
    """

    format: Annotated[int, Bound(FORMAT, FORMAT)]
    name: Annotated[str, Size(64, 1)]
    created_ms: int
    parameters: Parameters
    validators: Annotated[tuple[Validator, ...], Size(MAX_VALIDATORS, 1)]
    balances: Annotated[tuple[Balance, ...], Size(MAX_BALANCES)]
    restart: Restart | None
    signatures: Annotated[tuple[Endorsement, ...], Size(MAX_VALIDATORS)] = field(compare=False)

    @classmethod
    def make(
        cls,
        name: str,
        validators: Mapping[bytes, int],
        *,
        created_ms: int,
        parameters: Parameters = DEVNET,
        balances: Mapping[bytes, int] | None = None,
        restart: Restart | None = None,
        signatures: Mapping[bytes, bytes] | None = None,
    ) -> Genesis:
        """Make a genesis from stakes, balances and signatures by address. Raises ConfigError where it breaks a bound.

        Whether the signatures are good is not looked at here.
        """
        staked = tuple(Validator(address, stake) for address, stake in sorted(validators.items()))
        owned = tuple(Balance(address, amount) for address, amount in sorted((balances or {}).items()))
        signed = tuple(Endorsement(address, signature) for address, signature in sorted((signatures or {}).items()))
        if len(owned) > MAX_BALANCES:
            raise ConfigError(
                f"a genesis holds at most {MAX_BALANCES} balances, not {len(owned)}: whoever joins loads them all"
            )
        if signed and restart is None:
            raise ConfigError("signatures without a restart: only who ends an old network signs the beginning of a new")
        try:
            genesis = from_value(cls, to_value([FORMAT, name, created_ms, parameters, staked, owned, restart, signed]))
            pack(genesis)
        except CodecError as error:
            raise ConfigError(f"not a usable genesis: {error}") from error
        if genesis.supply > parameters.cap:
            raise ConfigError(f"the genesis hands out {genesis.supply} nano-BLY; the cap is {parameters.cap}")
        if any(stake < parameters.min_stake for stake in validators.values()):
            raise ConfigError(f"a validator has less than the least stake, {parameters.min_stake} nano-BLY")
        return genesis

    @cached_property
    def supply(self) -> int:
        """All the money that the network begins with, in nano-BLY."""
        return sum(each.stake for each in self.validators) + sum(each.amount for each in self.balances)

    @cached_property
    def unsigned(self) -> bytes:
        """The canonical form: the encoding of everything but the signatures."""
        return encode(to_value(self)[:-1])

    @cached_property
    def network(self) -> bytes:
        """The id of the network, of the root of its DAG and of cut 0: sha256 of the canonical form."""
        return hashlib.sha256(self.unsigned).digest()

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
        lines += ["", "[parameters]", *(f"{name} = {getattr(self.parameters, name)}" for name in PARAMETERS)]
        if (restart := self.restart) is not None:
            lines += ["", "[restart]", f'network = "{restart.network.hex()}"', f"k = {restart.k}"]
            lines += [f'cut = "{restart.cut.hex()}"', f'state_root = "{restart.state_root.hex()}"']
            lines.append(f"barred = {json.dumps([show_address(address) for address in restart.barred])}")
            lines += _entries(
                "restart.validators", "stake", [(each.address, each.stake) for each in restart.validators]
            )
        lines += _entries("validators", "stake", [(each.address, each.stake) for each in self.validators])
        lines += _entries("balances", "amount", [(each.address, each.amount) for each in self.balances])
        signed = [(each.address, f'"{each.signature.hex()}"') for each in self.signatures]
        lines += _entries("signatures", "signature", signed)
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
    _only(table, {"format", "name", "created_ms", "parameters", "restart", *_LISTS}, "the file")
    if (version := _get(table, "format", int)) != FORMAT:
        raise ConfigError(f"format {version} is not known to this version; it knows {FORMAT}")
    signatures = _by_address(table.get("signatures", []), "signatures", "signature", str)
    return Genesis.make(
        _get(table, "name", str),
        _by_address(_get(table, "validators", list), "validators", "stake", int),
        created_ms=_get(table, "created_ms", int),
        parameters=read_parameters(_get(table, "parameters", dict)),
        balances=_by_address(table.get("balances", []), "balances", "amount", int),
        restart=_read_restart(_get(table, "restart", dict)) if "restart" in table else None,
        signatures={address: _bytes(text, "signature") for address, text in signatures.items()},
    )


def read_parameters(table: dict[str, Any]) -> Parameters:
    """Read the table ``[parameters]``. Raises ConfigError."""
    _only(table, set(PARAMETERS), "parameters")
    return Parameters(**{name: _get(table, name, int) for name in PARAMETERS})


def _read_restart(table: dict[str, Any]) -> Restart:
    _only(table, {"network", "k", "cut", "state_root", "barred", "validators"}, "restart")
    stakes = _by_address(_get(table, "validators", list), "restart.validators", "stake", int)
    return Restart(
        _bytes(_get(table, "network", str), "restart.network"),
        _get(table, "k", int),
        _bytes(_get(table, "cut", str), "restart.cut"),
        _bytes(_get(table, "state_root", str), "restart.state_root"),
        tuple(Validator(address, stake) for address, stake in sorted(stakes.items())),
        tuple(sorted({_address(text) for text in _get(table, "barred", list)})),
    )


def _by_address(entries: Any, table: str, name: str, kind: type[V]) -> dict[bytes, V]:
    """Read ``[[table]]`` entries of an address and one more value."""
    values: dict[bytes, V] = {}
    for entry in entries if isinstance(entries, list) else [None]:
        if not isinstance(entry, dict):
            raise ConfigError(f"{table} takes tables: write [[{table}]]")
        _only(entry, {"address", name}, f"an entry of {table}")
        address = _address(_get(entry, "address", str))
        if address in values:
            raise ConfigError(f"{show_address(address)} is listed twice in {table}")
        values[address] = _get(entry, name, kind)
    return values


def _address(text: Any) -> bytes:
    try:
        return parse_address(text if isinstance(text, str) else repr(text))
    except RuleError as error:
        raise ConfigError(str(error)) from error


def _bytes(text: str, name: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError as error:
        raise ConfigError(f"{name} takes hex digits, not {text[:80]!r}") from error


def _entries(table: str, name: str, values: list[tuple[bytes, Any]]) -> list[str]:
    """Return the lines of ``[[table]]`` entries of an address and one more value."""
    lines = []
    for address, value in values:
        lines += ["", f"[[{table}]]", f'address = "{show_address(address)}"', f"{name} = {value}"]
    return lines


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
