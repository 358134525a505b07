"""What the wire costs between two processes on loopback, beside raw trio TCP and TLS in the same run.

    python -m benchmarks.wire [--hops 300] [--mebibytes 64]

Printed: the median and 95th percentile of milliseconds for 8 KiB there and back, and the time to open (a connection,
or a stream on one); then mebibytes a second of one bulk transfer to this process. Ratios are against trio TLS.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import math
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from benchmarks._common import load_average, table
from blyan_node.codec import Size
from blyan_node.p2p.channel import Channels
from blyan_node.p2p.framing import FrameReader, frame
from blyan_node.p2p.host import open_host
from blyan_node.p2p.rpc import Method, call, serve
from blyan_node.p2p.transport import Network, PeerId, Stream

HOP = 8 * 1024
CHUNK = 1024 * 1024
IN_FLIGHT = 4
LOOPBACK = "/ip4/127.0.0.1/tcp/0"
ECHO, BULK, CHANNEL = "/bench/echo/1", "/bench/bulk/1", "/bench/channel/1"


@dataclass(frozen=True)
class Blob:
    """Some bytes: an activation, or a chunk of a blob."""

    data: Annotated[bytes, Size(CHUNK)]


@dataclass(frozen=True)
class Want:
    """Asks for a chunk."""

    size: int


GET = Method("/bench/get/1", Want, Blob, max_request=64, max_response=CHUNK + 64, timeout=30)


def make_certificate(directory: Path) -> Path:
    """Write a self-signed certificate for localhost and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = directory / "localhost.pem"
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(secret + certificate.public_bytes(serialization.Encoding.PEM))
    return path


# ---- the serving process


