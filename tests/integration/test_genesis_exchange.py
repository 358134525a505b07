"""How a node that was invited finds its network, and keeps out of others."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from blyan_node.chain.genesis import Genesis, load_genesis
from blyan_node.chain.keys import Key
from blyan_node.chain.restart import restart_genesis, sign_genesis
from blyan_node.chain.state import genesis_state
from blyan_node.config import NodeConfig
from blyan_node.datadir import DataDir
from blyan_node.errors import LocalError
from blyan_node.node import choose_genesis
from blyan_node.p2p.transport import Network
from blyan_node.relay.genesis import PATIENCE, fetch_genesis, serve_genesis
from tests.support.chains import GENESIS, KEYS
from tests.support.network import network_group

OTHER = Genesis.make("other", {KEYS[0].address: 10}, created_ms=1)


def addresses(*group: Network) -> tuple[str, ...]:
    return tuple(network.addresses()[0] for network in group)


async def test_the_first_peer_of_the_invited_network_is_believed(autojump_clock) -> None:
    async with network_group(3) as (here, wrong, right):
        serve_genesis(wrong, OTHER)
        serve_genesis(right, GENESIS)
        bootstrap = addresses(wrong, right)
        assert await fetch_genesis(here, bootstrap) == OTHER
        assert await fetch_genesis(here, bootstrap, expected=GENESIS.network) == GENESIS


async def test_peers_of_other_networks_only(autojump_clock) -> None:
    async with network_group(3) as (here, *others):
        for network in others:
            serve_genesis(network, OTHER)
        with pytest.raises(LocalError, match=f"no bootstrap peer is of .*{OTHER.network.hex()}.*new invite"):
            await fetch_genesis(here, addresses(*others), expected=GENESIS.network)


async def test_nobody_answers(autojump_clock) -> None:
    async with network_group(2) as (here, silent):
        began = trio.current_time()
        with pytest.raises(LocalError, match="no bootstrap peer told its network"):
            await fetch_genesis(here, addresses(silent), expected=GENESIS.network)
        assert trio.current_time() - began >= PATIENCE


async def test_a_restart_with_a_forged_signature_is_not_taken(autojump_clock) -> None:
    state, cut = genesis_state(GENESIS), GENESIS.network
    fresh = restart_genesis(state, GENESIS, cut, [KEYS[0].address], name="again", created_ms=2)
    signed = sign_genesis(fresh, KEYS[1])
    forged = replace(signed, signatures=(replace(signed.signatures[0], address=KEYS[2].address),))
    async with network_group(3) as (here, liar, honest):
        serve_genesis(liar, forged)
        serve_genesis(honest, signed)
        taken = await fetch_genesis(here, addresses(liar, honest))
        assert taken.signatures == signed.signatures


async def choose(folder: Path, here: Network, **settings: object) -> Genesis:
    return await choose_genesis(NodeConfig(**settings), DataDir(folder), Key(bytes([7]) * 32), here)


async def test_what_an_invite_named_is_what_the_node_joins(
    tmp_path: Path, autojump_clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    invited = GENESIS.network.hex()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    async with network_group(2) as (here, there):
        serve_genesis(there, GENESIS)
        bootstrap = addresses(there)
        assert await choose(tmp_path / "a", here, network=invited, bootstrap=bootstrap) == GENESIS
        assert "as invited" in caplog.text
        assert load_genesis(tmp_path / "a" / "genesis.toml") == GENESIS
        assert await choose(tmp_path / "a", here, network=invited) == GENESIS  # nobody is asked again
        with pytest.raises(LocalError, match=r"genesis.toml is of network .* is to join"):
            await choose(tmp_path / "a", here, network=OTHER.network.hex())
        OTHER.save(tmp_path / "other.toml")
        with pytest.raises(LocalError, match=r"other.toml is of network .* is to join"):
            await choose(tmp_path / "b", here, network=invited, genesis=tmp_path / "other.toml")
        with pytest.raises(LocalError, match="nobody to ask"):
            await choose(tmp_path / "b", here, network=invited)
        assert not (tmp_path / "b" / "genesis.toml").exists()


async def test_who_joins_a_restarted_network_learns_who_signed(
    tmp_path: Path, autojump_clock, caplog: pytest.LogCaptureFixture
) -> None:
    state, cut = genesis_state(GENESIS), GENESIS.network
    fresh = restart_genesis(state, GENESIS, cut, [KEYS[0].address], name="again", created_ms=2)
    signed = sign_genesis(sign_genesis(fresh, KEYS[1]), KEYS[2])
    async with network_group(2) as (here, there):
        serve_genesis(there, signed)
        await choose(tmp_path, here, bootstrap=addresses(there))
    assert f"restarts network {GENESIS.network.hex()}: 25.0 %" in caplog.text
    assert load_genesis(tmp_path / "genesis.toml").signatures == signed.signatures


async def test_a_data_directory_remembers_the_genesis_that_it_was_given(tmp_path: Path, autojump_clock) -> None:
    OTHER.save(tmp_path / "other.toml")
    (tmp_path / "data").mkdir()
    async with network_group(1) as (here,):
        assert await choose(tmp_path / "data", here, genesis=tmp_path / "other.toml") == OTHER
        assert await choose(tmp_path / "data", here) == OTHER
        GENESIS.save(tmp_path / "test.toml")
        assert await choose(tmp_path / "data", here, genesis=tmp_path / "test.toml") == GENESIS
        assert load_genesis(tmp_path / "data" / "genesis.toml") == OTHER  # the chain there decides who is right
