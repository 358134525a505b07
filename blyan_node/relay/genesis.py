"""How a node that was given nothing but an address learns which network it joins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import trio

from blyan_node.chain.genesis import Genesis, parse_genesis
from blyan_node.codec import Size
from blyan_node.errors import ConfigError, LocalError, PeerError, ProtocolViolation, Unreachable
from blyan_node.p2p import rpc
from blyan_node.p2p.rpc import Method
from blyan_node.p2p.transport import Network, PeerId

MAX_GENESIS = 64 * 1024
PATIENCE = 60.0


@dataclass(frozen=True)
class GetGenesis:
    """Ask for the genesis of the peer's network."""


@dataclass(frozen=True)
class GenesisText:
    """A genesis file."""

    toml: Annotated[str, Size(MAX_GENESIS)]


GET_GENESIS = Method(
    "/blyan/genesis/1", GetGenesis, GenesisText, max_request=16, max_response=MAX_GENESIS + 64, timeout=10
)


def serve_genesis(network: Network, genesis: Genesis) -> None:
    """Tell everybody who asks which network this is."""
    text = GenesisText(genesis.to_toml())

    async def answer(_peer: PeerId, _request: GetGenesis) -> GenesisText:
        return text

    rpc.serve(network, GET_GENESIS, answer, concurrency=8)


async def fetch_genesis(network: Network, bootstrap: tuple[str, ...]) -> Genesis:
    """Ask the bootstrap peers in turn, again and again for PATIENCE seconds.

    The answer is taken on trust: the address was. What is verified from here on is that all else belongs to this
    genesis. Raises LocalError where nobody answers.
    """
    problem: PeerError = Unreachable("no bootstrap address was given")
    with trio.move_on_after(PATIENCE):
        while True:
            for address in bootstrap:
                try:
                    peer = await network.connect(address)
                    answer = await rpc.call(network, peer, GET_GENESIS, GetGenesis())
                    return _parse(peer, answer.toml)
                except PeerError as error:
                    problem = error
            await trio.sleep(1)
    raise LocalError(f"no bootstrap peer told its network ({problem}); check the --bootstrap addresses") from problem


def _parse(peer: PeerId, text: str) -> Genesis:
    try:
        return parse_genesis(text)
    except ConfigError as error:
        raise ProtocolViolation(f"{peer} sent no genesis: {error}") from error
