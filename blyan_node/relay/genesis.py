"""How a node that was given nothing but an address learns which network it joins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import trio

from blyan_node.chain.genesis import MAX_BALANCES, Genesis, parse_genesis
from blyan_node.chain.restart import check_signatures
from blyan_node.codec import Size
from blyan_node.errors import ConfigError, LocalError, PeerError, ProtocolViolation, RuleError, Unreachable
from blyan_node.p2p import rpc
from blyan_node.p2p.rpc import Method
from blyan_node.p2p.transport import Network, PeerId

MAX_GENESIS = 128 * 1024 + 100 * MAX_BALANCES
"""Bytes of the largest genesis file: its balances, and validators and signatures of a restart."""
PATIENCE = 60.0


@dataclass(frozen=True)
class GetGenesis:
    """Ask for the genesis of the peer's network."""


@dataclass(frozen=True)
class GenesisText:
    """A genesis file."""

    toml: Annotated[str, Size(MAX_GENESIS)]


GET_GENESIS = Method(
    "/blyan/genesis/1", GetGenesis, GenesisText, max_request=16, max_response=MAX_GENESIS + 64, timeout=30
)


def serve_genesis(network: Network, genesis: Genesis) -> None:
    """Tell everybody who asks which network this is."""
    text = GenesisText(genesis.to_toml())

    async def answer(_peer: PeerId, _request: GetGenesis) -> GenesisText:
        return text

    rpc.serve(network, GET_GENESIS, answer, concurrency=8)


async def fetch_genesis(network: Network, bootstrap: tuple[str, ...], *, expected: bytes | None = None) -> Genesis:
    """Ask the bootstrap peers in turn, again and again for PATIENCE seconds.

    Without ``expected``, the id of the network to join, the answer is taken on trust: the address was. What is verified
    from here on is that all else belongs to this genesis. Raises LocalError where nobody answers, and at once where
    all bootstrap peers are of other networks.
    """
    problem: PeerError = Unreachable("no bootstrap address was given")
    with trio.move_on_after(PATIENCE):
        while True:
            strangers: list[str] = []
            for address in bootstrap:
                try:
                    peer = await network.connect(address)
                    answer = await rpc.call(network, peer, GET_GENESIS, GetGenesis())
                    genesis = _parse(peer, answer.toml)
                except PeerError as error:
                    problem = error
                    continue
                if expected in (None, genesis.network):
                    return genesis
                strangers.append(f"{peer} is of network {genesis.network.hex()}")
            if strangers and len(strangers) == len(bootstrap):
                raise LocalError(
                    f"no bootstrap peer is of the network to join, {expected.hex() if expected else ''}: "
                    f"{'; '.join(strangers)}. Ask for a new invite"
                )
            await trio.sleep(1)
    raise LocalError(f"no bootstrap peer told its network ({problem}); check the --bootstrap addresses") from problem


def _parse(peer: PeerId, text: str) -> Genesis:
    try:
        genesis = parse_genesis(text)
        if genesis.restart is not None:
            check_signatures(genesis)
    except (ConfigError, RuleError) as error:
        raise ProtocolViolation(f"{peer} sent no genesis: {error}") from error
    return genesis
