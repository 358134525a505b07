from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blyan_node.chain.block import MAX_PARENTS, Block, decode_block
from blyan_node.chain.genesis import Genesis
from blyan_node.chain.keys import Key
from blyan_node.chain.orphans import Orphans
from blyan_node.chain.outcome import Accepted, Known, Orphan, Surplus
from blyan_node.chain.records import BlobRef, Layer, Manifest, make_record, sign_record
from blyan_node.chain.replica import Replica
from blyan_node.chain.store import Store
from blyan_node.errors import AlreadyRunning, ConfigError, LocalError, RuleError, StoreError
from tests.support.chains import GENESIS, KEYS, NETWORK, STRANGER, Forge

ALICE, BOB, CAROL, DAVE = KEYS[:4]
BLOB = BlobRef(bytes(32), 7)


@pytest.fixture
def forge():
    return Forge()


@pytest.fixture
def replica(tmp_path):
    with Replica.open(tmp_path / "chain", GENESIS) as replica:
        yield replica


@pytest.fixture
def other(tmp_path):
    with Replica.open(tmp_path / "other", GENESIS) as replica:
        yield replica


def write(replica: Replica, key: Key = ALICE, records=(), chain="T", **more) -> Block:
    return replica.author(key, tuple(records), chain=chain, type="data", now_ms=1, **more)


def summary(replica: Replica):
    return replica.heads(), replica.count(), replica.height(), replica.catalog().models()


# Writing and reading


def test_an_empty_chain(replica):
    assert replica.heads() == (NETWORK,)
    assert (replica.count(), replica.height()) == (0, 0)
    assert replica.has(NETWORK)
    assert replica.get(NETWORK) is None
    assert replica.blocks(limit=10) == []
    assert replica.catalog().models() == ()


def test_authors_build_on_all_heads(replica):
    first = write(replica)
    assert first.header.parents == (NETWORK,)
    assert first.height == 1
    second = write(replica, BOB)
    assert second.header.parents == (first.id,)
    third = write(replica)
    assert (third.header.seq, third.header.prev) == (1, first.id)
    assert replica.heads() == (third.id,)
    assert replica.get(second.id) == second.raw
    assert replica.block(second.id) == second
    assert replica.count() == replica.height() == 3


def test_what_is_known_is_known(replica, forge):
    block = forge.block()
    assert replica.accept(block.raw) == Accepted(block)
    assert replica.accept(block.raw) == Known(block.id)


def test_blocks_are_read_in_pages_parents_first(replica, other):
    rng = random.Random(1)
    for number in range(40):
        write(replica, rng.choice(KEYS), chain="ABT"[number % 3])
    pages, after = [], None
    while page := replica.blocks(after=after, limit=7):
        pages += page
        after = (page[-1].height, page[-1].id)
    assert [(b.height, b.id) for b in pages] == sorted((b.height, b.id) for b in pages)
    assert len(pages) == 40
    for block in pages:
        assert isinstance(other.accept(block.raw), Accepted)
    assert summary(other) == summary(replica)
    assert [b.id for b in replica.blocks("B", limit=99)] == [b.id for b in pages if b.chain == "B"]
    assert [b.id for b in replica.blocks("B", after=(5, b"\xff" * 32), limit=3)] == [
        b.id for b in pages if b.chain == "B" and b.height > 5
    ][:3]


def test_the_catalog_follows_the_blocks(replica):
    manifest = make_record(BOB, NETWORK, Manifest("model", b"{}", ("embed",), BLOB), nonce=0)
    assert replica.catalog().models() == ()
    write(replica, ALICE, [manifest])
    assert [model.complete for model in replica.catalog().models()] == [False]
    write(replica, BOB, [make_record(BOB, NETWORK, Layer(manifest.id, 0, BLOB), nonce=1)])
    catalog = replica.catalog()
    assert [model.complete for model in catalog.models()] == [True]
    assert replica.catalog() is catalog  # nothing to fold anew
    assert [replica.view().next_nonce(key.address) for key in (BOB, ALICE)] == [2, 0]


