"""A neighbour that lies about what is final: in STATUS, GET_CUTS, GET_SINCE and TELL.

Each lie gets a named error and costs points until the liar is out; the victim's memory stays as it was, and the truth
still reaches it.
"""

from __future__ import annotations

import gc
import logging
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from blyan_node.chain.block import Block
from blyan_node.chain.cut import PRECOMMIT, PREVOTE, Certificate, Signed, Vote, Votes, sign_proposal, sign_vote
from blyan_node.chain.effects import GetVotes, InRound, Majority, Message, pack_message
from blyan_node.chain.keys import Key
from blyan_node.chain.records import Transfer, make_record, sign_record
from blyan_node.chain.replica import Replica
from blyan_node.errors import PeerError, ProtocolViolation, Refused
from blyan_node.p2p import rpc
from blyan_node.relay.messages import GET_SINCE, TELL, Cursor, CutItem, Cuts, GetCuts, GetSince, Since, Status, Tell
from tests.support.chains import STRANGER, Forge
from tests.support.cuts import finalise, next_cut
from tests.support.network import eventually, secret
from tests.support.validators import KEYS, USERS, Group, Node, genesis_of, validators
from tests.support.villain import Villain

CUTS = 6
GENESIS = genesis_of(4)
NETWORK = GENESIS.network


@dataclass
class Siege:
    """A whole node, behind by all there is; a villain that knows the truth; and how the truth can reach the victim."""

    group: Group
    victim: Node
    villain: Villain
    truth: Replica
    large: Block | None = None

    def items(self, first: int = 1) -> tuple[CutItem, ...]:
        stored = (self.truth.finals.stored(k) for k in range(first, self.truth.final.k + 1))
        return tuple(CutItem(each.cut, each.certificate, None) for each in stored if each is not None)

    def places(self, after: Cursor) -> Iterator[tuple[Cursor, bytes]]:
        for k in range(after.k, self.truth.final.k + 2):
            for height, id in self.truth.window_of(k):
                if (k, height, id) > (after.k, after.height, after.id):
                    yield Cursor(k, height, id), self.truth.get(id) or b""

    def honest_cuts(self, request: GetCuts) -> Cuts:
        return Cuts(self.items(request.first))

    def honest_since(self, request: GetSince, count: int = 100) -> Since:
        page = list(islice(self.places(request.after), count))
        return Since(tuple(raw for _, raw in page), page[-1][0] if page else None)

    def serve(self, **lies: Callable[..., object]) -> None:
        """Answer with lies where there are any, and else with the truth."""
        self.villain.serve(**{"cuts": self.honest_cuts, "since": self.honest_since, **lies})

    async def tell(self, message: Message) -> None:
        await rpc.call(self.villain.network, self.victim.network.peer_id, TELL, Tell(pack_message(message)))

    def is_clean(self) -> bool:
        """Whether nothing of what the villain said has stayed."""
        replica, core = self.victim.replica, self.victim.finality.core
        height = core.height
        assert height is not None
        return (
            (replica.final.k, replica.count()) == (0, 0)
            and len(replica._orphans) <= 8
            and len(self.victim.relay._heads_of) <= 1
            and len(self.victim.relay._sought) == 0
            and sum(map(len, core._early.values())) <= 4
            and not height.cuts
            and not height._verdicts
            and len(height._rounds) <= 1
        )


@asynccontextmanager
async def siege(folder: Path) -> AsyncIterator[Siege]:
    async with validators(folder, 4) as group, AsyncExitStack() as stack:
        for number in (1, 2, 3):
            await group[number].stop()
        truth = stack.enter_context(Replica.open(folder / "truth", GENESIS))
        write_truth(truth)
        network = await stack.enter_async_context(group.hub.open(secret(50)))
        villain = Villain(network, group[0])
        villain.status = replace(status_of(truth), cut=CUTS)
        yield Siege(group, group[0], villain, truth)
        honest = await group.start(1)
        for k in range(1, CUTS + 1):
            for _, id in truth.window_of(k):
                honest.replica.accept(truth.get(id) or b"")
            stored = truth.finals.stored(k)
            assert stored is not None
            await honest.finality._on_certificate(stored.cut, stored.certificate, honest.network.peer_id)
        await eventually(lambda: group[0].replica.final.root == truth.final.root, within=100, every=0.5)


