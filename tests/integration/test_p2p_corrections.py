"""Each correction of py-libp2p 0.8.1 that no other test needs. Each test fails without its correction."""

from __future__ import annotations

import time

import pytest
import trio
from libp2p.peer.id import ID
from libp2p.peer.peerstore import env_to_send_in_RPC
from libp2p.pubsub.pb import rpc_pb2
from multiaddr import Multiaddr

from blyan_node.errors import ChannelClosed, Unreachable
from blyan_node.p2p import gossip
from blyan_node.p2p.guard import VIOLATION
from blyan_node.p2p.host import Libp2pNetwork
from blyan_node.p2p.transport import Network, PeerId, Stream
from blyan_node.p2p.yamux import SILENT_PULSES, Yamux, YamuxSettings
from blyan_node.p2p.yamux_frames import Flag, Kind, encode
from tests.support.network import Ground, eventually, network_group, secret

ECHO = "/test/echo/1"


async def echo(stream: Stream) -> None:
    while data := await stream.receive_some(65536):
        await stream.send_all(data)


def inside(network: Network) -> Libp2pNetwork:
    assert isinstance(network, Libp2pNetwork)
    return network


def muxer_of(network: Network, peer: Network) -> Yamux:
    muxer = inside(network)._swarm.connections[ID.from_string(peer.peer_id)][0].muxed_conn
    assert isinstance(muxer, Yamux)
    return muxer


async def test_dialling_is_not_delayed() -> None:  # H6: 250 ms after every dial of the library's own
    async with network_group(2, "libp2p", shape="none") as (alice, bob):
        swarm, identity = inside(alice)._swarm, ID.from_string(bob.peer_id)
        swarm.peerstore.add_addrs(identity, [Multiaddr(bob.addresses()[0].rsplit("/p2p/", 1)[0])], 60)
        delays = []
        for _ in range(3):
            begun = time.perf_counter()
            await swarm.dial_peer(identity)
            delays.append(time.perf_counter() - begun)
            await alice.disconnect(bob.peer_id)
            await eventually(lambda: not bob.neighbours())
        assert min(delays) < 0.2


async def test_nobody_is_dialled_unasked() -> None:
    async with network_group(2, "libp2p", shape="none") as (alice, bob):
        swarm, identity = inside(alice)._swarm, ID.from_string(bob.peer_id)
        swarm.peerstore.add_addrs(identity, [Multiaddr(bob.addresses()[0].rsplit("/p2p/", 1)[0])], 60)
        await swarm.auto_connector.maybe_connect()
        assert alice.neighbours() == frozenset()


async def test_the_host_opens_no_streams_by_itself() -> None:
    async with network_group(2, "libp2p") as (alice, bob):
        host = inside(alice)._host
        host._schedule_identify(ID.from_string(bob.peer_id), reason="test")
        assert not host._identify_inflight
        assert not host._identify_tasks


async def test_sequence_numbers_do_not_begin_at_whole_seconds() -> None:  # G2
    async with Ground("libp2p").open(0) as alice:
        assert inside(alice)._gossip().counter > time.time() * 1e8


async def test_a_peer_that_is_gone_without_a_packet_is_noticed() -> None:  # H10
    async with network_group(2, "libp2p") as (alice, bob):
        assert YamuxSettings().pulse * SILENT_PULSES < 10
        muxer_of(alice, bob)._settings = YamuxSettings(pulse=0.1)  # for the test's sake

        async def swallow(_data: bytes) -> None:
            await trio.lowlevel.checkpoint()

        muxer_of(bob, alice).secured_conn.write = swallow  # type: ignore[method-assign]  # bob's TCP lives
        await eventually(lambda: not alice.neighbours(), within=8)