def test_who_may_not_author(replica):
    with pytest.raises(ConfigError, match="no validator of this network"):
        write(replica, STRANGER)
    with pytest.raises(RuleError, match="parents that are here"):
        write(replica, parents=(bytes(32),))
    assert replica.count() == 0


def test_a_key_used_twice_stops(replica, forge):
    replica.accept(forge.block(ALICE).raw)
    replica.accept(forge.block(ALICE, prev=None, timestamp_ms=9).raw)
    with pytest.raises(LocalError, match="two machines"):
        write(replica, ALICE)


def test_more_heads_than_parents_are_picked_up_by_later_blocks(tmp_path):
    keys = [Key(bytes([1, number]) * 16) for number in range(40)]
    genesis = Genesis.make("wide", {key.address: 1 for key in keys}, created_ms=0)
    with Replica.open(tmp_path / "wide", genesis) as replica:
        root = (genesis.network,)
        blocks = [write(replica, key, parents=root) for key in keys]
        own = write(replica, keys[0], parents=(blocks[0].id,))
        assert len(replica.heads()) == 40
        first = write(replica, keys[0])
        assert len(first.header.parents) == MAX_PARENTS
        assert own.id in first.header.parents  # covers its own last block, though others are lower
        lowest = sorted(block.id for block in blocks[1:])
        assert set(first.header.parents) == {own.id, *lowest[:15]}
        second = write(replica, keys[1])
        third = write(replica, keys[0])
        assert replica.heads() == (third.id,)
        assert first.id in third.header.parents or first.id in second.header.parents


# Orphans


def test_orphans_are_adopted_level_by_level(replica, forge):
    a = forge.block(ALICE)
    b, c = forge.block(BOB, (a.id,)), forge.block(CAROL, (a.id,))
    d = forge.block(DAVE, (b.id, c.id))
    assert replica.accept(d.raw) == Orphan(d, tuple(sorted((b.id, c.id))))
    assert replica.accept(b.raw) == Orphan(b, (a.id,))
    assert replica.accept(d.raw) == Orphan(d, tuple(sorted((a.id, c.id))))  # what to fetch, down to the bottom
    assert replica.accept(c.raw) == Orphan(c, (a.id,))
    assert replica.accept(a.raw) == Accepted(a, (*sorted((b, c), key=lambda block: block.id), d))
    assert replica.heads() == (d.id,)


def test_a_long_chain_of_orphans_is_adopted_without_recursion(tmp_path, forge):
    blocks = [forge.block() for _ in range(3000)]
    orphans = Orphans(per_source=5000)
    with Replica(Store(tmp_path / "chain"), GENESIS, orphans=orphans) as replica:
        for block in blocks[:0:-1]:
            assert isinstance(replica.accept(block.raw), Orphan)
        outcome = replica.accept(blocks[0].raw)
        assert outcome == Accepted(blocks[0], tuple(blocks[1:]))
        assert len(orphans) == 0
        assert orphans.size == 0


def test_an_orphan_that_breaks_a_rule_is_named_with_all_that_waits_for_it(replica, forge):
    a = forge.block(ALICE)
    bad = forge.block(BOB, (a.id,), height=5)
    forge.heights[bad.id] = 2
    on_bad = forge.block(CAROL, (bad.id,))
    replica.accept(on_bad.raw, source="mallory")
    replica.accept(bad.raw, source="eve")
    outcome = replica.accept(a.raw)
    assert isinstance(outcome, Accepted)
    assert {(refusal.id, refusal.source) for refusal in outcome.refused} == {(bad.id, "eve"), (on_bad.id, "mallory")}
    assert replica.heads() == (a.id,)
    assert not replica.wants(bad.id)
    assert not replica.wants(on_bad.id)