def write_truth(truth: Replica) -> None:
    for nonce in range(CUTS):
        record = make_record(USERS[0], NETWORK, Transfer(USERS[1].address, 1), nonce=nonce)
        for key in KEYS[:4]:
            truth.author(key, (record,) if key is KEYS[0] else (), chain="T", type="data", now_ms=1)
        finalise(truth, keys=KEYS[:4])


def status_of(replica: Replica) -> Status:
    final = replica.final
    return Status(NETWORK, replica.height(), final.k, final.id, 0, replica.heads())


# GET_CUTS


def certificates(change: Callable[[Siege, CutItem], Certificate]) -> Callable[[Siege, GetCuts], Cuts]:
    """Cuts whose certificates are changed."""

    def answer(siege: Siege, request: GetCuts) -> Cuts:
        items = siege.honest_cuts(request).items
        return Cuts(tuple(replace(item, certificate=change(siege, item)) for item in items))

    return answer


def signed_by(keys: list[Key], item: CutItem, network: bytes = NETWORK, step: int = PRECOMMIT) -> Certificate:
    votes = [sign_vote(key, network, k=item.cut.k, round=0, step=step, cut=item.cut.id) for key in keys]
    signatures = sorted((Signed(vote.validator, vote.signature) for vote in votes), key=lambda each: each.validator)
    return Certificate(item.cut.id, item.cut.k, 0, tuple(signatures))


def mixed_up(_siege: Siege, item: CutItem) -> Certificate:
    one, other, *rest = item.certificate.signatures
    swapped = (replace(one, signature=other.signature), replace(other, signature=one.signature), *rest)
    return replace(item.certificate, signatures=swapped)


def other_heads(siege: Siege, request: GetCuts) -> Cuts:
    items = siege.honest_cuts(request).items
    return Cuts(tuple(replace(item, cut=replace(item.cut, heads=(NETWORK,))) for item in items))


def twice_signed(_siege: Siege, item: CutItem) -> Certificate:
    signatures = item.certificate.signatures
    return replace(item.certificate, signatures=(signatures[0], *signatures))


LIES_ABOUT_CUTS: dict[str, tuple[Callable[[Siege, GetCuts], Cuts], str]] = {
    "no quorum": (certificates(lambda _, item: signed_by(KEYS[:2], item)), "no more than 2/3 of stake"),
    "strangers": (certificates(lambda _, item: signed_by(KEYS[4:8], item)), "is no validator of this height"),
    "forged": (certificates(mixed_up), "did not sign"),
    "one of them twice": (certificates(twice_signed), "one is named twice"),
    "prevotes": (certificates(lambda _, item: signed_by(KEYS[:4], item, step=PREVOTE)), "did not sign"),
    "another network's": (certificates(lambda _, item: signed_by(KEYS[:4], item, bytes(32))), "did not sign"),
    "of the next cut": (
        certificates(lambda siege, item: siege.items(item.cut.k % CUTS + 1)[0].certificate),
        "the certificate of another cut",
    ),
    "of other heads": (other_heads, "the certificate of another cut"),
    "not the next": (lambda siege, request: Cuts(siege.items(request.first + 1)), "does not send"),
    "from the start": (lambda siege, request: Cuts(siege.items(1)[request.first - 1 :][::-1]), "does not send"),
    "one again and again": (lambda siege, _: Cuts(siege.items(1)[:1] * 5), "does not send"),
    "with a gap": (lambda siege, _: Cuts((siege.items(1)[0], siege.items(1)[2])), "does not send"),
    "none": (lambda _siege, _request: Cuts(()), "does not send"),
}


