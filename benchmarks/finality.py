"""How long a payment takes to become final on real daemons.

    python -m benchmarks.finality [--validators 4 7] [--payments 60] [--burst 300]

For each number of validators, all on this machine: the milliseconds from handing a payment to one node until it is
tentative, and until it is final, there (p50, p99), one after the other; the payments a second of a burst that is
handed in at once, until all are final; and the share of that rate in what the signatures alone would allow: each node
checks each block and each record once, and all nodes share this machine's cores.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks._common import load_average, table
from blyan_node.api.client import Client
from blyan_node.chain.keys import Key, address_of, digest, load_or_create_key, recover
from blyan_node.chain.records import Transfer, make_record
from blyan_node.codec import pack
from blyan_node.testnet.local import Testnet, wait_until

PAYEE = bytes(19) + b"\7"


class Payer:
    """Signs payments of one node's own key, from its next nonce on."""

    def __init__(self, client: Client, key: Key) -> None:
        self.client, self.key = client, key
        self.network = bytes.fromhex(client.network()["network"])
        self.nonce = int(client.balance(client.status()["address"])["next_nonce"])

    def pay(self) -> str:
        """Hand in one payment; return its id."""
        record = make_record(self.key, self.network, Transfer(PAYEE, 1), nonce=self.nonce)
        self.nonce += 1
        return str(self.client.submit(pack(record).hex())["id"])

    def wait(self, id: str, *words: str) -> None:
        """Wait until a payment has one of these words."""
        while self.client.transaction(id)["word"] not in words:
            time.sleep(0.002)


def bare(key: Key) -> float:
    """Signature checks a second on one core."""
    message = digest(b"benchmark/1", b"")
    signature = key.sign(message)
    began = time.perf_counter()
    for _ in range(2000):
        address_of(recover(message, signature))
    return 2000 / (time.perf_counter() - began)


def measure(count: int, payments: int, burst: int) -> list[str]:
    """Measure one net; return its row."""
    with tempfile.TemporaryDirectory() as folder, Testnet(Path(folder), nodes=count, memory_limit="256MiB") as net:
        client = net.node(0).client
        wait_until(lambda: not client.validators()["missing"], timeout=60, what="all connected")
        payer = Payer(client, load_or_create_key(net.node(0).directory.key))
        payer.wait(payer.pay(), "final")
        tentative, final = [], []
        for _ in range(payments):
            began = time.perf_counter()
            id = payer.pay()
            payer.wait(id, "tentative", "final")
            tentative.append(time.perf_counter() - began)
            payer.wait(id, "final")
            final.append(time.perf_counter() - began)
            time.sleep(0.05)
        began = time.perf_counter()
        last = ""
        for number in range(burst):
            last = payer.pay()
            if number % 50 == 49:
                payer.wait(last, "tentative", "final")  # a mempool keeps 64 records of one sender
        payer.wait(last, "final")
        rate = burst / (time.perf_counter() - began)
        balance = int(client.balance("0x" + PAYEE.hex())["final"]["balance_nano"])
        if balance != 1 + payments + burst:
            raise SystemExit(f"{balance} nano-BLY arrived where {1 + payments + burst} were sent")
        limit = bare(payer.key) * (os.cpu_count() or 1) / (2 * count)
    p50, p99 = statistics.median(final), sorted(final)[int(len(final) * 0.99)]
    return [
        str(count),
        f"{statistics.median(tentative) * 1e3:.0f}",
        f"{p50 * 1e3:.0f}",
        f"{p99 * 1e3:.0f}",
        f"{rate:.0f}",
        f"{rate / limit:.2f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--validators", type=int, nargs="+", default=[4, 7])
    parser.add_argument("--payments", type=int, default=60)
    parser.add_argument("--burst", type=int, default=300)
    options = parser.parse_args()
    rows = [measure(count, options.payments, options.burst) for count in options.validators]
    print(load_average())
    header = ["validators", "tentative ms", "final p50 ms", "final p99 ms", "burst payments/s", "of the signatures"]
    print(table(header, rows))


if __name__ == "__main__":
    main()