def orphan_blocks(count: int) -> list[Block]:
    forge = Forge()
    hidden = forge.block(ALICE)
    return [Forge(dict(forge.heights)).block(BOB, (hidden.id,), timestamp_ms=n) for n in range(count)]


def test_a_source_displaces_only_what_it_sent_itself():
    orphans = Orphans(per_source=3)
    blocks = orphan_blocks(6)
    orphans.add(blocks[0], blocks[0].header.parents, "honest")
    for block in blocks[1:]:
        orphans.add(block, block.header.parents, "flood")
    kept = [block.id for block in blocks if orphans.get(block.id)]
    assert kept == [blocks[0].id, *(block.id for block in blocks[3:])]
    assert len(orphans) == 4


def test_orphans_are_bounded_in_bytes_and_in_all():
    blocks = orphan_blocks(8)
    size = len(blocks[0].raw)
    narrow = Orphans(bytes_per_source=2 * size)
    for block in blocks:
        narrow.add(block, block.header.parents, "one")
    assert [narrow.get(block.id) is not None for block in blocks] == [False] * 6 + [True] * 2
    for orphans in (Orphans(total=4), Orphans(total_bytes=4 * size)):
        orphans.add(blocks[0], blocks[0].header.parents, "small")
        for block in blocks[1:]:
            orphans.add(block, block.header.parents, "large")
        assert len(orphans) == 4
        assert orphans.size == 4 * size
        assert orphans.get(blocks[0].id)
        assert orphans.get(blocks[-1].id)


def test_forgotten_orphans_leave_nothing_behind():
    orphans = Orphans(per_source=1)
    blocks = orphan_blocks(3)
    for block in blocks:
        orphans.add(block, block.header.parents, "one")
    (released,) = orphans.release(blocks[0].header.parents[0])
    assert released.block == blocks[-1]
    assert (len(orphans), orphans.size) == (0, 0)
    assert orphans.release(blocks[0].header.parents[0]) == []


# Equivocators


def forked(forge: Forge, branches: int) -> list[Block]:
    return [forge.block(ALICE, prev=None, timestamp_ms=100 + n) for n in range(branches)]


def test_two_branches_are_kept_as_evidence_and_a_third_is_not(replica, forge):
    one, two, three = forked(forge, 3)
    assert isinstance(replica.accept(one.raw), Accepted)
    assert not replica.is_equivocator(ALICE.address)
    assert isinstance(replica.accept(two.raw), Accepted)
    assert replica.is_equivocator(ALICE.address)
    assert replica.accept(three.raw) == Surplus(three)
    assert set(replica.heads()) == {one.id, two.id}
    assert not replica.wants(three.id)


def test_a_branch_that_anothers_block_builds_on_is_always_accepted(replica, forge):
    *kept, third = forked(forge, 3)
    on_third = forge.block(ALICE, (third.id,), prev=third)
    needs_it = forge.block(BOB, (on_third.id,))
    for block in kept:
        replica.accept(block.raw)
    assert isinstance(replica.accept(third.raw), Surplus)
    assert replica.accept(needs_it.raw) == Orphan(needs_it, (on_third.id,))
    assert replica.accept(on_third.raw) == Orphan(on_third, (third.id,))
    assert replica.wants(third.id)
    assert replica.accept(third.raw) == Accepted(third, (on_third, needs_it))
    assert replica.has(third.id)


def test_an_equivocators_own_blocks_do_not_make_a_branch_needed(replica, forge):
    *kept, third = forked(forge, 3)
    on_third = forge.block(ALICE, (third.id,), prev=third)
    for block in kept:
        replica.accept(block.raw)
    assert isinstance(replica.accept(on_third.raw), Orphan)
    assert isinstance(replica.accept(third.raw), Surplus)