async def test_a_failing_muxer_ends_its_connection_not_the_host() -> None:
    async with network_group(2, "libp2p") as (alice, bob):
        bob.set_handler(ECHO, echo)
        muxer_of(alice, bob)._next_batch = lambda: 1 / 0  # type: ignore[method-assign,assignment,return-value]
        with pytest.raises((ChannelClosed, Unreachable)):
            await alice.open_stream(bob.peer_id, ECHO)
        await eventually(lambda: not alice.neighbours() and not bob.neighbours())
        await alice.connect(bob.addresses()[0])
        await (await alice.open_stream(bob.peer_id, ECHO)).send_all(b"x")


async def test_a_cancelled_send_resets_its_stream_and_a_cancelled_receive_takes_nothing() -> None:
    async with network_group(2, "libp2p") as (alice, bob):

        async def sleepy(stream: Stream) -> None:
            await trio.sleep_forever()

        bob.set_handler("/test/sleepy/1", sleepy)
        bob.set_handler(ECHO, echo)
        witness = await alice.open_stream(bob.peer_id, ECHO)
        for delay in (0.0, 0.001, 0.004, 0.02):
            stream = await alice.open_stream(bob.peer_id, "/test/sleepy/1")
            with trio.move_on_after(delay):
                await stream.send_all(bytes(2_000_000))
            with pytest.raises(ChannelClosed):
                await stream.send_all(b"x")
            with trio.move_on_after(delay):
                await witness.receive_some(1)
            await witness.send_all(b"still in step")
            with trio.fail_after(5):
                assert await witness.receive_some(64) == b"still in step"


async def test_who_breaks_the_muxers_protocol_is_penalised() -> None:
    async with network_group(2, "libp2p") as (alice, bob):
        muxer_of(alice, bob).push(encode(Kind.DATA, Flag.SYN, 4711, 2**32 - 1))
        await eventually(lambda: not alice.neighbours() and not bob.neighbours())
        assert inside(bob)._scores.points(alice.peer_id) > VIOLATION / 2


async def test_one_stream_too_many_is_refused_at_once() -> None:  # H5: the stock muxer hangs at its 257th
    async with network_group(2, "libp2p") as (alice, bob):
        bob.set_handler(ECHO, echo)
        muxer = muxer_of(alice, bob)
        streams = [await alice.open_stream(bob.peer_id, ECHO) for _ in range(4)]
        muxer._settings = YamuxSettings(streams=4)
        with trio.fail_after(1), pytest.raises(Unreachable, match="streams are open already"):
            await alice.open_stream(bob.peer_id, ECHO)
        muxer._settings = YamuxSettings(streams=300)
        streams += [await alice.open_stream(bob.peer_id, ECHO) for _ in range(240)]
        for stream in streams:
            await stream.aclose()
        await eventually(lambda: muxer.open_streams < 8)


async def test_streams_that_ended_leave_nothing_behind() -> None:  # H5: leaked streams count
    async with network_group(2, "libp2p") as (alice, bob):
        bob.set_handler(ECHO, echo)
        for _ in range(300):
            stream = await alice.open_stream(bob.peer_id, ECHO)
            await stream.send_all(b"x")
            await stream.close_write()
            assert await stream.receive_some(1) == b"x"
            assert await stream.receive_some(1) == b""
            await stream.aclose()
        for network, peer in ((alice, bob), (bob, alice)):
            await eventually(lambda: muxer_of(network, peer).open_streams < 8)  # noqa: B023


async def test_the_listener_is_gone_when_the_context_is_left() -> None:  # H2
    async with Ground("libp2p").open(0) as alice:
        port = int(alice.addresses()[0].split("/")[4])
    with pytest.raises(OSError, match="connect"):
        await trio.open_tcp_stream("127.0.0.1", port)


async def test_listening_everywhere_is_told_as_an_address_that_can_be_dialled() -> None:
    ground = Ground("libp2p")
    async with ground.open(0, listen="/ip4/0.0.0.0/tcp/0") as alice, ground.open(1) as bob:
        (address,) = alice.addresses()
        assert "0.0.0.0" not in address
        assert await bob.connect(address) == alice.peer_id


