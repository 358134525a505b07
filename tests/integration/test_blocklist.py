"""The operator's file of blocked peers, and finding one another again once it is empty."""

from __future__ import annotations

import logging
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from blyan_node.errors import Unreachable
from blyan_node.p2p.blocklist import MOST_BYTES, Blocklist
from blyan_node.p2p.peers import Peers
from blyan_node.p2p.transport import Network
from tests.support.network import Kind, eventually, network_group, peer_number

SOON = 3.0
"""Seconds in which a change of the file takes effect, redialling included."""


@asynccontextmanager
async def heeding(network: Network, path: Path, *bootstrap: str) -> AsyncIterator[Peers]:
    """A node that keeps among peers and heeds the file."""
    peers = Peers(network, bootstrap=bootstrap, rng=random.Random(7))
    async with trio.open_nursery() as nursery:
        await nursery.start(Blocklist(peers, path).run)
        await nursery.start(peers.run)
        yield peers
        nursery.cancel_scope.cancel()


def block(path: Path, *networks: Network) -> None:
    path.write_text("".join(f"{network.peer_id}\n" for network in networks))


async def test_a_file_splits_a_net_and_heals_it(autojump_clock: trio.testing.MockClock, tmp_path: Path) -> None:
    """However long the split has lasted: who is blocked is neither dialled nor forgotten."""
    async with network_group(4, shape="none") as group, AsyncExitStack() as stack:
        files = [tmp_path / str(index) for index in range(4)]
        for network, file in zip(group, files, strict=True):
            await stack.enter_async_context(heeding(network, file, group[0].addresses()[0]))
        await eventually(lambda: all(len(network.neighbours()) == 3 for network in group))
        for split in (group[:2], group[2:]), (group[1::2], group[::2]):
            for index, network in enumerate(group):
                block(files[index], *next(side for side in split if network not in side))
            await eventually(lambda: all(len(network.neighbours()) == 1 for network in group), within=SOON)
            await trio.sleep(600)
            assert all(len(network.neighbours()) == 1 for network in group)
            files[0].unlink()
            for file in files[1:]:
                file.write_text("")
            await eventually(lambda: all(len(network.neighbours()) == 3 for network in group), within=SOON)


async def test_real_hosts_find_each_other_again(tmp_path: Path) -> None:
    kind: Kind = "libp2p"
    async with network_group(2, kind) as (alice, bob), heeding(alice, tmp_path / "a"), heeding(bob, tmp_path / "b"):
        block(tmp_path / "a", bob)
        await eventually(lambda: not alice.neighbours() and not bob.neighbours())
        await trio.sleep(1)  # in which bob, who is not told, dials
        (tmp_path / "a").unlink()
        await eventually(lambda: bool(alice.neighbours() and bob.neighbours()))


async def test_who_is_blocked_at_the_start_is_not_dialled(
    autojump_clock: trio.testing.MockClock, tmp_path: Path
) -> None:
    async with network_group(2, shape="none") as (alice, bob):
        block(tmp_path / "blocked", bob)
        async with heeding(alice, tmp_path / "blocked", bob.addresses()[0]) as peers:
            with pytest.raises(Unreachable, match="blocked"):
                await peers.ensure(bob.peer_id)
            await trio.sleep(100)
            assert not bob.neighbours()


async def test_what_is_no_peer_is_said_once_and_skipped(
    autojump_clock: trio.testing.MockClock, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "blocked"
    async with network_group(2) as (alice, bob), heeding(alice, path):
        with caplog.at_level(logging.WARNING):
            path.write_text(f"# rivals\nnonsense\n\n  {bob.peer_id} # Bob\n")
            await eventually(lambda: not alice.neighbours(), within=SOON)
            path.write_text(f"nonsense\n{peer_number(8)}\n{bob.peer_id}\n")
            await trio.sleep(60)
        assert not alice.neighbours()
        assert len([record for record in caplog.records if "nonsense" in record.message]) == 1


@pytest.mark.parametrize("content", [b"\xff\xfe", bytes(MOST_BYTES + 1), None])
async def test_a_file_that_cannot_be_read_changes_nothing(
    autojump_clock: trio.testing.MockClock, tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes | None
) -> None:
    path = tmp_path / "blocked"
    async with network_group(2) as (alice, bob), heeding(alice, path):
        block(path, bob)
        await eventually(lambda: not alice.neighbours(), within=SOON)
        with caplog.at_level(logging.WARNING):
            path.unlink()
            path.mkdir() if content is None else path.write_bytes(content)
            await trio.sleep(60)
        assert not alice.neighbours()
        assert len([record for record in caplog.records if "cannot be read" in record.message]) == 1


async def test_who_hangs_up_on_us_is_dialled_ever_less_often(
    autojump_clock: trio.testing.MockClock, tmp_path: Path
) -> None:
    """A peer that blocks us may let us in, see who we are, and hang up."""
    calls = 0
    async with network_group(2, shape="none") as (alice, bob), bob.watch_peers() as changes:
        async with heeding(alice, tmp_path / "none", bob.addresses()[0]):
            with trio.move_on_after(200):
                async for change in changes:
                    if change.connected:
                        calls += 1
                        await bob.disconnect(alice.peer_id)
    assert 6 <= calls <= 20
