"""How long a new node takes to catch up, beside what its bytes and signatures alone would take in the same run.

    python -m benchmarks.catchup [--blocks 100000] [--per-cut 20]

A chain of blocks with one payment each, and a final cut for every ``--per-cut`` of them, lies in one process; a fresh
replica in another fetches all of it over libp2p on loopback, checks every signature and certificate, folds every cut
and ends with the same state root. Beside it: the same number of bytes through one stream of the same host, plus
checking the same number of signatures and nothing else.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import trio

from benchmarks._common import load_average, table
from blyan_node.chain.candidates import Candidates
from blyan_node.chain.cut import PRECOMMIT, Certificate, Cut, Signed, sign_vote
from blyan_node.chain.genesis import Genesis
from blyan_node.chain.keys import Key, address_of, digest, recover
from blyan_node.chain.records import Transfer, make_record
from blyan_node.chain.replica import Replica
from blyan_node.p2p.framing import FrameReader, frame
from blyan_node.p2p.host import open_host
from blyan_node.p2p.transport import Stream
from blyan_node.relay.blocks import Relay
from blyan_node.worker import Thread

KEYS = [Key(bytes([number]) * 32) for number in range(1, 5)]
BULK = "/bench/bulk/1"
LOOPBACK = "/ip4/127.0.0.1/tcp/0"
PIECE = 1 << 20


def genesis() -> Genesis:
    balances = {key.address: 10**15 for key in KEYS}
    return Genesis.make("benchmark", {key.address: 10 for key in KEYS}, created_ms=0, balances=balances)


def write(replica: Replica, blocks: int, per_cut: int) -> int:
    """Write a chain; return how many signatures its reader has to check."""
    candidates, signatures = Candidates(replica), 0
    for number in range(blocks):
        key, nonce = KEYS[number % len(KEYS)], number // len(KEYS)
        record = make_record(key, replica.genesis.network, Transfer(bytes(19) + b"\1", 1), nonce=nonce)
        replica.author(key, (record,), chain="T", type="transfer", now_ms=number)
        signatures += 2
        if number % per_cut == per_cut - 1:
            base = replica.final.base()
            heads = candidates.heads(base)
            cut = Cut(base.k, base.prev_cut, heads, base.state_root, base.next_validators_hash)
            sign = (
                sign_vote(key, replica.genesis.network, k=cut.k, round=0, step=PRECOMMIT, cut=cut.id) for key in KEYS
            )
            votes = sorted((Signed(vote.validator, vote.signature) for vote in sign), key=lambda each: each.validator)
            replica.commit(cut, Certificate(cut.id, cut.k, 0, tuple(votes)))
            signatures += len(votes)
    return signatures


async def serve(folder: Path, size: int) -> None:
    """Serve the chain, and as many bytes as it has, until stdin ends."""

    async def bulk(stream: Stream) -> None:
        for _ in range(size // PIECE + 1):
            await stream.send_all(frame(bytes(PIECE)))
        await stream.close_write()
        await stream.aclose()

    with Replica.open(folder, genesis()) as replica:
        async with open_host(KEYS[0].secret, listen=LOOPBACK) as host, trio.open_nursery() as nursery:
            host.set_handler(BULK, bulk)
            await nursery.start(Relay(host, replica, KEYS[0], Thread("disk")).run)
            print(host.addresses()[0], flush=True)
            await trio.to_thread.run_sync(sys.stdin.read)
            nursery.cancel_scope.cancel()


async def fetch(folder: Path, address: str, heads: tuple[bytes, ...], k: int) -> tuple[float, float, bytes]:
    """Catch up; return the seconds that took, those of the bare bytes, and the state root."""
    async with open_host(bytes([9]) * 32, listen=LOOPBACK) as host:
        peer = await host.connect(address)
        began = time.perf_counter()
        reader = FrameReader(await host.open_stream(peer, BULK))
        while await reader.next(PIECE + 64) is not None:
            pass
        bare = time.perf_counter() - began
    with Replica.open(folder, genesis()) as replica:
        async with open_host(bytes([8]) * 32, listen=LOOPBACK) as host, trio.open_nursery() as nursery:
            relay = Relay(host, replica, Key(bytes([8]) * 32), Thread("disk"))
            await nursery.start(relay.run)
            began = time.perf_counter()
            await host.connect(address)
            while replica.heads() != heads or replica.final.k < k:
                await relay.changed.after(relay.changed.count)
            taken = time.perf_counter() - began
            nursery.cancel_scope.cancel()
        return taken, bare, replica.final.root


def verify(count: int) -> float:
    """Seconds for checking so many signatures, from a sample."""
    message = digest(b"benchmark/1", b"")
    signature = KEYS[0].sign(message)
    began = time.perf_counter()
    for _ in range(5000):
        address_of(recover(message, signature))
    return (time.perf_counter() - began) / 5000 * count


def sizes(folder: Path) -> Iterator[int]:
    with Replica.open(folder, genesis()) as replica:
        for block in replica.blocks(limit=sys.maxsize):
            yield len(block.raw)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=100_000)
    parser.add_argument("--per-cut", type=int, default=20)
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        trio.run(serve, Path(options.serve[0]), int(options.serve[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        there, here = Path(folder) / "there", Path(folder) / "here"
        with Replica.open(there, genesis()) as replica:
            signatures = write(replica, options.blocks, options.per_cut)
            heads, k, root = replica.heads(), replica.final.k, replica.final.root
        size = sum(sizes(there))
        command = [sys.executable, "-m", "benchmarks.catchup", "--serve", str(there), str(size)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            address = server.stdout.readline().strip()
            taken, bare, got = trio.run(fetch, here, address, heads, k)
            assert server.stdin is not None
            server.stdin.close()
        if got != root:
            raise SystemExit("the state roots differ")
    checks = verify(signatures)
    print(load_average())
    header = ["blocks", "cuts", "MB", "seconds", "blocks/s", "bytes alone s", "signatures alone s", "ratio"]
    row = [options.blocks, k, f"{size / 1e6:.0f}", f"{taken:.1f}", f"{options.blocks / taken:.0f}"]
    print(table(header, [[*map(str, row), f"{bare:.1f}", f"{checks:.1f}", f"{taken / (bare + checks):.2f}"]]))


if __name__ == "__main__":
    main()