async def test_outbound_gossip_holds_a_burst() -> None:  # G4: the stock queue drops all but 32
    async with network_group(2, "libp2p") as (alice, bob):
        queues = inside(alice)._gossip().peer_queues
        await eventually(lambda: ID.from_string(bob.peer_id) in queues)
        queue = queues[ID.from_string(bob.peer_id)]
        rpc = rpc_pb2.RPC(publish=[rpc_pb2.Message(data=b"x")])
        assert all(queue.push(rpc) for _ in range(1000))


async def test_outbound_gossip_is_bounded_in_bytes() -> None:  # G4
    queue = gossip.ByteBoundedQueue()
    rpc = rpc_pb2.RPC(publish=[rpc_pb2.Message(data=bytes(1024 * 1024 - 200))])
    assert [queue.push(rpc) for _ in range(17)] == [True] * 16 + [False]
    await queue.pop()
    assert queue.push(rpc)


async def test_gossip_keeps_no_payloads_to_detect_equivocation() -> None:  # G9
    async with network_group(2, "libp2p") as (alice, bob):
        async with alice.subscribe("t", _anything, capacity=4), bob.subscribe("t", _anything, capacity=4) as queue:
            await alice.publish("t", b"x")
            with trio.fail_after(5):
                await queue.receive()
        for network in (alice, bob):
            assert not inside(network)._gossip().router.equivocation_detection  # type: ignore[attr-defined]


async def test_peers_named_in_a_prune_are_not_dialled() -> None:  # G11
    async with network_group(3, "libp2p", shape="none") as (alice, bob, carol):
        await alice.connect(bob.addresses()[0])
        record, _ = env_to_send_in_RPC(inside(carol)._host)
        named = rpc_pb2.PeerInfo(peerID=ID.from_string(carol.peer_id).to_bytes(), signedPeerRecord=record)
        router = inside(alice)._gossip().router
        await router.handle_prune(  # type: ignore[attr-defined]
            rpc_pb2.ControlPrune(topicID="t", peers=[named]), ID.from_string(bob.peer_id)
        )
        assert alice.neighbours() == {bob.peer_id}


async def test_writers_of_one_gossip_stream_do_not_mix() -> None:  # G12
    async with network_group(2, "libp2p", shape="none") as (alice, bob):
        faults: list[str] = []
        inside(bob)._gossip()._penalise = lambda _peer, _points, why: faults.append(why)
        heard: list[bytes] = []

        def remember(_origin: PeerId, data: bytes) -> bool:
            heard.append(data[:1])
            return True

        async with alice.subscribe("t", _anything, capacity=1), bob.subscribe("t", remember, capacity=64):
            await alice.connect(bob.addresses()[0])
            pubsub, identity = inside(alice)._gossip(), ID.from_string(bob.peer_id)
            await eventually(lambda: identity in pubsub.peers)
            async with trio.open_nursery() as nursery:
                for fill in range(6):
                    rpc = _message(fill)
                    nursery.start_soon(pubsub.write_msg, pubsub.peers[identity], rpc)
            await eventually(lambda: len(heard) == 6)
        assert faults == []


def _message(fill: int) -> rpc_pb2.RPC:
    """A well-signed RPC of many frames."""
    from libp2p.crypto.secp256k1 import create_new_key_pair

    key = create_new_key_pair(secret(3))
    message = rpc_pb2.Message(
        data=bytes([fill]) * 200_000,
        topicIDs=["t"],
        from_id=ID.from_pubkey(key.public_key).to_bytes(),
        seqno=(fill + 1).to_bytes(8, "big"),
    )
    message.signature = key.private_key.sign(b"libp2p-pubsub:" + message.SerializeToString())
    return rpc_pb2.RPC(publish=[message])


def _anything(_origin: PeerId, _data: bytes) -> bool:
    return True
