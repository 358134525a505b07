"""Our Noise I/O and Yamux with those of others: stock py-libp2p, and js-libp2p, each dialling and dialled."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from libp2p import new_host
from libp2p.abc import IHost, INetStream
from libp2p.crypto.secp256k1 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as new_noise_key
from libp2p.custom_types import TProtocol
from libp2p.network.stream.exceptions import StreamEOF, StreamReset
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX
from libp2p.stream_muxer.yamux.yamux import Yamux as StockYamux
from multiaddr import Multiaddr

from blyan_node.errors import ChannelClosed
from blyan_node.p2p.transport import Network, Stream
from tests.support.network import Ground, secret

ECHO, RESET = TProtocol("/test/echo/1"), TProtocol("/test/reset/1")
SIZES = (1, 65_519, 65_536, 3_000_000)


async def echo(stream: Stream) -> None:
    while data := await stream.receive_some(65536):
        await stream.send_all(data)


async def reset(stream: Stream) -> None:
    await stream.receive_some(1)
    await stream.reset()


async def stock_echo(stream: INetStream) -> None:
    try:
        while True:
            await stream.write(await stream.read(65536))
    except StreamEOF:
        await stream.close()


async def stock_reset(stream: INetStream) -> None:
    await stream.read(1)
    await stream.reset()


def payload(size: int) -> bytes:
    return hashlib.shake_128(b"%d" % size).digest(size)


async def ask(network: Network, peer: str, data: bytes) -> bytes:
    stream = await network.open_stream(peer, ECHO)  # type: ignore[arg-type]
    answer = bytearray()

    async def send() -> None:
        await stream.send_all(data)
        await stream.close_write()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        while part := await stream.receive_some(65536):
            answer += part
    await stream.aclose()
    return bytes(answer)


async def stock_ask(host: IHost, peer: object, data: bytes) -> bytes:
    stream = await host.new_stream(peer, [ECHO])  # type: ignore[arg-type]
    answer = bytearray()

    async def send() -> None:
        await stream.write(data)
        await stream.close_write()  # type: ignore[attr-defined]

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        try:
            while True:
                answer += await stream.read(65536)
        except StreamEOF:
            pass
    return bytes(answer)


@asynccontextmanager
async def stock() -> AsyncIterator[IHost]:
    """A host with nothing of ours in it."""
    key = create_new_key_pair(secret(50))
    host = new_host(
        key,
        sec_opt={NOISE: Transport(key, noise_privkey=new_noise_key().private_key)},
        muxer_opt={TProtocol(YAMUX): StockYamux},
    )
    host.set_stream_handler(ECHO, stock_echo)
    host.set_stream_handler(RESET, stock_reset)
    async with host.run([Multiaddr("/ip4/127.0.0.1/tcp/0")]):
        try:
            yield host
        finally:
            await host.close()


async def test_we_dial_stock() -> None:
    async with stock() as host, Ground("libp2p").open(0) as alice:
        peer = await alice.connect(str(host.get_addrs()[0]))
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for size in SIZES:
                    nursery.start_soon(_check_ask, alice, peer, size)
            for _ in range(300):
                assert await ask(alice, peer, b"again") == b"again"
            stream = await alice.open_stream(peer, RESET)
            await stream.send_all(b"x")
            with pytest.raises(ChannelClosed):
                await stream.receive_some(1)


async def _check_ask(alice: Network, peer: str, size: int) -> None:
    assert await ask(alice, peer, payload(size)) == payload(size)


async def test_stock_dials_us() -> None:
    async with stock() as host, Ground("libp2p").open(0) as alice:
        alice.set_handler(ECHO, echo)
        alice.set_handler(RESET, reset)
        info = info_from_p2p_addr(Multiaddr(alice.addresses()[0]))
        await host.connect(info)

        async def check(size: int) -> None:
            assert await stock_ask(host, info.peer_id, payload(size)) == payload(size)

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for size in SIZES:
                    nursery.start_soon(check, size)
            for _ in range(300):
                assert await stock_ask(host, info.peer_id, b"again") == b"again"
            stream = await host.new_stream(info.peer_id, [RESET])
            await stream.write(b"x")
            with pytest.raises((StreamReset, StreamEOF)):  # which of them is up to a race in the stock muxer
                await stream.read(1)


SCRIPT = Path(__file__).parents[1] / "support" / "interop.mjs"
PACKAGES = (
    "@libp2p/crypto@5.1.23",
    "@multiformats/multiaddr@13.0.3",
    "libp2p@3.3.11",
    "@libp2p/tcp@11.0.28",
    "@chainsafe/libp2p-noise@17.0.0",
    "@chainsafe/libp2p-yamux@8.0.1",
)


@pytest.fixture(scope="module")
def javascript(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with js-libp2p and the script."""
    if not shutil.which("node") or not shutil.which("npm"):
        pytest.skip("node and npm are not installed")
    directory = tmp_path_factory.mktemp("javascript")
    command = ["npm", "install", "--no-audit", "--no-fund", "--prefix", str(directory), *PACKAGES]
    installed = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    if installed.returncode:
        pytest.skip(f"npm cannot install js-libp2p: {installed.stderr[-300:]}")
    return Path(shutil.copy(SCRIPT, directory))


@pytest.mark.long
async def test_js_libp2p_both_ways(javascript: Path) -> None:
    async with Ground("libp2p").open(0) as alice, trio.open_nursery() as nursery:
        alice.set_handler(ECHO, echo)
        alice.set_handler(RESET, reset)
        run = functools.partial(trio.run_process, stdin=subprocess.PIPE, stdout=subprocess.PIPE, check=False)
        process = await nursery.start(run, ["node", str(javascript), alice.addresses()[0]])
        with trio.fail_after(120):
            said = bytearray()
            while said.count(b"\n") < 1:
                part = await process.stdout.receive_some(65536)
                assert part, "node ended early"
                said += part
            address = json.loads(said.split(b"\n")[0])
            # it has dialled us already; now we use, from our side, the connection there is, and then one of our own
            peer = address.rsplit("/p2p/", 1)[1]
            for _ in range(2):
                for size in SIZES:
                    assert await ask(alice, peer, payload(size)) == payload(size)
                stream = await alice.open_stream(peer, RESET)  # type: ignore[arg-type]
                await stream.send_all(b"x")
                with pytest.raises(ChannelClosed):
                    await stream.receive_some(1)
                await alice.disconnect(peer)  # type: ignore[arg-type]
                await alice.connect(address)
            await process.stdin.send_all(b"ask\n")
            while said.count(b"\n") < 2:
                part = await process.stdout.receive_some(65536)
                assert part, "node ended early"
                said += part
            assert json.loads(said.split(b"\n")[1]) == {"asked": len(SIZES), "reset": True}
        nursery.cancel_scope.cancel()
