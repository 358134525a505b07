"""Garbage on every protocol of a real host: it resets, scores and lives on."""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from libp2p.crypto.secp256k1 import create_new_key_pair
from libp2p.custom_types import TProtocol
from libp2p.peer.id import ID
from libp2p.pubsub.pb import rpc_pb2
from libp2p.utils import encode_varint_prefixed

from blyan_node.errors import ChannelClosed, Unreachable
from blyan_node.p2p import gossip
from blyan_node.p2p.host import Libp2pNetwork
from blyan_node.p2p.transport import MAX_GOSSIP, Network, PeerId, Stream
from blyan_node.p2p.yamux_frames import Flag, Kind, encode
from tests.support.network import eventually, network_group, secret

TOPIC = "/test/blocks"
ECHO = "/test/echo/1"


async def echo(stream: Stream) -> None:
    while data := await stream.receive_some(65536):
        await stream.send_all(data)


def anything(_origin: PeerId, _data: bytes) -> bool:
    return True


@asynccontextmanager
async def victim_and_attacker() -> AsyncIterator[tuple[Network, Libp2pNetwork, list[str]]]:
    """A victim that serves an echo and a topic, an attacker, and the faults that the victim counts."""
    async with network_group(2, "libp2p") as (victim, attacker):
        victim.set_handler(ECHO, echo)
        faults: list[str] = []
        victim.penalise = lambda _peer, _points, why: faults.append(why)  # type: ignore[method-assign]
        gossip_of(victim)._penalise = victim.penalise
        async with victim.subscribe(TOPIC, anything, capacity=64):
            assert isinstance(attacker, Libp2pNetwork)
            yield victim, attacker, faults


def gossip_of(network: Network) -> gossip.SturdyPubsub:
    assert isinstance(network, Libp2pNetwork)
    return network._gossip()


async def assert_alive(victim: Network) -> None:
    """Somebody else is served, and heard, as if nothing had happened."""
    from tests.support.network import Ground, meet

    async with Ground("libp2p").open(77) as friend:
        await meet(friend, victim)
        stream = await friend.open_stream(victim.peer_id, ECHO)
        await stream.send_all(b"hello")
        with trio.fail_after(5):
            assert await stream.receive_some(64) == b"hello"
        await stream.aclose()


def message(number: int = 1, **fields: object) -> rpc_pb2.RPC:
    """A gossip RPC with a message well signed by node 1, but for the fields given."""
    key = create_new_key_pair(secret(1))
    plain: dict[str, object] = {
        "data": b"data",
        "topicIDs": [TOPIC],
        "from_id": ID.from_pubkey(key.public_key).to_bytes(),
        "seqno": number.to_bytes(8, "big"),
    }
    signed = rpc_pb2.Message(**(plain | {k: v for k, v in fields.items() if k in plain}))  # type: ignore[arg-type]
    signed.signature = key.private_key.sign(b"libp2p-pubsub:" + signed.SerializeToString())
    for name in fields.keys() - plain.keys():
        setattr(signed, name, fields[name])
    return rpc_pb2.RPC(publish=[signed])


def control(**parts: list[object]) -> rpc_pb2.RPC:
    return rpc_pb2.RPC(control=rpc_pb2.ControlMessage(**parts))  # type: ignore[arg-type]


NOBODY = b"\x00\x25" + b"\xff" * 37
OTHER = ID.from_pubkey(create_new_key_pair(secret(5)).public_key).to_bytes()

