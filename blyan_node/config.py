"""The configuration of one node: a TOML file, overridden by the environment (``BLYAN_*``), overridden by flags.

What ``network join`` has written into the data directory comes before all of these.

It is parsed once, at start, into a frozen :class:`NodeConfig`. An unknown key, a value of the wrong type or one that
is not allowed raises ConfigError, which names the key, where it came from and what is allowed.
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs

from blyan_node.errors import ConfigError

PREFIX = "BLYAN_"
JOINED = "network.toml"
"""The file in a data directory that holds the settings of the network that was joined."""
# Read by other parts or by other programs; not settings of a node.
_OTHER_VARIABLES = frozenset({"BLYAN_CACHE_DIR", "BLYAN_CONFIG", "BLYAN_WALLET_PASSWORD"})


@dataclass(frozen=True)
class Kind:
    """How a setting is read: ``parse`` gets text, or a TOML value of one of ``types``, and raises ValueError."""

    allowed: str
    types: tuple[type, ...]
    parse: Callable[[Any], Any]


def integer(least: int, most: int) -> Kind:
    """Whole numbers from ``least`` to ``most``, inclusive."""

    def parse(value: str | int) -> int:
        number = int(value)
        if not least <= number <= most:
            raise ValueError
        return number

    return Kind(f"a whole number from {least} to {most}", (int,), parse)


def choice(*names: str) -> Kind:
    """One of a few words."""

    def parse(value: str) -> str:
        if value not in names:
            raise ValueError
        return value

    return Kind("one of " + ", ".join(names), (str,), parse)


def matching(pattern: str, allowed: str) -> Kind:
    """Text that matches a regular expression as a whole."""
    compiled = re.compile(pattern)

    def parse(value: str) -> str:
        if not compiled.fullmatch(value):
            raise ValueError
        return value

    return Kind(allowed, (str,), parse)


def several(kind: Kind) -> Kind:
    """A TOML list, or text separated by commas, of values of another kind."""

    def parse(value: str | list[Any]) -> tuple[Any, ...]:
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        if not all(type(part) in kind.types for part in value):
            raise ValueError
        return tuple(kind.parse(part) for part in value)

    return Kind(f"a list (commas in the environment), each {kind.allowed}", (list,), parse)


_UNITS = {"": 1, "B": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("B", 1000), ("iB", 1024))
}


def parse_size(value: str | int) -> int:
    """Bytes, from a number or from text such as ``512MiB`` or ``4 GB``; ValueError for anything else."""
    if isinstance(value, int):
        value = str(value)
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?i?B|)", value.strip())
    if not found or found[2] not in _UNITS:
        raise ValueError
    size = int(float(found[1]) * _UNITS[found[2]])
    if size <= 0:
        raise ValueError
    return size


def _parse_flag(value: str | bool) -> bool:
    words = {True: True, False: False, "true": True, "1": True, "false": False, "0": False}
    key = value.lower() if isinstance(value, str) else value
    if key not in words:
        raise ValueError
    return words[key]


PATH = Kind("a path", (str,), lambda value: Path(value).expanduser().absolute())
SIZE = Kind("a size such as 512MiB, 4GiB or a number of bytes", (int, str), parse_size)
FLAG = Kind("true or false", (bool,), _parse_flag)
HOST = matching(r"[A-Za-z0-9.:_-]+", "a host name or an IP address")
_ADDRESS = r"/(ip4/[0-9.]+|ip6/[0-9a-fA-F:]+|dns[46]?/[A-Za-z0-9._-]+)/tcp/\d{1,5}"
LISTEN = matching(_ADDRESS, "a multiaddr such as /ip4/0.0.0.0/tcp/4001")
REACHABLE = matching(_ADDRESS + r"(/p2p/[A-Za-z0-9]+)?", "a multiaddr such as /dns4/node.example/tcp/4001")
PEER = matching(
    _ADDRESS + r"/p2p/[A-Za-z0-9]+", "a multiaddr with a peer id, such as /ip4/10.0.0.1/tcp/4001/p2p/16Uiu2…"
)
SITE = matching(r"https?://[A-Za-z0-9.:\[\]-]+", "the origin of the API as browsers see it: https://node.example")
WALLET = matching(r"any|none|0x[0-9a-fA-F]{40}", "an address (0x and 40 hex digits), or just any or none")
NETWORK = matching(r"[0-9a-f]{64}", "the id of a network, 64 hex digits")
CHECKPOINT = matching(r"[0-9]{1,18}:[0-9a-f]{64}", "a final cut, its number and id: 1200:9f3c… (64 hex digits)")
MODEL = matching(r"\S[^,]*", "the name or id of a model")
DEVICE = matching(r"auto|cpu|cuda(:\d+)?", "auto, cpu, cuda or cuda:N")


def default_data_dir() -> Path:
    """Where a node keeps its data on this platform, unless told otherwise."""
    return Path(platformdirs.user_data_dir("blyan-node", appauthor=False))


def _setting(kind: Kind, default: Any, meaning: str) -> Any:
    return dataclasses.field(default=default, metadata={"kind": kind, "meaning": meaning})


@dataclass(frozen=True)
class NodeConfig:
    """The settings of one node. Sizes are bytes; None means no limit, or the default that the meaning tells."""

    data_dir: Path = dataclasses.field(
        default_factory=default_data_dir,
        metadata={"kind": PATH, "meaning": "everything the node keeps: keys, chain, weights"},
    )
    genesis: Path | None = _setting(  # noqa: RUF009 - a dataclasses.field, like all of these
        PATH, None, "genesis file of the network; none: the one in the data directory"
    )
    network: str | None = _setting(NETWORK, None, "id that the network must have; none: any")
    checkpoint: str | None = _setting(CHECKPOINT, None, "a final cut that the network's history must contain")
    archive: bool = _setting(FLAG, False, "keep the whole history, and replay it rather than start from a snapshot")
    listen: str = _setting(LISTEN, "/ip4/0.0.0.0/tcp/4001", "where peers connect; port 0 is chosen by the system")
    announce: tuple[str, ...] = _setting(several(REACHABLE), (), "addresses told to peers, if not those listened on")
    bootstrap: tuple[str, ...] = _setting(several(PEER), (), "peers to join the network through")
    api_host: str = _setting(HOST, "127.0.0.1", "address that the HTTP API listens on")
    api_port: int = _setting(integer(0, 65535), 8645, "port of the HTTP API; 0 is chosen by the system")
    api_names: tuple[str, ...] = _setting(several(HOST), (), "host names, besides loopback, that the API answers to")
    api_site: str | None = _setting(SITE, None, "origin that wallets sign in to; none: that of api_host and api_port")
    wallets: tuple[str, ...] = _setting(several(WALLET), ("any",), "addresses that may sign in, or any, or none")
    wallet_chain_id: int = _setting(integer(1, 10**17), 1, "chain id that wallets sign in with")
    requests_per_minute: int = _setting(integer(1, 1_000_000), 100, "requests that each API key may make in a minute")
    public_chats_per_minute: int = _setting(integer(0, 1_000_000), 0, "chats in a minute for an address without a key")
    concurrent: int = _setting(integer(1, 1024), 32, "answers that each API key may have under way")
    price_nano: int = _setting(integer(0, 10**15), 0, "price of one token, in 10^-9 BLY")
    memory_limit: int | None = _setting(SIZE, None, "most memory for weights and KV cache together")
    disk_limit: int | None = _setting(SIZE, None, "most disk space for weights")
    models: tuple[str, ...] = _setting(several(MODEL), (), "names or ids of the models to serve; none: all")
    device: str = _setting(DEVICE, "auto", "where layers run")
    dtype: str = _setting(
        choice("auto", "float32", "bfloat16", "int8", "fp8"),
        "auto",
        "what weights are kept in; auto: bfloat16 where the device computes in it, else float32",
    )
    threads: int = _setting(integer(1, 1024), 1, "threads that compute layers")
    context_limit: int | None = _setting(integer(16, 10_000_000), None, "most tokens in one session")
    log_level: str = _setting(choice("debug", "info", "warning", "error"), "info", "least severity that is logged")
    log_format: str = _setting(choice("console", "json"), "console", "form of log lines")
    env: str = _setting(choice("production", "test"), "production", "what this process is part of; shown in status")
    test_mode: bool = _setting(FLAG, False, "part of a test run; shown in status")


FIELDS = {field.name: field for field in dataclasses.fields(NodeConfig)}


@dataclass(frozen=True)
class Loaded:
    """A configuration, and for each setting where its value came from."""

    config: NodeConfig
    sources: Mapping[str, str]


def load_config(
    flags: Mapping[str, Any], environ: Mapping[str, str], file: Path | None = None, **defaults: Any
) -> Loaded:
    """Merge the sources into one configuration; ConfigError for anything that cannot be used.

    ``flags`` are command line flags by field name, None where not given. ``file`` is a TOML file; without it,
    ``BLYAN_CONFIG`` may name one. ``defaults`` replace built-in defaults.
    """
    if file is None and environ.get("BLYAN_CONFIG"):
        file = Path(environ["BLYAN_CONFIG"])
    values: dict[str, Any] = dict(defaults)
    sources = dict.fromkeys(FIELDS, "default")

    def take(key: str, value: Any, source: str, written: str) -> None:
        values[key] = _read(key, value, source, written)
        sources[key] = source

    for key, value in (_read_file(file) if file else {}).items():
        take(key, value, str(file), key)
    for name, text in environ.items():
        # An empty variable is an unset one: that is how containers and shells pass "nothing".
        if name.startswith(PREFIX) and name not in _OTHER_VARIABLES and text:
            take(name.removeprefix(PREFIX).lower(), text, "environment", name)
    for key, value in flags.items():
        if value is not None:
            take(key, value, "flag", "--" + key.replace("_", "-"))
    joined = values.get("data_dir", default_data_dir()) / JOINED
    for key, value in _read_file(joined, optional=True).items():
        if sources.get(key, "default") == "default":
            take(key, value, str(joined), key)
    return Loaded(NodeConfig(**values), sources)


def _read_file(path: Path, *, optional: bool = False) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        if optional and isinstance(error, FileNotFoundError | NotADirectoryError):
            return {}
        raise ConfigError(f"cannot read the configuration file {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def _read(key: str, value: Any, source: str, written: str) -> Any:
    """Check and convert one value; ``written`` is the key as its source spells it."""
    where = "" if source == "flag" else f" ({source})"
    if key not in FIELDS:
        raise ConfigError(f"unknown setting {written}{where}; there are: {', '.join(FIELDS)}")
    kind: Kind = FIELDS[key].metadata["kind"]
    is_text = source in ("environment", "flag") and isinstance(value, str)
    try:
        if not is_text and type(value) not in kind.types and not isinstance(value, list | tuple):
            raise ValueError
        if isinstance(value, list | tuple) and list not in kind.types:
            raise ValueError
        return kind.parse(list(value) if isinstance(value, tuple) else value)
    except ValueError as error:
        raise ConfigError(f"{written} = {value!r}{where} cannot be used; allowed: {kind.allowed}") from error


def shown(value: Any) -> str:
    """A value as `config show` prints it."""
    if value is None:
        return "-"
    if isinstance(value, tuple):
        return ", ".join(value) or "-"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)
