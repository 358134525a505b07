"""A net of real ``blyan-node start`` processes on loopback, with ports chosen by the system.

Everything lies under one directory: ``genesis.toml``, ``testnet.json`` (the size of the net and its settings) and
``node-0``, ``node-1``, … (data directories, each with its ``log``). A node is known to run by the lock of its data
directory, so a recycled process id is never mistaken for it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from blyan_node.api.client import CannotReach, Client, connect
from blyan_node.chain.genesis import Genesis
from blyan_node.chain.keys import load_or_create_key
from blyan_node.datadir import DataDir, Running, explained, write_whole
from blyan_node.errors import BlyanError, ConfigError, LocalError
from blyan_node.p2p.identity import peer_id_of

STAKE = 1000 * 10**9
BALANCE = 1000 * 10**9
"""Nano-BLY, of each node."""
START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 10.0
_POLL_S = 0.1

Progress = Callable[[str], None]


def _silent(_line: str) -> None:
    pass


def wait_until(condition: Callable[[], bool], *, timeout: float, what: str) -> None:
    """Poll until ``condition`` holds; LocalError, naming ``what``, after ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise LocalError(f"{what}: not within {timeout:.0f} s")
        time.sleep(_POLL_S)


class Node:
    """One daemon of the net: its directory, its process if we started it, and a client of its API."""

    def __init__(self, index: int, data_dir: Path) -> None:
        self.index, self.data_dir = index, data_dir
        self.directory = DataDir(data_dir)
        self.process: subprocess.Popen[bytes] | None = None
        self.listen = "/ip4/127.0.0.1/tcp/0"
        self._client: Client | None = None

    @property
    def client(self) -> Client:
        """A client of the running daemon; CannotReach if it does not run."""
        if self._client is None:
            self._client = connect(self.data_dir)
        return self._client

    @property
    def log(self) -> Path:
        """Where the daemon's output goes."""
        return self.data_dir / "log"

    def running(self) -> Running | None:
        """What the daemon tells, once it is up."""
        if self.process is not None:
            self.process.poll()  # reaps it, if it has ended
        return self.directory.running()

    def forget_client(self) -> None:
        """Close the client; the next use makes a new one, for the API's port may have changed."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def last_words(self) -> str:
        """The end of the daemon's log, for error messages."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return "\n".join(lines[-15:])