BLAMED = {
    "not protobuf": b"\x05\xff\xff\xff\xff\xff",
    "random": encode_varint_prefixed(random.Random(3).randbytes(500)),
    "garbage key": encode_varint_prefixed(
        message(key=b"\xff" * 40, from_id=b"\x12\x20" + bytes(32)).SerializeToString()
    ),
    "garbage origin": encode_varint_prefixed(message(from_id=NOBODY).SerializeToString()),
    "empty origin": encode_varint_prefixed(message(from_id=b"").SerializeToString()),
    "no signature": encode_varint_prefixed(message(signature=b"").SerializeToString()),
    "signature not DER": encode_varint_prefixed(message(signature=b"\x30\x99garbage").SerializeToString()),
    "another's name": encode_varint_prefixed(message(from_id=OTHER).SerializeToString()),
    "two topics": encode_varint_prefixed(message(topicIDs=[TOPIC, "x"]).SerializeToString()),
    "too much data": encode_varint_prefixed(message(data=bytes(MAX_GOSSIP + 1)).SerializeToString()),
    "no number": encode_varint_prefixed(message(seqno=b"").SerializeToString()),
    "endless number": encode_varint_prefixed(message(seqno=bytes(100)).SerializeToString()),
}
IGNORED = {
    "length of gigabytes": b"\xff\xff\xff\xff\x0f",
    "length without end": b"\xff" * 20,
    "ends within the length": b"\xff",
    "ends within the body": b"\x64half",
    "garbage ihave": encode_varint_prefixed(
        control(ihave=[rpc_pb2.ControlIHave(topicID=TOPIC, messageIDs=[b"\xff\xfe", b"zz", b""])]).SerializeToString()
    ),
    "garbage iwant": encode_varint_prefixed(
        control(iwant=[rpc_pb2.ControlIWant(messageIDs=[b"\xff\xfe", b"abc"])]).SerializeToString()
    ),
    "graft of strange topics": encode_varint_prefixed(
        control(graft=[rpc_pb2.ControlGraft(topicID=f"t{n}") for n in range(500)]).SerializeToString()
    ),
    "prune with garbage peers": encode_varint_prefixed(
        control(
            prune=[
                rpc_pb2.ControlPrune(
                    topicID=TOPIC, backoff=2**63, peers=[rpc_pb2.PeerInfo(peerID=b"\xff", signedPeerRecord=b"\xff")]
                )
            ]
        ).SerializeToString()
    ),
    "thousands of subscriptions": encode_varint_prefixed(
        rpc_pb2.RPC(
            subscriptions=[rpc_pb2.RPC.SubOpts(subscribe=True, topicid=f"t{n}") for n in range(4000)]
        ).SerializeToString()
    ),
    "garbage record": encode_varint_prefixed(rpc_pb2.RPC(senderRecord=b"\xff" * 50).SerializeToString()),
}


@pytest.mark.parametrize("name", BLAMED)
async def test_garbage_in_gossip_is_blamed_on_its_sender(name: str) -> None:  # G1
    async with victim_and_attacker() as (victim, attacker, faults):
        stream = await attacker.open_stream(victim.peer_id, str(gossip.PROTOCOLS[0]))
        await stream.send_all(BLAMED[name])
        await eventually(lambda: len(faults) > 0)
        await assert_alive(victim)


@pytest.mark.parametrize("name", IGNORED)
async def test_other_garbage_in_gossip_does_no_harm(name: str) -> None:
    async with victim_and_attacker() as (victim, attacker, _):
        stream = await attacker.open_stream(victim.peer_id, str(gossip.PROTOCOLS[0]))
        await stream.send_all(IGNORED[name])
        await stream.close_write()
        with trio.move_on_after(0.5), contextlib.suppress(ChannelClosed):
            while await stream.receive_some(1000):
                pass
        await assert_alive(victim)


async def test_a_well_signed_message_is_taken() -> None:
    """The counterpart of the garbage: without it the tests above would prove nothing."""
    async with network_group(2, "libp2p") as (victim, attacker):
        async with victim.subscribe(TOPIC, anything, capacity=4) as queue:
            stream = await attacker.open_stream(victim.peer_id, str(gossip.PROTOCOLS[0]))
            await stream.send_all(encode_varint_prefixed(message().SerializeToString()))
            with trio.fail_after(5):
                assert (await queue.receive()).data == b"data"


@pytest.mark.parametrize("protocol", ["/ipfs/ping/1.0.0", "/ipfs/id/1.0.0", "/ipfs/id/push/1.0.0"])
@pytest.mark.parametrize("junk", [b"\xff" * 100, b"\x05hello", b"x", b""])
async def test_garbage_on_the_librarys_own_protocols(protocol: str, junk: bytes) -> None:  # H1
    async with victim_and_attacker() as (victim, attacker, _):
        stream = await attacker.open_stream(victim.peer_id, protocol)
        await stream.send_all(junk)
        await stream.close_write()
        with trio.move_on_after(0.3):
            try:
                while await stream.receive_some(1000):
                    pass
            except ChannelClosed:
                pass
        await assert_alive(victim)