def test_honest_authors_build_on_nothing_that_only_an_equivocator_wrote(replica, forge):
    base = forge.block(BOB)
    one = forge.block(ALICE, (base.id,))
    built = forge.block(CAROL, (one.id,))
    two = forge.block(ALICE, (base.id,), prev=None, timestamp_ms=9)
    alone = forge.block(ALICE, (two.id,), prev=two)
    for block in (base, one, built, two, alone):
        assert isinstance(replica.accept(block.raw), Accepted)
    assert set(replica.heads()) == {built.id, alone.id}
    block = write(replica, DAVE)
    assert block.header.parents == (built.id,)  # Carol's block had covered Alice's first before anybody knew
    assert write(replica, BOB).header.parents == (block.id,)
    assert replica.heads() == tuple(sorted((alone.id, replica.blocks(limit=99)[-1].id)))


def test_an_equivocators_head_hides_no_honest_block(replica, forge):
    base, side = forge.block(BOB), forge.block(CAROL)
    one = forge.block(ALICE, (base.id, side.id))
    two = forge.block(ALICE, (base.id,), prev=None, timestamp_ms=9)
    for block in (base, side, one, two):
        replica.accept(block.raw)
    assert set(replica.heads()) == {one.id, two.id}
    assert write(replica, DAVE).header.parents == tuple(sorted((base.id, side.id)))


# Any order of arrival


def random_dag(seed: int, size: int) -> list[Block]:
    """Blocks of honest authors on partial views, with forks by Alice that some of them build on, and records."""
    rng = random.Random(seed)
    forge, blocks, nonce = Forge(), [], 0
    manifest = make_record(BOB, NETWORK, Manifest("model", b"{}", ("embed", "head"), BLOB), nonce=0)
    tips = {key.address: NETWORK for key in KEYS}
    ancestors: dict[bytes, set[bytes]] = {NETWORK: set()}
    for number in range(size):
        key = rng.choice(KEYS[:6])
        seen = {tips[each.address] for each in rng.sample(KEYS[1:6], 2)} | {tips[key.address]}
        parents = tuple(p for p in seen if not any(p in ancestors[q] for q in seen))
        records = ()
        if number == 2:
            records = (manifest,)
        elif rng.random() < 0.4:
            nonce += rng.choice((0, 1))
            layer = Layer(manifest.id, rng.randrange(3), BlobRef(bytes([number]) * 32, number))
            records = (make_record(rng.choice((BOB, CAROL)), NETWORK, layer, nonce=nonce),)
        block = forge.block(key, parents, records)
        blocks.append(block)
        ancestors[block.id] = set(parents).union(*(ancestors[p] for p in parents))
        tips[key.address] = block.id
    return blocks


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10**6), st.integers(3, 40), st.randoms(use_true_random=False))
def test_any_order_of_arrival_gives_the_same_replica(tmp_path_factory, seed, size, rng):
    blocks = random_dag(seed, size)
    shuffled = blocks[:]
    rng.shuffle(shuffled)
    directory = tmp_path_factory.mktemp("orders")
    with Replica.open(directory / "a", GENESIS) as one, Replica.open(directory / "b", GENESIS) as two:
        for block in blocks:
            assert isinstance(one.accept(block.raw), Accepted)
        for block in shuffled:
            assert isinstance(two.accept(block.raw), Accepted | Orphan)
        assert summary(one) == summary(two)
        assert [b.id for b in one.blocks(limit=99)] == [b.id for b in two.blocks(limit=99)]
        heads = set(one.heads())
        assert heads == {b.id for b in blocks} - {p for b in blocks for p in b.header.parents}
    with Replica.open(directory / "b", GENESIS) as again:
        assert [b.id for b in again.blocks(limit=99)] == sorted_ids(blocks)
        assert again.heads() == tuple(sorted(heads))


def sorted_ids(blocks: list[Block]) -> list[bytes]:
    return [block.id for block in sorted(blocks, key=lambda block: (block.height, block.id))]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.randoms(use_true_random=False), st.integers(2, 4))
