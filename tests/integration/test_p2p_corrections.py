"""Each correction of py-libp2p 0.8.1 that no other test needs. Each test fails without its correction."""

from __future__ import annotations

import time

import pytest
import trio
from libp2p.network.health.monitor import ConnectionHealthMonitor
from libp2p.peer.id import ID
from libp2p.peer.peerstore import env_to_send_in_RPC
from libp2p.pubsub.pb import rpc_pb2
from libp2p.stream_muxer.yamux import yamux
from multiaddr import Multiaddr

from blyan_node.errors import ChannelClosed, Unreachable
from blyan_node.p2p import corrections, gossip
from blyan_node.p2p.host import Libp2pNetwork
from blyan_node.p2p.transport import Network, PeerId, Stream
from tests.support.network import Ground, eventually, network_group, secret

ECHO = "/test/echo/1"


async def echo(stream: Stream) -> None:
    while data := await stream.receive_some(65536):
        await stream.send_all(data)


def inside(network: Network) -> Libp2pNetwork:
    assert isinstance(network, Libp2pNetwork)
    return network


async def test_frames_fit_into_noise_messages() -> None:
    async with network_group(2, "libp2p") as (alice, bob):
        bob.set_handler(ECHO, echo)
        stream = await alice.open_stream(bob.peer_id, ECHO)
        connection = inside(alice)._swarm.connections[ID.from_string(bob.peer_id)][0].muxed_conn
        assert isinstance(connection, yamux.Yamux)
        sizes: list[int] = []
        state = connection.secured_conn.conn.noise_state  # type: ignore[attr-defined]
        encrypt = state.encrypt
        state.encrypt = lambda data: sizes.append(len(data)) or encrypt(data)
        await stream.send_all(bytes(200_000))
        assert max(sizes) == corrections.NOISE_PLAINTEXT
        assert len([size for size in sizes if size > 1000]) == 4, "not two messages for each frame"


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


async def test_a_peer_that_is_gone_without_a_packet_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:  # H10
    async with network_group(2, "libp2p") as (alice, bob):
        swarm = inside(alice)._swarm
        assert isinstance(swarm._health_monitor, ConnectionHealthMonitor)
        config = swarm.connection_config
        assert config.health_initial_delay + config.health_check_interval + config.ping_timeout < 10
        config.ping_timeout = 0.3  # for the test's sake
        config.health_check_interval = 0.1
        config.health_warmup_window = 0
        connection = inside(bob)._swarm.connections[ID.from_string(alice.peer_id)][0].muxed_conn

        async def swallow(_data: bytes) -> None:
            await trio.lowlevel.checkpoint()

        monkeypatch.setattr(connection, "_write_frame", swallow)  # a black hole: bob's TCP lives, nothing comes
        await eventually(lambda: not alice.neighbours(), within=8)


async def test_a_cancelled_write_does_not_break_the_connection() -> None:
    """Cut in the middle, a Noise message leaves the nonces out of step: every stream of the connection would die."""
    async with network_group(2, "libp2p") as (alice, bob):
        paused = trio.Event()

        async def sleepy(stream: Stream) -> None:
            await paused.wait()
            await echo(stream)

        bob.set_handler("/test/sleepy/1", sleepy)
        bob.set_handler(ECHO, echo)
        for delay in (0.0, 0.0005, 0.001, 0.002, 0.004, 0.008):
            stream = await alice.open_stream(bob.peer_id, "/test/sleepy/1")
            with trio.move_on_after(delay):
                await stream.send_all(bytes(200_000))
            await stream.reset()
        stream = await alice.open_stream(bob.peer_id, ECHO)
        await stream.send_all(b"still in step")
        with trio.fail_after(5):
            assert await stream.receive_some(64) == b"still in step"


async def test_a_failing_muxer_ends_its_connection_not_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(_connection: yamux.Yamux) -> None:
        await trio.sleep(0.1)
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(yamux.Yamux, "_stale_stream_sweeper", fail)
        async with network_group(2, "libp2p") as (alice, bob):
            await eventually(lambda: not alice.neighbours() and not bob.neighbours())
            patch.undo()
            await alice.connect(bob.addresses()[0])
            bob.set_handler(ECHO, echo)
            await (await alice.open_stream(bob.peer_id, ECHO)).send_all(b"x")


async def test_a_cancelled_stream_is_closed() -> None:
    async with network_group(2, "libp2p") as (alice, bob):
        bob.set_handler(ECHO, echo)
        stream = await alice.open_stream(bob.peer_id, ECHO)
        with trio.move_on_after(0.05):
            await stream.receive_some(1)
        with pytest.raises(ChannelClosed):
            await stream.send_all(b"x")


async def test_the_257th_stream_is_refused_in_time(monkeypatch: pytest.MonkeyPatch) -> None:  # H5
    from blyan_node.p2p import host

    monkeypatch.setattr(host, "CONNECT_SECONDS", 1.0)
    async with network_group(2, "libp2p") as (alice, bob):
        bob.set_handler(ECHO, echo)
        connection = inside(alice)._swarm.connections[ID.from_string(bob.peer_id)][0].muxed_conn
        connection.stream_backlog_semaphore = trio.Semaphore(4)  # type: ignore[attr-defined]
        streams = [await alice.open_stream(bob.peer_id, ECHO) for _ in range(4)]
        with trio.fail_after(5), pytest.raises(Unreachable, match="no stream within"):
            await alice.open_stream(bob.peer_id, ECHO)
        await streams[0].aclose()
        await alice.open_stream(bob.peer_id, ECHO)


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
            connection = inside(network)._swarm.connections[ID.from_string(peer.peer_id)][0].muxed_conn
            await eventually(lambda: len(connection.streams) < 8)  # noqa: B023


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