@pytest.mark.parametrize(
    "junk", [b"\xff" * 100, b"\x05hello\n", b"\x13/multistream/1.0.0\n" + b"\xff\xff\xff\xff\xff", b""]
)
async def test_garbage_where_a_protocol_is_negotiated(junk: bytes) -> None:
    async with victim_and_attacker() as (victim, attacker, _):
        raw = await attacker._swarm.new_stream(ID.from_string(victim.peer_id))
        await raw.write(junk)
        await raw.close_write()
        await assert_alive(victim)


FRAMES = {
    "unknown version": bytes([9]) + bytes(11),
    "data for no stream": encode(Kind.DATA, Flag.NONE, 4711, 5) + b"hello",
    "too much data": encode(Kind.DATA, Flag.NONE, 1, 2**32 - 1),
    "window of four gigabytes": encode(Kind.WINDOW, Flag.SYN, 4711, 2**32 - 1),
    "streams galore": b"".join(encode(Kind.WINDOW, Flag.SYN, 5001 + 2 * n, 0) for n in range(2000)),
    "go away": encode(Kind.GO_AWAY, Flag.NONE, 0, 1),
    "random": random.Random(5).randbytes(1000),
}


@pytest.mark.parametrize("name", FRAMES)
async def test_garbage_between_noise_and_streams(name: str) -> None:
    async with victim_and_attacker() as (victim, attacker, _):
        connection = attacker._swarm.connections[ID.from_string(victim.peer_id)][0]
        connection.muxed_conn.push(FRAMES[name])  # type: ignore[attr-defined]
        await trio.sleep(0.2)
        await assert_alive(victim)


@pytest.mark.parametrize(
    "junk",
    [b"", b"\x00", b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 10_000, b"\x13/multistream/1.0.0\n\x07/noise\n" + bytes(500)],
)
async def test_raw_tcp_junk(junk: bytes) -> None:
    async with victim_and_attacker() as (victim, _, _):
        port = int(victim.addresses()[0].split("/")[4])
        tcp = await trio.open_tcp_stream("127.0.0.1", port)
        await tcp.send_all(junk)
        await assert_alive(victim)
        await tcp.aclose()


async def test_half_open_connections_do_not_keep_others_out() -> None:
    async with victim_and_attacker() as (victim, _, _):
        port = int(victim.addresses()[0].split("/")[4])
        idle = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(100)]
        await assert_alive(victim)
        for tcp in idle:
            await tcp.aclose()


async def test_a_silent_server_does_not_hold_a_dial(monkeypatch: pytest.MonkeyPatch) -> None:  # H9
    from blyan_node.p2p import host

    async def say_nothing(_stream: trio.SocketStream) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(host, "CONNECT_SECONDS", 0.5)
    async with network_group(2, "libp2p", shape="none") as (alice, bob), trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, say_nothing, listeners)
        port = listeners[0].socket.getsockname()[1]
        with trio.fail_after(2), pytest.raises(Unreachable, match="did not answer"):
            await alice.connect(f"/ip4/127.0.0.1/tcp/{port}/p2p/{bob.peer_id}")
        nursery.cancel_scope.cancel()


async def test_a_slow_reader_holds_up_nobody() -> None:
    async with victim_and_attacker() as (victim, attacker, _):
        stream = await attacker.open_stream(victim.peer_id, ECHO)
        with trio.move_on_after(0.5):
            for _ in range(100):  # never reads what comes back
                await stream.send_all(bytes(65536))
        await assert_alive(victim)


async def test_too_many_streams_are_refused_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    async with victim_and_attacker() as (victim, attacker, faults):
        caplog.set_level(logging.INFO)
        opened = []

        async def open_one() -> None:
            try:
                opened.append(await attacker.open_stream(victim.peer_id, ECHO))
            except Unreachable:
                pass

        async with trio.open_nursery() as nursery:
            for _ in range(300):
                nursery.start_soon(open_one)
        assert len(opened) <= 256
        assert faults
        await assert_alive(victim)


async def test_protocols_nobody_serves(caplog: pytest.LogCaptureFixture) -> None:
    async with victim_and_attacker() as (victim, attacker, _):
        for number in range(20):
            with pytest.raises(Unreachable):
                await attacker.open_stream(victim.peer_id, TProtocol(f"/nobody/{number}"))
        await assert_alive(victim)
