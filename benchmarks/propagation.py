"""How fast blocks reach all of 16 nodes, beside the gossip of stock py-libp2p in the same net.

    python -m benchmarks.propagation [--nodes 16] [--blocks 100] [--every 0.25]

All nodes of a net run in one process, each with a host of its own on loopback, connected to four others. In turn they
send blocks. Ours: from handing a block to the relay until another replica has accepted it (checked, stored, ordered).
Stock: the same bytes from ``publish`` until a subscription yields them. Printed: milliseconds over all pairs of block
and node, and what did not arrive within ten seconds.
"""

from __future__ import annotations

import argparse
import json
import random
import secrets
import statistics
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from benchmarks._common import load_average, table

DEGREE = 4
PATIENCE = 10.0
TOPIC = "blocks"
SIZE = 700  # bytes of a block with one record, for the stock net


def links(count: int) -> list[tuple[int, int]]:
    """A ring with chords: who dials whom."""
    rng = random.Random(1)
    ring = [(number, (number + 1) % count) for number in range(count)]
    chords = [(number, rng.randrange(count)) for number in range(count) for _ in range(DEGREE // 2 - 1)]
    return [link for link in dict.fromkeys(ring + chords) if link[0] != link[1]]


@asynccontextmanager
async def our_net(count: int, arrivals: Any, folder: Path) -> AsyncIterator[list[Any]]:
    """Our hosts and relays; each entry sends one block."""
    from blyan_node.chain.genesis import Genesis
    from blyan_node.chain.keys import Key
    from blyan_node.chain.records import Transfer, make_record
    from blyan_node.chain.replica import Replica
    from blyan_node.p2p.host import open_host
    from blyan_node.relay.blocks import Relay
    from blyan_node.worker import Thread

    keys = [Key.generate() for _ in range(count)]
    genesis = Genesis.make("benchmark", {key.address: 1 for key in keys}, created_ms=0)
    async with AsyncExitStack() as stack:
        nursery = await stack.enter_async_context(trio.open_nursery())
        relays, hosts = [], []
        for number, key in enumerate(keys):
            host = await stack.enter_async_context(open_host(key.secret, listen="/ip4/127.0.0.1/tcp/0"))
            replica = stack.enter_context(Replica.open(folder / str(number), genesis))
            relay = Relay(host, replica, key, Thread(f"disk {number}"))
            await nursery.start(relay.run)
            relays.append(relay)
            hosts.append(host)

        async def watch(number: int) -> None:
            relay, known = relays[number], {genesis.network}
            while True:
                seen = relay.changed.count
                for _, id in relay.replica.window_of(1):
                    if id not in known:
                        known.add(id)
                        arrivals(id, number)
                await relay.changed.after(seen)

        for number in range(count):
            nursery.start_soon(watch, number)
        for one, other in links(count):
            await hosts[one].connect(hosts[other].addresses()[0])
        await trio.sleep(3)  # the mesh forms

        def sender(number: int) -> Any:
            async def send(place: int) -> bytes:
                transfer = Transfer(secrets.token_bytes(20), 1)
                record = make_record(keys[number], genesis.network, transfer, nonce=place)
                return (await relays[number].write([record], chain="T", type="transfer")).id

            return send

        yield [sender(number) for number in range(count)]
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def stock_net(count: int, arrivals: Any, _folder: Path) -> AsyncIterator[list[Any]]:
    """Hosts of the library as they are."""
    from libp2p import new_host
    from libp2p.crypto.secp256k1 import create_new_key_pair
    from libp2p.custom_types import TProtocol
    from libp2p.peer.peerinfo import PeerInfo
    from libp2p.pubsub.gossipsub import GossipSub
    from libp2p.pubsub.pubsub import Pubsub
    from libp2p.tools.anyio_service import background_trio_service
    from multiaddr import Multiaddr

    async with AsyncExitStack() as stack:
        nursery = await stack.enter_async_context(trio.open_nursery())
        nodes = []
        for _ in range(count):
            host = new_host(create_new_key_pair())
            router = GossipSub(
                protocols=[TProtocol("/meshsub/1.1.0")], degree=6, degree_low=4, degree_high=12, heartbeat_interval=1
            )
            pubsub = Pubsub(host, router)
            await stack.enter_async_context(host.run([Multiaddr("/ip4/127.0.0.1/tcp/0")]))
            await stack.enter_async_context(background_trio_service(pubsub))
            await stack.enter_async_context(background_trio_service(router))
            await pubsub.wait_until_ready()
            nodes.append((host, pubsub, await pubsub.subscribe(TOPIC)))

        async def listen(number: int) -> None:
            while True:
                message = await nodes[number][2].get()
                arrivals(message.data[:32], number)

        for number in range(count):
            nursery.start_soon(listen, number)
        for one, other in links(count):
            host = nodes[other][0]
            await nodes[one][0].connect(PeerInfo(host.get_id(), host.get_addrs()))
        await trio.sleep(3)

        def sender(number: int) -> Any:
            async def send(_place: int) -> bytes:
                data = secrets.token_bytes(SIZE)
                await nodes[number][1].publish(TOPIC, data)
                return data[:32]

            return send

        yield [sender(number) for number in range(count)]
        nursery.cancel_scope.cancel()


async def measure(net: Any, count: int, blocks: int, every: float) -> dict[str, float]:
    """Send the blocks and wait for them."""
    arrived: dict[tuple[bytes, int], float] = {}
    sent: dict[bytes, tuple[float, int]] = {}

    def arrivals(id: bytes, number: int) -> None:
        arrived.setdefault((id, number), trio.current_time())

    with tempfile.TemporaryDirectory() as folder:
        async with net(count, arrivals, Path(folder)) as senders:
            for place in range(blocks):
                began = trio.current_time()
                id = await senders[place % count](place // count)
                sent[id] = began, place % count
                await trio.sleep(every)
            wanted = [(id, number) for id, (_, origin) in sent.items() for number in range(count) if number != origin]
            with trio.move_on_after(PATIENCE):
                while any(pair not in arrived for pair in wanted):  # noqa: ASYNC110 - a benchmark may poll
                    await trio.sleep(0.05)
            times = sorted(arrived[pair] - sent[pair[0]][0] for pair in wanted if pair in arrived)
    return {
        "p50": statistics.median(times) * 1e3,
        "p99": times[int(len(times) * 0.99)] * 1e3,
        "worst": times[-1] * 1e3,
        "lost": float(len(wanted) - len(times)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=16)
    parser.add_argument("--blocks", type=int, default=100)
    parser.add_argument("--every", type=float, default=0.25)
    parser.add_argument("--net", choices=["ours", "stock"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.net:
        net = our_net if options.net == "ours" else stock_net
        print(json.dumps(trio.run(measure, net, options.nodes, options.blocks, options.every)))
        return
    rows = []
    for name in ("ours", "stock"):  # each in a process of its own: our corrections change the library
        command = [sys.executable, "-m", "benchmarks.propagation", "--net", name, "--nodes", str(options.nodes)]
        command += ["--blocks", str(options.blocks), "--every", str(options.every)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            rows.append([name, "failed", "", "", done.stderr.strip().splitlines()[-1]])
            continue
        told = json.loads(done.stdout.splitlines()[-1])
        rows.append([name, *(f"{told[key]:.0f}" for key in ("p50", "p99", "worst", "lost"))])
    print(load_average())
    print(table([f"{options.nodes} nodes, {options.blocks} blocks", "p50 ms", "p99 ms", "worst ms", "lost"], rows))


if __name__ == "__main__":
    main()
