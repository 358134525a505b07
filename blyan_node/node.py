"""The composition root: open resources in the order in which they need each other, start tasks, wait.

What is opened first is closed last, so the order of the ``with`` statements below is the order of shutdown too.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import trio

from blyan_node.api.app import create_app
from blyan_node.api.auth import Access
from blyan_node.api.keys import KeyFile
from blyan_node.api.limits import Terms
from blyan_node.api.serve import api_url, open_api_listener, serve_api
from blyan_node.api.signin import SignIn
from blyan_node.api.usage import Usage
from blyan_node.canary import Canary
from blyan_node.chain.blobs import BlobStore
from blyan_node.chain.checkpoint import parse_checkpoint
from blyan_node.chain.genesis import Genesis, load_genesis
from blyan_node.chain.keys import Key, load_or_create_key, parse_address, show_address, unused_mark
from blyan_node.chain.mempool import Mempool
from blyan_node.chain.replica import Replica
from blyan_node.chain.restart import check_signatures
from blyan_node.chain.retention import Retention
from blyan_node.chain_service import NodeChainService
from blyan_node.config import JOINED, NodeConfig
from blyan_node.datadir import DataDir, Running, open_data_dir
from blyan_node.errors import LocalError
from blyan_node.inference import journal
from blyan_node.inference.challenge import Challenger
from blyan_node.inference.heart import Heart
from blyan_node.inference.holder import Holder
from blyan_node.inference.library import Library
from blyan_node.inference.pipeline import Pipeline
from blyan_node.inference.session import Entry
from blyan_node.inference.stage import Stage
from blyan_node.inference.swarm import SwarmView
from blyan_node.logs import start_logging
from blyan_node.model.device import memory_for_layers, pick_device
from blyan_node.model.shard import configure
from blyan_node.p2p.blocklist import Blocklist
from blyan_node.p2p.host import open_host
from blyan_node.p2p.peers import Peers
from blyan_node.p2p.transport import Network
from blyan_node.relay.accuser import Accuser
from blyan_node.relay.author import Author
from blyan_node.relay.blobs import BlobExchange
from blyan_node.relay.blocks import Relay
from blyan_node.relay.finality import Finality
from blyan_node.relay.genesis import fetch_genesis, serve_genesis
from blyan_node.relay.records import Submissions
from blyan_node.service import NodeService
from blyan_node.worker import Workers, open_workers

T = TypeVar("T")

log = logging.getLogger(__name__)

DEFAULT_CONTEXT = 4096
FINISH = 4.0  # seconds that generations under way get to end when the node is asked to stop


def run(config: NodeConfig) -> None:
    """Run a node until SIGINT or SIGTERM. Raises BlyanError, with what to do, where it cannot start."""
    trio.run(_main, config, strict_exception_groups=True)


async def _main(config: NodeConfig) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals, open_data_dir(config.data_dir) as data:
        key = load_or_create_key(data.key)
        configure(config.threads)
        async with (
            open_workers() as workers,
            open_host(key.secret, listen=config.listen, announce=config.announce) as network,
        ):
            start_logging(level=config.log_level, form=config.log_format, node=f"…{network.peer_id[-6:]}")
            genesis = await _unless_signalled(signals, partial(choose_genesis, config, data, key, network))
            if genesis is None:
                return
            checkpoint = None if config.checkpoint is None else parse_checkpoint(config.checkpoint)
            retention = Retention(bodies=None) if config.archive else Retention()
            with Replica.open(data.chain, genesis, retention=retention, checkpoint=checkpoint) as replica:
                _heed_lost_votes(replica, unused_mark(data.key))
                await _serve(assemble(config, data, key, replica, network, workers), config, data, signals)


def _heed_lost_votes(replica: Replica, unused: Path) -> None:
    """Where the chain's database is new but the key is not, what the key has signed is lost: it must not contradict it.

    See :func:`blyan_node.chain.tendermint.abstain_after_loss`.
    """
    if replica.created:
        replica.finals.set_abstain(0 if unused.exists() else None)
        replica.flush()
    unused.unlink(missing_ok=True)


def assemble(
    config: NodeConfig, data: DataDir, key: Key, replica: Replica, network: Network, workers: Workers
) -> NodeService:
    """Put the parts of a node together; nothing runs yet. Raises ConfigError, DiskFull."""
    device, dtype = pick_device(config.device, config.dtype)
    memory = config.memory_limit or memory_for_layers(device)
    context = config.context_limit or DEFAULT_CONTEXT
    peers = Peers(network, bootstrap=config.bootstrap, path=data.peers)
    view = SwarmView()
    relay = Relay(network, replica, key, workers.disk)
    finality = Finality(network, peers, relay, key, workers.disk)
    submissions = Submissions(network, peers, replica, Mempool(replica.genesis.network), key)
    exchange = BlobExchange(network, peers, BlobStore(data.blobs, cap=config.disk_limit), workers.disk)
    library = Library(replica, exchange, view, workers.disk, config.models)
    pipeline = Pipeline(network, peers)
    stage = Stage(network, pipeline, workers.compute, journal_limit=int(memory * journal.SHARE))
    heart = Heart(network, peers, key, view, replica.genesis.network)
    entry = Entry(network, peers, pipeline, view, heart, library, stage, workers.disk, context_limit=context)
    standing = entry.measurements.standing
    holder = Holder(
        network.peer_id,
        relay,
        library,
        exchange,
        view,
        heart,
        stage,
        workers,
        memory=memory,
        dtype=dtype,
        device=device,
    )
    challenger = Challenger(
        network,
        peers,
        view,
        stage,
        standing,
        workers.compute,
        newest_cut=lambda: replica.final.id,
        suspect_self=holder.reload,
    )
    return NodeService(
        key=key,
        network=network,
        peers=peers,
        blocklist=Blocklist(peers, data.blocked),
        relay=relay,
        finality=finality,
        submissions=submissions,
        author=Author(relay, submissions, key),
        accuser=Accuser(relay, finality, submissions, key.address),
        exchange=exchange,
        view=view,
        library=library,
        pipeline=pipeline,
        stage=stage,
        entry=entry,
        heart=heart,
        holder=holder,
        challenger=challenger,
        workers=workers,
        chain=NodeChainService(key.address, relay, submissions),
        memory_limit=memory,
        disk_limit=config.disk_limit,
    )


async def run_parts(node: NodeService, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    """Run all that a node does but its API, until cancelled."""
    node.exchange.serve()
    serve_genesis(node.network, node.relay.replica.genesis)
    async with trio.open_nursery() as nursery:
        await nursery.start(Canary().run)
        await nursery.start(node.blocklist.run)
        await nursery.start(node.relay.run)
        await nursery.start(node.finality.run)
        await nursery.start(node.submissions.run)
        await nursery.start(node.author.run)
        nursery.start_soon(node.accuser.run)
        await nursery.start(node.pipeline.run)
        await nursery.start(node.stage.run)
        await nursery.start(node.heart.run, node.heartbeat)
        nursery.start_soon(node.entry.run)
        await nursery.start(node.peers.run)
        await nursery.start(node.holder.run)
        await nursery.start(node.challenger.run)
        task_status.started()


async def _serve(node: NodeService, config: NodeConfig, data: DataDir, signals: AsyncIterator[int]) -> None:
    """Run the parts and the API until a signal comes, then let what is under way end."""
    listener = await open_api_listener(config.api_host, config.api_port)
    usage = Usage(data.api_usage)
    app = create_app(node, _access(config, data, api_url(listener)), _terms(config), usage)
    async with trio.open_nursery() as parts:
        await parts.start(run_parts, node)
        stop = trio.Event()
        async with trio.open_nursery() as front:
            await front.start(partial(serve_api, app, listener, stop=stop))
            addresses = node.network.addresses()
            data.publish(Running(os.getpid(), node.network.peer_id, api_url(listener), addresses))
            log.info(
                "%s: peers at %s, API at %s", show_address(node.key.address), ", ".join(addresses), api_url(listener)
            )
            await anext(signals)
            log.info("stopping: telling peers, letting generations end")
            with trio.move_on_after(FINISH):
                await node.holder.drain()
                while node.stage.seats or node.entry.sessions:  # noqa: ASYNC110 - two owners, no event in common
                    await trio.sleep(0.05)
            stop.set()
        usage.save()
        parts.cancel_scope.cancel()
    log.info("stopped")


def _access(config: NodeConfig, data: DataDir, url: str) -> Access:
    """Who may use the API, which is reached at ``url`` from this machine. Raises LocalError, RuleError."""
    wallets = [show_address(parse_address(wallet)) for wallet in config.wallets if wallet.startswith("0x")]
    allowed = None if "any" in config.wallets else frozenset(wallets)
    signin = SignIn(config.api_site or url, config.wallet_chain_id, allowed)
    return Access(data.make_token(), KeyFile(data.api_keys), signin, frozenset(config.api_names))


def _terms(config: NodeConfig) -> Terms:
    return Terms(
        requests_per_minute=config.requests_per_minute,
        public_chats_per_minute=config.public_chats_per_minute,
        concurrent=config.concurrent,
        price_nano=config.price_nano,
    )


async def _unless_signalled(signals: AsyncIterator[int], work: Callable[[], Awaitable[T]]) -> T | None:
    """Do what may take long before the node is up; None where a signal came first."""
    done: list[T] = []
    async with trio.open_nursery() as nursery:

        async def give_up() -> None:
            await anext(signals)
            log.info("stopped")
            nursery.cancel_scope.cancel()

        nursery.start_soon(give_up)
        done.append(await work())
        nursery.cancel_scope.cancel()
    return done[0] if done else None


async def choose_genesis(config: NodeConfig, data: DataDir, key: Key, network: Network) -> Genesis:
    """Find the network to be part of.

    It is what the configuration names, what was joined before, or what a bootstrap peer tells; where nothing says, a
    private network of one's own. Raises LocalError where that is not the network that an invite named.
    """
    expected = None if config.network is None else bytes.fromhex(config.network)
    if config.genesis is not None or data.genesis.exists():
        path = config.genesis or data.genesis
        genesis = load_genesis(path)
        if expected not in (None, genesis.network):
            raise LocalError(
                f"{path} is of network {genesis.network.hex()}, but this node is to join {config.network} "
                f"(setting network, or {data.root / JOINED}): use the genesis of that network, or another --data-dir"
            )
    elif config.bootstrap:
        log.info("asking %d bootstrap addresses which network this is", len(config.bootstrap))
        genesis = await fetch_genesis(network, config.bootstrap, expected=expected)
        _tell_joined(genesis, invited=expected is not None)
    elif expected is not None:
        raise LocalError(f"nobody to ask about network {config.network}: give --bootstrap addresses or its --genesis")
    else:
        now_ms = time.time_ns() // 1_000_000
        genesis = Genesis.make(f"private-{network.peer_id[-6:]}", {key.address: 1}, created_ms=now_ms)
        log.info(
            "started a private network; others join with: --bootstrap %s", " --bootstrap ".join(network.addresses())
        )
    if not data.genesis.exists():
        genesis.save(data.genesis)  # so that the next start, and other commands, need not be told
    return genesis


def _tell_joined(genesis: Genesis, *, invited: bool) -> None:
    if invited:
        log.info("joined network %s (%s), as invited", genesis.name, genesis.network.hex())
    else:
        log.warning("joined network %s (%s): compare this id with who invited you", genesis.name, genesis.network.hex())
    if (restart := genesis.restart) is not None:
        share = 100 * check_signatures(genesis) / restart.stake
        log.warning("it restarts network %s: %.1f %% of the old stake has signed that", restart.network.hex(), share)