class Testnet:
    """Start, find, kill, restart and stop the daemons of a local net.

    ``memory_limit`` is passed to every daemon (text such as ``300MiB``), ``settings`` are further environment
    variables (``BLYAN_…``). Daemons outlive this process unless they are stopped; as a context manager it does so.
    """

    __test__ = False  # to pytest, which would collect it by its name

    def __init__(
        self,
        root: Path,
        *,
        nodes: int = 4,
        memory_limit: str | None = None,
        settings: dict[str, str] | None = None,
        progress: Progress = _silent,
    ) -> None:
        self.root = root
        self.nodes = [Node(index, root / f"node-{index}") for index in range(nodes)]
        self._memory_limit, self._settings = memory_limit, settings or {}
        self._progress = progress

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def node(self, index: int) -> Node:
        """The daemon of that number, from 0."""
        return self.nodes[index]

    def start(self) -> None:
        """Start all daemons and wait until each answers. The first one is the bootstrap peer of the others."""
        self._prepare()
        first, *others = self.nodes
        self._progress(f"Starting {len(self.nodes)} daemons under {self.root}…")
        self._spawn(first, ())
        bootstrap = self._wait_up(first).p2p
        for node in others:
            self._spawn(node, bootstrap)
        for node in others:
            self._wait_up(node)

    def kill(self, index: int) -> None:
        """Kill a daemon at once (SIGKILL)."""
        self._signal(self.nodes[index], signal.SIGKILL)
        self._wait_down(self.nodes[index], STOP_TIMEOUT_S)

    def restart(self, index: int) -> None:
        """Start a daemon that was killed or stopped, on its old p2p port, and wait until it answers."""
        node = self.nodes[index]
        others = [other.running() for other in self.nodes if other is not node]
        self._spawn(node, tuple(address for running in others if running for address in running.p2p))
        self._wait_up(node)

    def partition(self, *sides: Iterable[int]) -> None:
        """Cut all connections between the sides, within a second; nodes on no side are on one of the rest.

        Raises ConfigError for a node that does not exist, or that is on two sides.
        """
        named = [index for side in sides for index in side]
        if wrong := sorted({index for index in named if named.count(index) > 1 or index not in range(len(self.nodes))}):
            raise ConfigError(
                f"node {wrong[0]} cannot be put on a side: nodes are 0 to {len(self.nodes) - 1}, each once"
            )
        side_of = {index: number for number, side in enumerate(sides, 1) for index in side}
        peers = [peer_id_of(load_or_create_key(node.directory.key).public) for node in self.nodes]
        for node in self.nodes:
            here = side_of.get(node.index, 0)
            others = [peer for index, peer in enumerate(peers) if side_of.get(index, 0) != here]
            write_whole(node.directory.blocked, "".join(f"{peer}\n" for peer in others))

    def heal(self) -> None:
        """End a partition; nodes find each other again within seconds."""
        for node in self.nodes:
            with explained(node.directory.blocked):
                node.directory.blocked.unlink(missing_ok=True)

    def stop(self) -> list[int]:
        """Stop all daemons: SIGTERM, and SIGKILL after 10 s. Returns the numbers of those that had to be killed."""
        running = [node for node in self.nodes if node.directory.holder() is not None]
        for node in running:
            self._signal(node, signal.SIGTERM)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        killed = []
        for node in running:
            if not self._wait_down(node, max(0.0, deadline - time.monotonic())):
                self._signal(node, signal.SIGKILL)
                self._wait_down(node, STOP_TIMEOUT_S)
                killed.append(node.index)
        self.close()
        return killed

    def close(self) -> None:
        """Close the clients; daemons stay as they are."""
        for node in self.nodes:
            node.forget_client()

    def states(self) -> list[dict[str, Any]]:
        """What each daemon says about itself, as plain values."""
        return [self._state(node) for node in self.nodes]

    def serving(self) -> bool:
        """Whether every daemon serves, and sees every unit of a model served by somebody."""
        try:
            statuses = [node.client.status() for node in self.nodes]
        except CannotReach:
            return False
        return all(
            status["state"] == "serving"
            and any(model["complete"] and all(model["coverage"]) for model in status["models"])
            for status in statuses
        )

    def _state(self, node: Node) -> dict[str, Any]:
        state: dict[str, Any] = {"node": node.index, "pid": None, "state": "down", "data_dir": str(node.data_dir)}
        if (pid := node.directory.holder()) is None:
            return state
        state |= {"pid": pid, "state": "starting"}
        try:
            status = node.client.status()
        except BlyanError:
            return state
        return state | {
            "state": status["state"],
            "peer_id": status["peer_id"],
            "peers": len(status["peers"]),
            "blocks": status["blocks"],
            "heads": status["heads"],
            "api": node.client.url,
        }

    def _prepare(self) -> None:
        """Make directories, keys and the genesis, which bonds and pays all of them; keep those of an earlier start."""
        with explained(self.root):
            keys = []
            for node in self.nodes:
                if node.directory.holder() is not None:
                    raise ConfigError(
                        f"this net is already running; stop it with: blyan-node testnet down --dir {self.root}"
                    )
                node.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
                keys.append(load_or_create_key(node.directory.key))
        genesis = self.root / "genesis.toml"
        if not genesis.exists():
            stakes = {key.address: STAKE for key in keys}
            balances = {key.address: BALANCE for key in keys}
            created_ms = time.time_ns() // 1_000_000
            Genesis.make("testnet", stakes, created_ms=created_ms, balances=balances).save(genesis)
        elif (known := _read_state(self.root)) != len(self.nodes):
            raise ConfigError(
                f"{self.root} holds a net of {known} nodes, not {len(self.nodes)}; use -n {known} or another --dir"
            )
        write_whole(self.root / "testnet.json", json.dumps({"nodes": len(self.nodes)}) + "\n")

    def _spawn(self, node: Node, bootstrap: tuple[str, ...]) -> None:
        node.forget_client()
        if node.process is not None:
            node.process.wait(STOP_TIMEOUT_S)  # it ended by a signal that was not sent from here
        command = [sys.executable, "-m", "blyan_node", "start", "--data-dir", str(node.data_dir)]
        command += ["--genesis", str(self.root / "genesis.toml"), "--listen", node.listen, "--api-port", "0"]
        command += [part for address in bootstrap for part in ("--bootstrap", address)]
        if self._memory_limit:
            command += ["--memory-limit", self._memory_limit]
        with node.log.open("ab") as log:
            node.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_clean_environment() | self._settings,
                # A Ctrl-C in the terminal is for us; the daemons are stopped in order by stop().
                start_new_session=True,
            )

    def _wait_up(self, node: Node) -> Running:
        deadline = time.monotonic() + START_TIMEOUT_S
        while (running := node.running()) is None:
            if node.process is not None and node.process.poll() is not None:
                raise LocalError(f"node {node.index} ended at start; its log {node.log} says:\n{node.last_words()}")
            if time.monotonic() > deadline:
                raise LocalError(f"node {node.index} is not up after {START_TIMEOUT_S:.0f} s; see {node.log}")
            time.sleep(_POLL_S)
        node.listen = running.p2p[0].partition("/p2p/")[0]
        self._progress(f"  node {node.index} is up: {running.api}")
        return running

    def _signal(self, node: Node, number: signal.Signals) -> None:
        if (pid := node.directory.holder()) is not None:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                pass  # it has just ended

    def _wait_down(self, node: Node, timeout: float) -> bool:
        deadline = time.monotonic() + timeout
        while node.directory.holder() is not None:
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
        node.forget_client()
        if node.process is not None:
            node.process.wait()
            node.process = None
        return True


def attach(root: Path) -> Testnet:
    """Return the net that lies under a directory, running or not; ConfigError if there is none."""
    return Testnet(root, nodes=_read_state(root))


def _read_state(root: Path) -> int:
    try:
        count = json.loads((root / "testnet.json").read_text())["nodes"]
    except FileNotFoundError as error:
        raise ConfigError(f"there is no net in {root}; start one with: blyan-node testnet up") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{root}/testnet.json cannot be read; remove {root} and start again") from error
    return int(count)


def _clean_environment() -> dict[str, str]:
    """Our environment without settings meant for a node of our own; flags and ``settings`` are what counts."""
    kept = {"BLYAN_ENV", "BLYAN_TEST_MODE", "BLYAN_CACHE_DIR"}
    return {name: value for name, value in os.environ.items() if not name.startswith("BLYAN_") or name in kept}
