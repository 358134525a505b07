"""The house rules of docs/design.md that a machine can check: who may import whom, and what nobody may do."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "blyan_node"
FILES = sorted(PACKAGE.rglob("*.py"))
EVERYWHERE = {"codec", "errors", "__init__"}
# Rooms and corridors, with what each may import besides its siblings, the codec and the errors. No arrow runs up.
MAY_IMPORT: dict[str, set[str]] = {
    "p2p": set(),
    "chain": set(),
    "model": set(),
    "worker": set(),
    "pulse": set(),
    "canary": set(),
    "config": set(),
    "logs": set(),
    "datadir": set(),
    "relay": {"p2p", "chain", "worker", "pulse"},
    "inference": {"p2p", "chain", "model", "worker", "relay", "pulse"},
    "learning": {"inference", "p2p", "chain", "model", "worker"},
    "api": {"inference", "relay", "chain", "datadir"},
    "chain_service": {"api", "relay", "chain"},
    "service": {"api", "chain_service", "inference", "relay", "p2p", "chain", "model", "worker"},
    "node": {
        "api",
        "chain_service",
        "service",
        "inference",
        "relay",
        "p2p",
        "chain",
        "model",
        "worker",
        "pulse",
        "canary",
        "config",
        "logs",
        "datadir",
    },
    "cli": {"config", "datadir", "node", "testnet", "api.client", "api.keys", "chain", "p2p.identity"},
    "testnet": {"config", "datadir", "node", "cli", "api.client", "chain.keys", "chain.genesis", "p2p.identity"},
    "__main__": {"cli"},
}
# Third-party modules that belong to one place.
OWNERS = {
    "libp2p": ("p2p",),
    "multiaddr": ("p2p",),
    "plyvel": ("chain.store",),
    "torch": ("model",),
    "safetensors": ("model",),
    "gguf": ("model",),
    "tokenizers": ("model",),
    "starlette": ("api",),
    "hypercorn": ("api",),
    "prometheus_client": ("api.metrics",),
    "typer": ("cli",),
}
BANNED_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "asyncio"}
BANNED_CALLS = {"eval", "exec", "torch.load", "compile", "__import__"}
LONGEST = 500


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def room_of(module: str) -> str:
    return module.partition(".")[0]


def is_within(module: str, places: set[str] | tuple[str, ...]) -> bool:
    return any(module == place or module.startswith(place + ".") for place in places)


def imports_of(tree: ast.AST) -> list[tuple[int, str]]:
    """Every imported module, with its line; `from a import b` counts as a.b where a is one of our packages."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            inside = (PACKAGE.parent / base.replace(".", "/")).is_dir()
            found += [(node.lineno, f"{base}.{alias.name}" if inside else base) for alias in node.names]
    return found


def faults_in(module: str, text: str) -> list[str]:
    tree, faults = ast.parse(text), []
    room = room_of(module)
    for line, name in imports_of(tree):
        top = name.partition(".")[0]
        if top == "blyan_node":
            target = name.removeprefix("blyan_node").removeprefix(".") or "__init__"
            known = room_of(target) in MAY_IMPORT or room_of(target) in EVERYWHERE or target.startswith("__")
            allowed = EVERYWHERE | {room} | MAY_IMPORT.get(room, set())
            if known and not target.startswith("__") and not is_within(target, allowed):
                faults.append(f"{line}: {module} may not import {target}")
        if top in BANNED_MODULES:
            faults.append(f"{line}: {module} may not use {top}")
        if top in OWNERS and not is_within(module, OWNERS[top]):
            faults.append(f"{line}: only {OWNERS[top][0]} may import {top}, not {module}")
        if top == "trio" and room in ("chain", "model"):
            faults.append(f"{line}: {room} knows no trio")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in BANNED_CALLS:
            faults.append(f"{node.lineno}: {module} may not call {ast.unparse(node.func)}")
        if isinstance(node, ast.Assert):
            faults.append(f"{node.lineno}: assert is not validation; python -O removes it")
    if (length := text.count("\n")) >= LONGEST:
        faults.append(f"{module} has {length} lines; {LONGEST} are too many")
    return faults


@pytest.mark.parametrize("path", FILES, ids=[module_of(path) for path in FILES])
def test_house_rules(path: Path) -> None:
    assert faults_in(module_of(path), path.read_text()) == []


def test_every_room_has_its_rule() -> None:
    assert {room_of(module_of(path)) for path in FILES} - set(MAY_IMPORT) <= EVERYWHERE


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("chain.dag", "import trio"),
        ("chain.dag", "from blyan_node.p2p import peers"),
        ("chain.dag", "from blyan_node import model"),
        ("model.shard", "import blyan_node.inference.route"),
        ("relay.blocks", "from blyan_node.api.app import create_app"),
        ("relay.blocks", "import libp2p.host"),
        ("chain.replica", "import plyvel"),
        ("inference.stage", "import torch"),
        ("cli.chat", "from blyan_node.p2p.host import open_host"),
        ("model.importing", "import torch\ntorch.load('x')"),
        ("p2p.rpc", "def f():\n    import pickle"),
        ("p2p.rpc", "eval('1')"),
        ("p2p.rpc", "assert True"),
        ("p2p.rpc", "x = 1\n" * 500),
    ],
)
def test_the_rules_find_what_breaks_them(module: str, text: str) -> None:
    assert faults_in(module, text)
