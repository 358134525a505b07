"""How fast a replica takes in blocks, beside the bare verification of their signatures in the same run.

    python -m benchmarks.chain [--counts 1000 10000] [--authors 4] [--payload 200]
    python -m benchmarks.chain --counts 10000 1000000    # how the cost of a block grows

Blocks of several authors, each with one record of ``payload`` bytes, on random partial views, so that the DAG has
width. Each block costs two signature checks (block and record). Printed: blocks a second, the share of the time that
bare verification takes, the median and worst microseconds of one accept among the last 5,000 blocks, what one accept
costs there, on average, in the bare checks of a block made right after (a busy machine slows both), memory and disk per
block, and the time to open the database again. Blocks are written as they are taken in, so a million need no memory.
"""

from __future__ import annotations

import argparse
import random
import resource
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from blyan_node.chain.block import BLOCK_DOMAIN, Anchor, Block, decode_block, make_block
from blyan_node.chain.genesis import Genesis
from blyan_node.chain.keys import Key, address_of, digest, recover
from blyan_node.chain.outcome import Accepted
from blyan_node.chain.records import RECORD_DOMAIN, sign_record
from blyan_node.chain.replica import Replica

TAIL = 5000


def forge(keys: list[Key], network: bytes, count: int, payload: int) -> Iterator[bytes]:
    """Write ``count`` blocks: each on its author's last block and that of one other, where these are no ancestors."""
    rng = random.Random(1)
    last: list[Block | None] = [None] * len(keys)
    clocks = [[0] * len(keys) for _ in keys]  # clocks[a][b]: how many blocks of b lie at or under a's last one
    for number in range(count):
        me, other = rng.sample(range(len(keys)), 2)
        own, side = last[me], last[other]
        chosen = []
        if own and not (side and clocks[other][me] >= own.header.seq + 1):
            chosen.append(own)
        if side and clocks[me][other] < side.header.seq + 1:
            chosen.append(side)
            clocks[me] = list(map(max, clocks[me], clocks[other]))
        record = sign_record(keys[me], network, "data", rng.randbytes(payload), nonce=number)
        block = make_block(
            keys[me],
            network,
            (record,),
            chain="T",
            type="data",
            seq=own.header.seq + 1 if own else 0,
            prev=own.id if own else None,
            parents=tuple(each.id for each in chosen) or (network,),
            height=1 + max((each.height for each in chosen), default=0),
            anchor=Anchor(0, network),
            timestamp_ms=number,
        )
        last[me] = block
        clocks[me][me] += 1
        yield block.raw


def verify(raws: deque[bytes]) -> float:
    """Time nothing but the two signature checks of each block, in seconds for one block."""
    checks = []
    for raw in raws:
        block = decode_block(raw)
        checks.append((digest(BLOCK_DOMAIN, block.header_bytes), block.signature))
        checks += [(digest(RECORD_DOMAIN, record.unsigned), record.signature) for record in block.records]
    start = time.perf_counter()
    for message, signature in checks:
        address_of(recover(message, signature))
    return (time.perf_counter() - start) / len(raws)


def measure(keys: list[Key], genesis: Genesis, count: int, payload: int) -> None:
    """Measure one count and print its row."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "chain"
        total, times, tail = 0.0, deque[float](maxlen=TAIL), deque[bytes](maxlen=TAIL)
        with Replica.open(directory, genesis) as replica:
            for raw in forge(keys, genesis.network, count, payload):
                start = time.perf_counter()
                outcome = replica.accept(raw)
                times.append(time.perf_counter() - start)
                total += times[-1]
                tail.append(raw)
                if not isinstance(outcome, Accepted):
                    raise SystemExit(f"a block was not accepted: {outcome}")
            replica.flush()
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            heads = replica.heads()
        start = time.perf_counter()
        with Replica.open(directory, genesis) as replica:
            opened = time.perf_counter() - start
            if replica.heads() != heads or replica.count() != count:
                raise SystemExit("the replica came back different")
        disk = sum(path.stat().st_size for path in directory.iterdir())
    bare = verify(tail)
    print(
        f"{count:>9} {count / total:>9.0f} {1 / bare:>12.0f} {bare * count / total:>7.0%} "
        f"{statistics.median(times) * 1e6:>10.0f} {max(times) * 1e6:>9.0f} "
        f"{statistics.mean(times) / bare:>9.2f} {grown * 1024 / count:>9.0f} "
        f"{disk / count:>9.0f} {opened * 1e3:>9.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--authors", type=int, default=4)
    parser.add_argument("--payload", type=int, default=200)
    options = parser.parse_args()
    keys = [Key.generate() for _ in range(options.authors)]
    genesis = Genesis.make("benchmark", {key.address: 1 for key in keys}, created_ms=0)
    print(f"{options.authors} authors, a record of {options.payload} bytes a block")
    print("   blocks  accept/s  bare sigs/s    sigs  µs median  µs worst  in checks  B memory    B disk   open ms")
    for count in options.counts:
        measure(keys, genesis, count, options.payload)


if __name__ == "__main__":
    main()