async def serve_raw(stream: trio.abc.Stream) -> None:
    """Echo frames; a frame of eight bytes asks for that many bytes instead."""
    reader = FrameReader(_AsStream(stream))  # type: ignore[arg-type]
    while (content := await reader.next(CHUNK)) is not None:
        if len(content) == 8:
            for _ in range(int.from_bytes(content, "big") // CHUNK):
                await stream.send_all(bytes(CHUNK))
        else:
            await stream.send_all(frame(content))


async def serve_echo(stream: Stream) -> None:
    """Echo frames."""
    reader = FrameReader(stream)
    while (content := await reader.next(CHUNK)) is not None:
        await stream.send_all(frame(content))


async def serve_bulk(stream: Stream) -> None:
    """Send as many bytes as asked."""
    wanted = await FrameReader(stream).next(8)
    for _ in range(int.from_bytes(wanted or b"", "big") // CHUNK):
        await stream.send_all(bytes(CHUNK))


async def get(_peer: PeerId, want: Want) -> Blob:
    """Answer with zeros."""
    await trio.lowlevel.checkpoint()
    return Blob(bytes(want.size))


async def server(certificate: Path) -> None:
    """Serve everything; print where, as JSON; end with standard input."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    async with open_host(b"\2" * 32, listen=LOOPBACK) as network, trio.open_nursery() as nursery:
        network.set_handler(ECHO, serve_echo)
        network.set_handler(BULK, serve_bulk)
        serve(network, GET, get, concurrency=IN_FLIGHT)

        async def echo_message(peer: PeerId, message: Any) -> None:
            await channels.send(peer, message)

        channels = Channels(network, CHANNEL, (Blob,), largest=CHUNK, on_message=echo_message, on_lost=lambda _: None)
        await nursery.start(channels.run)
        tcp = await nursery.start(partial(trio.serve_tcp, serve_raw, 0, host="127.0.0.1"))
        tls = await nursery.start(partial(trio.serve_ssl_over_tcp, serve_raw, 0, context, host="127.0.0.1"))
        ports = [listeners[0].socket.getsockname()[1] for listeners in (tcp, [tls[0].transport_listener])]
        print(json.dumps({"tcp": ports[0], "tls": ports[1], "address": network.addresses()[0]}), flush=True)
        await trio.to_thread.run_sync(sys.stdin.read)
        nursery.cancel_scope.cancel()


# ---- the measuring process


class _AsStream:
    """A trio stream with the one method that FrameReader uses."""

    def __init__(self, stream: trio.abc.ReceiveStream) -> None:
        self.receive_some = stream.receive_some


async def hops(count: int, there_and_back: Callable[[], Awaitable[object]]) -> tuple[float, float]:
    """The median and 95th percentile of milliseconds of one exchange."""
    taken = []
    for number in range(count + 20):
        begun = time.perf_counter()
        await there_and_back()
        if number >= 20:
            taken.append(1000 * (time.perf_counter() - begun))
    return statistics.median(taken), statistics.quantiles(taken, n=20)[-1]


async def raw_hops(stream: Any, count: int) -> tuple[float, float]:
    """Hops over anything with send_all and receive_some."""
    reader, packed = FrameReader(stream if hasattr(stream, "peer") else _AsStream(stream)), frame(bytes(HOP))  # type: ignore[arg-type]

    async def exchange() -> None:
        await stream.send_all(packed)
        await reader.next(HOP)

    return await hops(count, exchange)


async def channel_hops(network: Network, peer: PeerId, count: int) -> tuple[float, float]:
    """Hops over a channel there and a channel back."""
    send, receive = trio.open_memory_channel[Any](1)

    async def arrived(_peer: PeerId, message: Any) -> None:
        await send.send(message)

    channels = Channels(network, CHANNEL, (Blob,), largest=CHUNK, on_message=arrived, on_lost=lambda _: None)
    message = Blob(bytes(HOP))

    async def exchange() -> None:
        await channels.send(peer, message)
        await receive.receive()

    async with trio.open_nursery() as nursery:
        await nursery.start(channels.run)
        result = await hops(count, exchange)
        nursery.cancel_scope.cancel()
    return result


async def drain(stream: Any, mebibytes: int) -> float:
    """Mebibytes a second of one bulk transfer."""
    begun = time.perf_counter()
    await stream.send_all(frame((mebibytes * CHUNK).to_bytes(8, "big")))
    left = mebibytes * CHUNK
    while left > 0:
        left -= len(await stream.receive_some(min(left, 256 * 1024)))
    return mebibytes / (time.perf_counter() - begun)


async def rpc_bulk(network: Network, peer: PeerId, mebibytes: int) -> float:
    """Mebibytes a second in chunks of one MiB, some of them in flight at once."""
    begun = time.perf_counter()
    slots = trio.CapacityLimiter(IN_FLIGHT)

    async def fetch() -> None:
        async with slots:
            await call(network, peer, GET, Want(CHUNK))

    async with trio.open_nursery() as nursery:
        for _ in range(mebibytes):
            nursery.start_soon(fetch)
    return mebibytes / (time.perf_counter() - begun)


async def timed(opening: Callable[[], Awaitable[Any]]) -> tuple[float, Any]:
    """Milliseconds until something is open, and the thing."""
    begun = time.perf_counter()
    opened = await opening()
    return 1000 * (time.perf_counter() - begun), opened


async def measure(where: dict[str, Any], certificate: Path, count: int, mebibytes: int) -> None:
    """Measure everything, one after another, and print the tables."""
    context = ssl.create_default_context(cafile=str(certificate))
    latency: dict[str, tuple[float, float, float]] = {}
    bulk: dict[str, float] = {}
    opened, tcp = await timed(partial(trio.open_tcp_stream, "127.0.0.1", where["tcp"]))
    latency["trio TCP"] = (*await raw_hops(tcp, count), opened)
    bulk["trio TCP"] = await drain(tcp, mebibytes)
    tls = await trio.open_ssl_over_tcp_stream("localhost", where["tls"], ssl_context=context)
    opened, _ = await timed(tls.do_handshake)
    latency["trio TLS"] = (*await raw_hops(tls, count), opened)
    bulk["trio TLS"] = await drain(tls, mebibytes)
    async with open_host(b"\1" * 32, listen=LOOPBACK) as network:
        peer = await network.connect(where["address"])
        opened, echo = await timed(partial(network.open_stream, peer, ECHO))
        latency["libp2p stream"] = (*await raw_hops(echo, count), opened)
        bulk["libp2p stream"] = await drain(await network.open_stream(peer, BULK), mebibytes)
        latency["channel"] = (*await channel_hops(network, peer, count), math.nan)
        bulk[f"rpc, {IN_FLIGHT} chunks of 1 MiB in flight"] = await rpc_bulk(network, peer, mebibytes)
    show(latency, bulk)


def show(latency: dict[str, tuple[float, float, float]], bulk: dict[str, float]) -> None:
    """Print the two tables."""
    base_hop, base_bulk = latency["trio TLS"][0], bulk["trio TLS"]
    rows = [
        (
            name,
            f"{middle:.3f}",
            f"{high:.3f}",
            "–" if math.isnan(opening) else f"{opening:.2f}",
            f"{middle / base_hop:.1f}×",
        )
        for name, (middle, high, opening) in latency.items()
    ]
    print(table(("8 KiB there and back", "median ms", "p95 ms", "open ms", "of TLS"), rows))
    print()
    rows_bulk = [(name, f"{speed:.0f}", f"{speed / base_bulk:.2f}×") for name, speed in bulk.items()]
    print(table(("bulk", "MiB/s", "of TLS"), rows_bulk))
    print(load_average())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hops", type=int, default=300)
    parser.add_argument("--mebibytes", type=int, default=64)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        trio.run(server, arguments.serve)
        return
    with tempfile.TemporaryDirectory() as directory:
        certificate = make_certificate(Path(directory))
        command = [sys.executable, "-m", "benchmarks.wire", "--serve", str(certificate)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as serving:
            if serving.stdout is None:
                raise RuntimeError("the serving process has no output")
            where = json.loads(serving.stdout.readline())
            trio.run(measure, where, certificate, arguments.hops, arguments.mebibytes)
            serving.communicate()


if __name__ == "__main__":
    main()
