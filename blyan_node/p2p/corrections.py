"""What py-libp2p 0.8.1 gets wrong for us outside gossip, each with its correction and its reason.

The letters are those of the measurements in ``docs/design.md``. Gossip's are in :mod:`blyan_node.p2p.gossip`, those
between TCP and streams in :mod:`blyan_node.p2p.wire`. Each has a test that fails without it
(``tests/integration/test_p2p_corrections.py``), so that it can be dropped when upstream mends it.
"""

from __future__ import annotations

import errno
import socket

import trio
from libp2p.host.basic_host import BasicHost
from libp2p.network import swarm as swarm_module
from libp2p.network.auto_connector import AutoConnector
from libp2p.network.config import ConnectionConfig, RetryConfig
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID

from blyan_node.errors import AlreadyRunning, ConfigError

MOST_CONNECTIONS = 256


def apply() -> None:
    """Set the constant of the library that has no other handle. Idempotent; it is the same for every host."""
    # H6: after *every* dial the library waits this long for a failure before it looks at its success
    swarm_module._HAPPY_EYEBALLS_DELAY = 0


def connection_config() -> ConnectionConfig:
    """The settings of the swarm."""
    return ConnectionConfig(
        # see also NoAutoConnector
        min_connections=0,
        low_watermark=0,
        high_watermark=MOST_CONNECTIONS,
        max_connections=MOST_CONNECTIONS,
        inbound_upgrade_timeout=10,
        outbound_upgrade_timeout=10,
        # H10: that a peer vanished without a packet is noticed by our muxer, without a stream for each probe
        enable_health_monitoring=False,
    )


def retry_config() -> RetryConfig:
    """One attempt for each dial: redialling is done by Peers, with its own backoff."""
    return RetryConfig(max_retries=0)


def forget_failed_dials(swarm: Swarm, peer: ID) -> None:
    """H8: the library refuses to dial a peer for 60 s after a failure."""
    swarm.unblock_peer(peer)


class NoAutoConnector(AutoConnector):
    """Dials nobody. Peers decides whom to dial, and a peer that was disconnected shall stay so.

    The stock one redials whomever the peer store knows until half of the *high* watermark is reached, whatever the
    low one says; gossip feeds the peer store.
    """

    async def maybe_connect(self) -> None:
        """Do nothing (the stock one dials here)."""
        await trio.lowlevel.checkpoint()


class QuietHost(BasicHost):
    """A host that does not open streams of its own accord."""

    def _schedule_identify(self, peer_id: ID, *, reason: str) -> None:
        """Do not ask peers to identify themselves, though we answer those who ask.

        The library asks from system tasks, where an exception ends trio itself; what it learns is not used here.
        """


def check_port(host: str, port: int) -> None:
    """H11: the library listens with SO_REUSEPORT, so a second host would silently share the port.

    Raises AlreadyRunning if the port is taken, ConfigError if the address is not one of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise AlreadyRunning(
                    f"port {port} on {host} is in use: stop what uses it, or choose another port (0 lets the system)"
                ) from error
            raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror}") from error