@pytest.mark.parametrize("name", LIES_ABOUT_CUTS)
async def test_a_lie_about_cuts(
    name: str, tmp_path: Path, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    lie, message = LIES_ABOUT_CUTS[name]
    async with siege(tmp_path) as scene:
        # the blocks of the first cut are there already, so that its certificate is looked at
        scene.serve(cuts=lambda request: lie(scene, request))
        for _, id in scene.truth.window_of(1):
            scene.victim.replica.accept(scene.truth.get(id) or b"")
        with caplog.at_level(logging.INFO, logger="blyan_node"):
            await scene.villain.connect()
            await eventually(scene.villain.is_out, within=400, every=1)
        assert message in caplog.text
        assert "points against" in caplog.text
        assert scene.villain.asked["cuts"] <= 12
        assert scene.victim.replica.final.k == 0
        assert scene.victim.replica.count() == 4


# GET_SINCE


def endless_nothing(_siege: Siege, request: GetSince) -> Since:
    return Since((), replace(request.after, height=request.after.height + 1))


def backwards(siege: Siege, request: GetSince) -> Since:
    return replace(siege.honest_since(request, 4), last=Cursor(0, 0, bytes(32)))


def standing_still(siege: Siege, request: GetSince) -> Since:
    return replace(siege.honest_since(request, 4), last=request.after)


def leaping(siege: Siege, request: GetSince) -> Since:
    """As if it had sent what it leaves out."""
    page = siege.honest_since(request)
    return replace(page, blocks=page.blocks[3:], last=Cursor(10**6, 0, bytes(32)) if page.last else None)


def the_same_again(siege: Siege, request: GetSince) -> Since:
    first = siege.honest_since(GetSince(Cursor(1, 0, bytes(32))), 3)
    return Since(first.blocks * 50, replace(request.after, height=request.after.height + 1))


def full_pages_of_the_same(siege: Siege, request: GetSince) -> Since:
    """As those of a neighbour are that reads out to a restarted node what that has already."""
    if siege.large is None:
        notes = [sign_record(USERS[2], NETWORK, "note", bytes(100_000), nonce=nonce) for nonce in range(2)]
        siege.large = Forge({NETWORK: 0}, network=NETWORK).block(KEYS[3], records=tuple(notes))
    return Since((siege.large.raw,) * 4, replace(request.after, height=request.after.height + 1))


def garbage(_siege: Siege, request: GetSince) -> Since:
    return Since((b"garbage",) * 50, replace(request.after, height=request.after.height + 1))


def another_networks(_siege: Siege, request: GetSince) -> Since:
    forge = Forge()
    blocks = [forge.block() for _ in range(5)]
    return Since(tuple(block.raw for block in blocks), replace(request.after, height=request.after.height + 1))


def nothing_at_all(_siege: Siege, _request: GetSince) -> Since:
    return Since((), None)


def strangers_blocks(_siege: Siege, request: GetSince) -> Since:
    forge = Forge({NETWORK: 0}, network=NETWORK)
    blocks = [forge.block(STRANGER, parents=(NETWORK,), prev=None, timestamp_ms=number) for number in range(5)]
    return Since(tuple(block.raw for block in blocks), replace(request.after, height=request.after.height + 1))


def children_only(siege: Siege, request: GetSince) -> Since:
    """Blocks in order, but for the first, on which all others stand."""
    page = [(cursor, raw) for cursor, raw in siege.places(request.after) if cursor.height > 1][:4]
    return Since(tuple(raw for _, raw in page), page[-1][0] if page else None)


LIES_ABOUT_BLOCKS: dict[str, tuple[Callable[[Siege, GetSince], Since], str]] = {
    "pages of nothing": (endless_nothing, "pages of blocks that are of no use"),
    "going back": (backwards, "do not follow what was asked for"),
    "standing still": (standing_still, "do not follow what was asked for"),
    "leaving out": (leaping, "but not what lies under it"),
    "the same again": (the_same_again, "pages of blocks that are of no use"),
    "full of the same": (full_pages_of_the_same, "pages of blocks that are of no use"),
    "garbage": (garbage, "wrong about the chain: not msgpack"),
    "another network's": (another_networks, "a block of another network"),
    "strangers'": (strangers_blocks, "the author is no validator"),
    "no blocks under cuts": (nothing_at_all, "but not what lies under it"),
    "children without parents": (children_only, "pages of blocks that are of no use"),
}


@pytest.mark.parametrize("name", LIES_ABOUT_BLOCKS)
async def test_a_lie_about_blocks(
    name: str, tmp_path: Path, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    lie, message = LIES_ABOUT_BLOCKS[name]
    async with siege(tmp_path) as scene:
        scene.serve(since=lambda request: lie(scene, request))
        with caplog.at_level(logging.INFO, logger="blyan_node"):
            await scene.villain.connect()
            await eventually(scene.villain.is_out, within=400, every=1)
        assert message in caplog.text
        assert "points against" in caplog.text
        assert scene.villain.asked["since"] <= 60
        assert scene.victim.replica.final.k == 0
        assert scene.victim.replica.count() <= 4
        assert len(scene.victim.replica._orphans) <= 30


async def test_blocks_out_of_order_are_put_in_order(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with siege(tmp_path) as scene:

        def reversed_(request: GetSince) -> Since:
            page = scene.honest_since(request)
            return replace(page, blocks=page.blocks[::-1])

        scene.serve(since=reversed_)
        await scene.villain.connect()
        await eventually(lambda: scene.victim.replica.final.k == CUTS, within=60, every=0.5)
        assert len(scene.victim.replica._orphans) == 0


async def test_the_truth_is_taken_from_anybody(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with siege(tmp_path) as scene:
        scene.serve()
        await scene.villain.connect()
        await eventually(lambda: scene.victim.replica.final.root == scene.truth.final.root, within=30)
        assert scene.villain.points() == 0
        assert scene.villain.asked["cuts"] <= 2


async def test_requests_for_what_cannot_be_are_answered_with_nothing(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with siege(tmp_path) as scene:
        scene.villain.status = status_of(scene.victim.replica)
        scene.serve()
        await scene.villain.connect()
        victim = scene.victim.network.peer_id
        for k in (1, 2**62):
            for height in (0, 2**62):
                after = Cursor(k, height, b"\xff" * 32)
                assert await rpc.call(scene.villain.network, victim, GET_SINCE, GetSince(after)) == Since((), None)
        with pytest.raises(Refused, match="from cut 1 on"):
            await rpc.call(scene.villain.network, victim, GET_SINCE, GetSince(Cursor(0, 0, bytes(32))))
        assert scene.is_clean()


# STATUS


async def test_another_network_is_left_alone(
    tmp_path: Path, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with siege(tmp_path) as scene:
        scene.villain.status = replace(scene.villain.status, network=bytes([7] * 32))
        scene.serve()
        await scene.villain.connect()
        await eventually(scene.villain.is_out, within=30, every=0.5)
        assert "cuts" not in scene.villain.asked
        assert f"is of network {'07' * 8}" in caplog.text
        assert scene.is_clean()


@pytest.mark.parametrize("cut", [0, 3])
async def test_another_cut_than_the_one_here_costs_points(
    cut: int, tmp_path: Path, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with siege(tmp_path) as scene:
        scene.serve()
        await scene.villain.connect()
        await eventually(lambda: scene.victim.replica.final.k == CUTS, within=60, every=0.5)
        scene.villain.status = replace(scene.villain.status, cut=cut, cut_id=bytes([7] * 32))
        await eventually(scene.villain.is_out, within=400, every=1)
        assert f"says that cut {cut} is another one than here: {'07' * 32}" in caplog.text
        assert scene.victim.replica.final.root == scene.truth.final.root


async def test_a_storm_of_statuses_leaves_one(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with siege(tmp_path) as scene:
        scene.villain.status = replace(scene.villain.status, cut=0, cut_id=NETWORK)
        scene.villain.serve()
        await scene.villain.connect()
        for number in range(100):
            if scene.villain.is_out():
                break
            heads = tuple(sorted((number * 512 + each).to_bytes(32) for each in range(512)))
            try:
                await scene.villain.tell(replace(scene.villain.status, heads=heads))
            except PeerError:
                break
        assert scene.is_clean()


# TELL


def vote(key: Key, **changes: object) -> Vote:
    place = {"k": 1, "round": 0, "step": PREVOTE, "cut": None, **changes}
    return sign_vote(key, NETWORK, **place)  # type: ignore[arg-type]


def proposal(scene: Siege, key: Key):
    cut = next_cut(scene.victim.replica, (NETWORK,))
    return sign_proposal(key, NETWORK, round=0, valid_round=None, cut=cut)


def not_the_proposer(scene: Siege) -> Key:
    height = scene.victim.finality.core.height
    assert height is not None
    return next(key for key in KEYS[1:4] if key.address != height.proposer(0))


WRONG: dict[str, tuple[Callable[[Siege], Message], str]] = {
    "a stranger's vote": (lambda _: vote(STRANGER), "a vote by no validator"),
    "a forged vote": (lambda _: replace(vote(KEYS[2]), validator=KEYS[1].address), "did not sign"),
    "a vote of another network": (
        lambda _: sign_vote(KEYS[1], bytes(32), k=1, round=0, step=PREVOTE, cut=None),
        "did not sign",
    ),
    "somebody else's turn": (
        lambda scene: proposal(scene, not_the_proposer(scene)),
        "another validator than the round's proposer",
    ),
    "a quorum of one": (
        lambda _: Votes(1, 0, PREVOTE, None, (Signed(KEYS[1].address, vote(KEYS[1]).signature),)),
        "no more than 2/3 of stake",
    ),
}


@pytest.mark.parametrize("name", WRONG)
async def test_a_wrong_message_costs_points(
    name: str, tmp_path: Path, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    make, message = WRONG[name]
    async with siege(tmp_path) as scene:
        scene.villain.status = status_of(scene.victim.replica)
        scene.serve()
        await scene.villain.connect()
        wrong = make(scene)
        for points in (25, 50, 75):
            await scene.tell(wrong)
            assert scene.villain.points() == pytest.approx(points, abs=1)
        assert scene.is_clean()
        for _ in range(2):  # what came before has faded a little
            with suppress(PeerError):
                await scene.tell(wrong)
        await eventually(scene.villain.is_out)
        assert message in caplog.text


async def test_what_is_no_message_costs_points(
    tmp_path: Path, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with siege(tmp_path) as scene:
        scene.villain.status = status_of(scene.victim.replica)
        scene.serve()
        await scene.villain.connect()
        with caplog.at_level(logging.INFO, logger="blyan_node"):
            for data in (b"", b"\xc0", b"\x92\x09\xc0", b"\x92\x00\xc0", b"\x91" * 1000, bytes(20_000)):
                if scene.villain.is_out():
                    break
                with pytest.raises(PeerError) as caught:
                    await rpc.call(scene.villain.network, scene.victim.network.peer_id, TELL, Tell(data))
                assert not isinstance(caught.value, Refused | ProtocolViolation), "it gets no answer"
        await eventually(scene.villain.is_out)
        assert "not a message of the consensus" in caplog.text
        assert scene.is_clean()


async def test_a_flood_of_idle_talk_takes_no_memory(tmp_path: Path, autojump_clock: MockClock) -> None:
    """Messages that nobody can call wrong: claims and questions without end, heights and rounds that are far away."""
    async with siege(tmp_path) as scene:
        scene.villain.status = status_of(scene.victim.replica)
        scene.serve()
        await scene.villain.connect()

        def talk(number: int) -> Iterator[Message]:
            cut = number.to_bytes(32)
            yield Majority(1, number, PREVOTE, cut)
            yield GetVotes(1, number, PRECOMMIT, cut)
            yield InRound(1, number)
            yield Majority(2**62 + number, 0, PREVOTE, cut)
            yield replace(forged, k=2, cut=cut)
            yield replace(forged, k=2**60 + number)

        forged = vote(KEYS[1])
        tracemalloc.start()
        for number in range(25):  # what is allocated once
            for message in talk(number):
                await scene.tell(message)
        before, _ = tracemalloc.get_traced_memory()
        for number in range(25, 75):
            for message in talk(number):
                await scene.tell(message)
        await trio.sleep(5)  # what was under way has ended
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert after - before < 50_000
        assert scene.is_clean()
        assert scene.villain.points() == 0


async def test_a_validators_votes_of_many_rounds_are_not_all_kept(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with siege(tmp_path) as scene:
        scene.villain.status = status_of(scene.victim.replica)
        scene.serve()
        await scene.villain.connect()
        core = scene.victim.finality.core
        for round in range(30):
            for cut in (None, *(bytes([number] * 32) for number in range(1, 6))):
                await scene.tell(vote(KEYS[1], round=round, cut=cut))
        assert core.height is not None
        assert core.height.round == 0, "one validator of four moves nobody"
        assert len(core.height._rounds) <= 2
        assert len(core.height._highest) <= 4
