"""Bootstrap, redialling, the address book and the exchange of peers."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from blyan_node.errors import ConfigError, Unreachable
from blyan_node.p2p.memory import MemoryHub
from blyan_node.p2p.peers import BOOK_PEERS, EXCHANGE, LAST_DELAY, PEER_ADDRESSES, Introduction, Peers
from blyan_node.p2p.rpc import call
from blyan_node.p2p.transport import Network, PeerId
from tests.support.network import Ground, Kind, eventually, network_group, peer_number, secret


@asynccontextmanager
async def running(network: Network, *bootstrap: str, path: Path | None = None, target: int = 8) -> AsyncIterator[Peers]:
    peers = Peers(network, bootstrap=bootstrap, path=path, target=target, rng=random.Random(7))
    async with trio.open_nursery() as nursery:
        await nursery.start(peers.run)
        yield peers
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("address", ["bootstrap.example.org:4001", "/ip4/127.0.0.1/tcp/4001", ""])
async def test_a_malformed_bootstrap_address_is_said_at_once(address: str) -> None:
    async with Ground("memory").open(0) as alice:
        with pytest.raises(ConfigError, match="bootstrap address"):
            Peers(alice, bootstrap=(address,))


@pytest.mark.parametrize("kind", ["memory", "libp2p"])
async def test_one_bootstrap_address_leads_to_everybody(kind: Kind) -> None:
    async with network_group(4, kind, shape="none") as group, AsyncExitStack() as stack:
        await stack.enter_async_context(running(group[0]))
        for network in group[1:]:
            await stack.enter_async_context(running(network, group[0].addresses()[0]))
        await eventually(lambda: all(len(network.neighbours()) == 3 for network in group))


async def test_a_late_bootstrap_peer_is_found_and_the_wait_is_told(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    hub = MemoryHub(latency=0.01)
    async with hub.open(secret(1)) as bob:
        address = bob.addresses()[0]
    async with hub.open(secret(0)) as alice, running(alice, address):
        with caplog.at_level(logging.WARNING):
            await trio.sleep(100)
        attempts = [record for record in caplog.records if "bootstrap peer not reached" in record.message]
        assert 6 <= len(attempts) <= 20, "it doubles, up to a limit"
        assert "trying again in" in attempts[0].message
        async with hub.open(secret(1), listen=address.rsplit("/p2p/", 1)[0]) as bob:
            await eventually(lambda: bob.peer_id in alice.neighbours(), within=1.5 * LAST_DELAY + 1)


async def test_a_node_whose_neighbours_vanish_finds_them_again(autojump_clock: trio.testing.MockClock) -> None:
    hub = MemoryHub(latency=0.01)
    async with network_group(4, hub=hub, shape="none") as group, AsyncExitStack() as stack:
        for network in group:
            await stack.enter_async_context(running(network, group[0].addresses()[0]))
        await eventually(lambda: all(len(network.neighbours()) == 3 for network in group))
        hub.partition([group[3].peer_id])
        assert group[3].neighbours() == frozenset()
        await trio.sleep(300)
        hub.heal()
        await eventually(lambda: len(group[3].neighbours()) == 3, within=1.5 * LAST_DELAY + 1)


async def test_the_book_outlives_the_node(autojump_clock: trio.testing.MockClock, tmp_path: Path) -> None:
    hub = MemoryHub()
    book = tmp_path / "peers.json"
    async with hub.open(secret(1)) as bob, running(bob):
        async with hub.open(secret(0)) as alice, running(alice, bob.addresses()[0], path=book):
            await eventually(lambda: bool(alice.neighbours()))
        assert json.loads(book.read_text())["peers"] == {bob.peer_id: list(bob.addresses())}
        async with hub.open(secret(0)) as alice, running(alice, path=book):
            await eventually(lambda: alice.neighbours() == {bob.peer_id})


DAMAGED = ["", "{", "[]", '{"peers": 3}', '{"peers": {"x": [7]}}', "\x00\xff", '{"peers":{"a":5}}']


@pytest.mark.parametrize("content", DAMAGED)
async def test_a_damaged_book_is_begun_anew(content: str, tmp_path: Path) -> None:
    book = tmp_path / "peers.json"
    book.write_bytes(content.encode("latin-1"))
    async with Ground("memory").open(0) as alice:
        assert Peers(alice, path=book).known() == {}


async def test_what_is_learnt_is_checked_and_bounded() -> None:
    hub = MemoryHub()
    async with hub.open(secret(0)) as alice, hub.open(secret(1)) as bob:
        peers = Peers(alice)
        good = bob.addresses()[0]
        nowhere = good.replace("127.0.0.1", "0.0.0.0")
        peers.learn(bob.peer_id, ["nonsense", alice.addresses()[0], good, nowhere, "/" * 5000])
        peers.learn(PeerId("nobody"), [good])
        peers.learn(alice.peer_id, alice.addresses())
        assert peers.known() == {bob.peer_id: (good,)}
        peers.learn(bob.peer_id, [good.replace("tcp/1", f"tcp/{port}") for port in range(1, 9)])
        assert len(peers.known()[bob.peer_id]) == PEER_ADDRESSES


async def test_the_book_is_bounded_and_keeps_bootstrap_peers() -> None:
    hub = MemoryHub()
    async with hub.open(secret(0)) as alice, hub.open(secret(1)) as bob:
        peers = Peers(alice, bootstrap=bob.addresses())
        for number in range(1, BOOK_PEERS + 50):
            peer = peer_number(number)
            peers.learn(peer, [f"/ip4/127.0.0.1/tcp/4001/p2p/{peer}"])
        assert len(peers.known()) == BOOK_PEERS
        assert bob.peer_id in peers.known()


async def test_ensure_connects_once_or_says_why_not(autojump_clock: trio.testing.MockClock) -> None:
    hub = MemoryHub(latency=0.1)
    async with hub.open(secret(0)) as alice, hub.open(secret(1)) as bob:
        peers = Peers(alice)
        with pytest.raises(Unreachable, match="no address"):
            await peers.ensure(bob.peer_id)
        dead = bob.addresses()[0].replace("tcp/1", "tcp/2")
        peers.learn(bob.peer_id, [dead, *bob.addresses()])
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(peers.ensure, bob.peer_id)
        assert alice.neighbours() == {bob.peer_id}
        assert peers.known()[bob.peer_id][0] == bob.addresses()[0], "what worked comes first"
        await alice.disconnect(bob.peer_id)
        hub.kill(bob.peer_id)
        with pytest.raises(Unreachable, match="cannot connect"):
            await peers.ensure(bob.peer_id)


async def test_too_many_neighbours_are_sent_away(autojump_clock: trio.testing.MockClock) -> None:
    async with network_group(5, shape="none") as group:
        async with trio.open_nursery() as nursery:
            await nursery.start(Peers(group[0], most=2).run)
            for network in group[1:]:
                await network.connect(group[0].addresses()[0])
                await trio.sleep(0.1)
            assert len(group[0].neighbours()) == 2
            nursery.cancel_scope.cancel()


async def test_a_stranger_is_not_passed_on_until_met(autojump_clock: trio.testing.MockClock) -> None:
    async with network_group(2) as (alice, bob), running(alice) as peers:
        rumour = peer_number(9)
        peers.learn(rumour, [f"/ip4/127.0.0.1/tcp/9/p2p/{rumour}"])
        answer = await call(bob, alice.peer_id, EXCHANGE, Introduction(bob.addresses()))
        assert rumour not in [acquaintance.peer for acquaintance in answer.peers]
        assert bob.peer_id in peers.known()