def test_any_order_of_arrival_with_forks_gives_the_same_honest_part(tmp_path_factory, rng, branches):
    forge = Forge()
    base = forge.block(BOB)
    blocks = [base]
    for number in range(branches):
        one = forge.block(ALICE, (base.id,), prev=None, timestamp_ms=number)
        two = forge.block(ALICE, (one.id,), prev=one)
        blocks += [one, two, forge.block(KEYS[2 + number], (two.id,))]
    top = forge.block(KEYS[7], tuple(block.id for block in blocks[3::3]))
    directory = tmp_path_factory.mktemp("orders")
    with Replica.open(directory / "a", GENESIS) as replica:
        waiting = [*blocks, top]
        rng.shuffle(waiting)
        for _ in range(3):  # what was surplus is offered again, as a peer's heads would
            for block in waiting:
                replica.accept(block.raw)
        assert replica.heads() == (top.id,)
        assert replica.count() == len(blocks) + 1


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10**6))
def test_ancestors_are_those_that_a_search_finds(tmp_path_factory, seed):
    blocks = random_dag(seed, 30)
    with Replica.open(tmp_path_factory.mktemp("search") / "a", GENESIS) as replica:
        for block in blocks:
            replica.accept(block.raw)
        ancestors: dict[bytes, set[bytes]] = {NETWORK: set()}
        nodes = {id: replica.dag.node(id) for id in [NETWORK, *(block.id for block in blocks)]}
        for block in blocks:
            parents = block.header.parents
            ancestors[block.id] = set(parents).union(*(ancestors[parent] for parent in parents))
        for one, node in nodes.items():
            assert {id for id, at in nodes.items() if id != one and node.reaches(at)} == ancestors[one]


# Bad input


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_mutation_of_a_block_raises_and_changes_nothing(replica, data):
    record = sign_record(ALICE, NETWORK, "data", b"payload", nonce=3)
    raw = bytearray(Forge().block(records=(record,)).raw)
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(RuleError):
        replica.accept(bytes(raw))
    assert summary(replica) == ((NETWORK,), 0, 0, ())


@given(st.binary(max_size=600))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_garbage_raises_a_rule_error(replica, raw):
    with pytest.raises(RuleError):
        replica.accept(raw)
    with pytest.raises(RuleError):
        decode_block(raw)


def test_a_wrong_signature_does_not_condemn_the_block(replica, forge):
    block = forge.block()
    with pytest.raises(RuleError):
        replica.accept(forge.reforge(BOB, block).raw)
    assert isinstance(replica.accept(block.raw), Accepted)


# Opening


def test_reopening_gives_the_same_replica(tmp_path):
    blocks = random_dag(7, 40)
    forks = [Forge().block(ALICE, timestamp_ms=1000 + n) for n in range(2)]
    with Replica.open(tmp_path / "chain", GENESIS) as replica:
        for block in [*blocks, *forks]:
            replica.accept(block.raw)
        before = summary(replica)
    with Replica.open(tmp_path / "chain", GENESIS) as replica:
        assert summary(replica) == before
        assert replica.is_equivocator(ALICE.address)
        assert not replica.is_equivocator(BOB.address)
        block = write(replica, BOB)
        assert replica.block(block.id) == block


def test_one_process_per_directory(tmp_path, replica):
    with pytest.raises(AlreadyRunning, match="stop it first"):
        Replica.open(tmp_path / "chain", GENESIS)


def test_a_directory_of_another_network_is_refused(tmp_path):
    Replica.open(tmp_path / "chain", GENESIS).close()
    elsewhere = Genesis.make("else", {ALICE.address: 1}, created_ms=0)
    with pytest.raises(StoreError, match="genesis file of that network"):
        Replica.open(tmp_path / "chain", elsewhere)
    Replica.open(tmp_path / "chain", GENESIS).close()  # and is not left locked


def test_a_directory_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="file"):
        Replica.open(tmp_path / "file" / "chain", GENESIS)
