"""GossipSub of py-libp2p 0.8.1, corrected.

The router keeps the library's mesh (gossipsub v1.1 and v1.2); what happens to a message that arrives is ours:
:meth:`SturdyPubsub.push_msg`. Each correction carries the letter under which it was measured (``docs/design.md``).
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from weakref import WeakKeyDictionary

import trio
from google.protobuf.message import DecodeError
from libp2p.abc import IHost, INetStream
from libp2p.custom_types import TProtocol
from libp2p.peer.id import ID
from libp2p.pubsub import pubsub as pubsub_module
from libp2p.pubsub.gossipsub import GossipSub
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.pubsub import Pubsub
from libp2p.pubsub.rpc_queue import RpcQueue
from libp2p.pubsub.validators import PUBSUB_SIGNING_PREFIX

from blyan_node.errors import CodecError, ProtocolViolation
from blyan_node.p2p.guard import VIOLATION, Penalise, survive
from blyan_node.p2p.identity import public_key_of
from blyan_node.p2p.transport import MAX_GOSSIP, PeerId

logger = logging.getLogger(__name__)

PROTOCOLS = [TProtocol("/meshsub/1.2.0"), TProtocol("/meshsub/1.1.0")]
SEQUENCE_BYTES = 8
QUEUED_RPCS = 4096
QUEUED_BYTES = 16 * 1024 * 1024
TOPICS_OF_A_PEER = 32
IDONTWANT_BYTES = 1024

Deliver = Callable[[str, PeerId, bytes], bool]
"""Takes (topic, origin, data) of a message with a good signature; False if the message is wrong."""


def apply() -> None:
    """G4: outbound queues of 32 RPCs drop bursts silently; the class is built by name, without parameters."""
    pubsub_module.RpcQueue = ByteBoundedQueue  # type: ignore[attr-defined,assignment]


class ByteBoundedQueue(RpcQueue):
    """The RPCs that wait for one peer: at most QUEUED_RPCS of together QUEUED_BYTES.

    When full, the newest is dropped, as everywhere in gossip; the peer may still ask for it (IHAVE, IWANT).
    """

    def __init__(self) -> None:
        super().__init__(max_size=QUEUED_RPCS)
        self._bytes = 0

    def push(self, rpc: rpc_pb2.RPC, priority: bool = False) -> bool:
        """Queue an RPC; False if there is no room."""
        size = rpc.ByteSize()
        if self._bytes + size > QUEUED_BYTES or not super().push(rpc, priority):
            return False
        self._bytes += size
        return True

    async def pop(self) -> rpc_pb2.RPC | None:
        """Wait for the next RPC; None once closed."""
        rpc = await super().pop()
        if rpc is not None:
            self._bytes -= rpc.ByteSize()
        return rpc


class SturdyGossipSub(GossipSub):
    """The mesh: degree 6, between 4 and 12, a heartbeat every second."""

    def __init__(self) -> None:
        super().__init__(
            protocols=PROTOCOLS,
            degree=6,
            degree_low=4,
            degree_high=12,
            heartbeat_interval=1,  # the default is two minutes
            adaptive_gossip_enabled=False,  # a lonely node would slow down to 30 s
            spam_protection_enabled=False,  # would cap each forwarder, ourselves included, at 10 messages a second
            eclipse_protection_enabled=False,  # would graft everybody wherever fewer than three addresses are seen
        )
        self._gossiping = False

    async def heartbeat(self) -> None:
        """Beat on, whatever one beat runs into: the library would end the host."""
        while True:
            await survive(super().heartbeat, "gossip heartbeat", self._me(), _nobody_to_blame)
            await trio.sleep(self.heartbeat_interval)

    def _me(self) -> PeerId:
        return PeerId(str(self.pubsub.my_id)) if self.pubsub else PeerId("")

    def _get_peers_to_send(
        self, topic_ids: Iterable[str], msg_forwarder: ID, origin: ID, msg_id: bytes | None = None
    ) -> Iterable[ID]:
        """G5: own messages go to every subscriber among the neighbours (flood publishing, gossipsub v1.1).

        G15: so do those of others while the subscribers would fit into the mesh: what is forwarded between a
        neighbour's subscription and its graft is told to it in no IHAVE, for those go to peers outside the mesh.
        """
        topics = list(topic_ids)
        if self.pubsub is not None:
            subscribers = set[ID]().union(*(self.pubsub.peer_topics.get(topic, ()) for topic in topics))
            if msg_forwarder == self.pubsub.my_id or len(subscribers) <= self.degree_high:
                unwanted = {peer for peer in subscribers if msg_id in self.dont_send_message_ids.get(peer, ())}
                return subscribers - unwanted - {msg_forwarder, origin}
        return super()._get_peers_to_send(topics, msg_forwarder, origin, msg_id)

    def gossip_heartbeat(self) -> defaultdict[ID, dict[str, list[bytes]]]:
        """G5: tell peers in back-off, too, what there is: back-off is about grafting."""
        self._gossiping = True
        try:
            return super().gossip_heartbeat()
        finally:
            self._gossiping = False

    def _get_in_topic_gossipsub_peers_from_minus(
        self, topic: str, num_to_select: int, minus: Iterable[ID], backoff_check: bool = False
    ) -> list[ID]:
        return super()._get_in_topic_gossipsub_peers_from_minus(
            topic, num_to_select, minus, backoff_check and not self._gossiping
        )

    def _check_equivocation(self, msg: rpc_pb2.Message) -> bool:  # noqa: ARG002
        """G9: the library keeps up to 1000 whole messages for this; a repeated id is dropped as seen already."""
        return True

    async def _emit_idontwant_for_message(self, msg_id: bytes, topic_ids: Iterable[str]) -> None:
        """G13: say IDONTWANT of large messages only (gossipsub v1.2); for a small one it costs what it saves."""
        message = self.mcache.get(msg_id)
        if message is not None and len(message.data) >= IDONTWANT_BYTES:
            await super()._emit_idontwant_for_message(msg_id, topic_ids)

    async def _do_px(self, px_peers: list[rpc_pb2.PeerInfo]) -> None:
        """G11: do not dial whomever a PRUNE names; peers are exchanged by a request of our own."""


class SturdyPubsub(Pubsub):
    """What happens to messages: checked once, delivered to ``deliver``, passed on; the forwarder answers for them."""

    def __init__(self, host: IHost, router: SturdyGossipSub, deliver: Deliver, penalise: Penalise) -> None:
        super().__init__(host, router, strict_signing=True, max_subscriptions_per_peer=TOPICS_OF_A_PEER)
        self._deliver = deliver
        self._penalise = penalise
        self._writing: WeakKeyDictionary[INetStream, trio.Lock] = WeakKeyDictionary()
        # G2: whole seconds, the default, are used again by a node that restarts, whose messages then count as seen
        self.counter = time.time_ns()

    async def continuously_read_stream(self, stream: INetStream) -> None:
        """G1: garbage in an RPC is the sender's fault; the library lets it end the node."""
        try:
            await super().continuously_read_stream(stream)
        except DecodeError as error:
            self._handle_dead_peer(stream.muxed_conn.peer_id)
            raise ProtocolViolation("gossip that is not a pubsub RPC") from error

    async def write_msg(self, stream: INetStream, rpc_msg: rpc_pb2.RPC) -> bool:
        """G12: one RPC after another. The library replays recent messages to a new peer beside the queue's writer.

        Two writers whose RPCs span several frames mix them, and what arrives is garbage.
        """
        async with self._writing.setdefault(stream, trio.Lock()):
            return await super().write_msg(stream, rpc_msg)

    async def push_msg(self, msg_forwarder: ID, msg: rpc_pb2.Message) -> None:
        """Check, deliver and pass on a message; in a task of its own, so nothing may leave it but cancellation."""
        if msg_forwarder == self.my_id:
            self._mark_msg_seen(msg)
            await self.router.publish(msg_forwarder, msg)
            return
        peer = PeerId(str(msg_forwarder))
        await survive(lambda: self._receive(msg_forwarder, peer, msg), f"gossip from {peer}", peer, self._penalise)

    async def _receive(self, forwarder: ID, peer: PeerId, msg: rpc_pb2.Message) -> None:
        if len(msg.topicIDs) != 1 or len(msg.data) > MAX_GOSSIP or len(msg.seqno) != SEQUENCE_BYTES:
            raise ProtocolViolation("a gossiped message with many topics, too much data or a strange number")
        # no await between the question and the mark: copies that arrive together are checked once (G7)
        if self._is_msg_seen(msg) or msg.from_id == self.my_id.to_bytes():
            return
        origin = _signed_origin(msg)
        self._mark_msg_seen(msg)
        if not self._deliver(msg.topicIDs[0], origin, msg.data):
            self._penalise(peer, VIOLATION, f"forwarded a message on {msg.topicIDs[0]} that is wrong")
            return
        await self.router.publish(forwarder, msg)


def _signed_origin(msg: rpc_pb2.Message) -> PeerId:
    """Return the author of a message; raise ProtocolViolation where the signature is not the author's."""
    origin = ID(msg.from_id)
    signed = rpc_pb2.Message(data=msg.data, topicIDs=msg.topicIDs, from_id=msg.from_id, seqno=msg.seqno)
    payload = PUBSUB_SIGNING_PREFIX.encode() + signed.SerializeToString()
    try:
        public_key_of(str(origin))
        key = origin.extract_public_key()
        good = key is not None and key.verify(payload, msg.signature)
    except (CodecError, ValueError) as error:  # not a peer id of ours; not a point; not DER
        raise ProtocolViolation(f"a gossiped message of nobody: {error}") from error
    if not good:
        raise ProtocolViolation("a gossiped message whose signature is not its author's")
    return PeerId(str(origin))


def _nobody_to_blame(peer: PeerId, points: int, reason: str) -> None:  # noqa: ARG001
    logger.error("%s", reason)
