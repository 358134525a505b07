from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blyan_node.chain.dag import Dag, Node
from blyan_node.chain.order import Carried, Item, item_of, order, window
from blyan_node.chain.records import Record, Transfer, make_record
from tests.support.chains import KEYS, NETWORK, STRANGER, Forge

A, B, C, D = (key.address for key in KEYS[:4])
STAKE = {key.address: 10 for key in KEYS[:4]}


def pay(nonce: int = 0, amount: int = 1, key=STRANGER) -> Record:
    return make_record(key, NETWORK, Transfer(KEYS[7].address, amount), nonce=nonce)


RED, BLUE, GREEN = pay(amount=1), pay(amount=2), pay(amount=3)


@dataclass
class World:
    """A window of plain values. Every block knows its past, so nothing here shares code with what is tested."""

    items: dict[bytes, Item] = field(default_factory=dict)
    pasts: dict[bytes, frozenset[bytes]] = field(default_factory=dict)
    next_seq: dict[bytes, int] = field(default_factory=dict)

    def add(self, author: bytes, name: str, parents: Iterable[bytes] = (), *records: Record, seq: int | None = None):
        id = name.encode().rjust(32, b"\0")
        height = 1 + max((self.items[parent].height for parent in parents), default=0)
        past = frozenset({id}.union(*(self.pasts[parent] for parent in parents)))
        if seq is None:
            seq = self.next_seq.get(author, 0)
            self.next_seq[author] = seq + 1
        self.items[id] = Item(id, height, author, seq, records)
        self.pasts[id] = past
        return id

    def reaches(self, one: bytes, other: bytes) -> bool:
        return other in self.pasts[one]

    def order(self, stake=STAKE, equivocators=frozenset()) -> tuple[Carried, ...]:
        return order(self.items.values(), reaches=self.reaches, stake=stake, equivocators=equivocators)

    def winner(self, **changes) -> Record:
        (won,) = [carried.record for carried in self.order(**changes) if carried.lost_to is None]
        return won


def test_records_stand_by_height_id_and_place_each_once():
    world = World()
    low = world.add(A, "z", (), pay(0), pay(1))
    other = world.add(B, "a", (), pay(2))
    world.add(A, "b", (low, other), pay(1), pay(3))
    assert [(c.record, c.block, c.author, c.lost_to) for c in world.order()] == [
        (pay(2), other, B, None),
        (pay(0), low, A, None),
        (pay(1), low, A, None),
        (pay(3), b"b".rjust(32, b"\0"), A, None),
    ]


def test_a_record_has_no_rival_in_its_own_copies():
    world = World()
    world.add(A, "a", (), RED)
    world.add(B, "b", (), RED)
    assert [c.lost_to for c in world.order()] == [None]


def test_the_window_ends_where_the_last_cut_begins():
    parents = {b"f": (b"d", b"e"), b"e": (b"c",), b"d": (b"b", b"c"), b"c": (b"a",), b"b": (b"a",), b"a": ()}
    for settled, expected in [(b"", b"abcdef"), (b"a", b"bcdef"), (b"abc", b"def"), (b"abcdef", b"")]:
        done = {bytes([byte]) for byte in settled}
        found = window([b"f"], parents=parents.__getitem__, settled=done.__contains__)
        assert found == {bytes([byte]) for byte in expected}


# Who wins a double spend. In all of these RED stands first by (height, id).


def test_a_tie_goes_to_the_earlier():
    world = World()
    world.add(A, "a", (), RED)
    world.add(B, "b", (), BLUE)
    assert world.winner() == RED
    assert [c.lost_to for c in world.order()] == [None, RED.id]


def test_most_stake_that_saw_one_rival_alone_wins():
    world = World()
    world.add(A, "a", (), RED)
    blue = world.add(B, "b", (), BLUE)
    world.add(C, "c", (blue,))
    assert world.winner() == BLUE
    assert world.winner(stake={**STAKE, A: 20}) == RED
    assert world.winner(stake={**STAKE, A: 21}) == RED
    assert world.winner(stake={**STAKE, A: 19}) == BLUE


def test_who_saw_both_at_once_abstains():
    world = World()
    red = world.add(A, "a", (), RED)
    blue = world.add(B, "b", (), BLUE)
    world.add(C, "c", (red, blue))
    world.add(D, "d", (blue,))
    assert world.winner(stake={**STAKE, C: 1000}) == BLUE


def test_the_first_block_that_saw_a_rival_counts_not_later_ones():
    world = World()
    before = world.add(C, "c0")
    red = world.add(A, "a", (), RED)
    blue = world.add(B, "b", (before,), BLUE)
    saw = world.add(C, "c1", (blue,))
    world.add(C, "c2", (saw, red))
    assert world.winner() == BLUE


def test_a_copy_elsewhere_counts_as_seeing_the_rival():
    world = World()
    world.add(A, "a", (), RED)
    world.add(B, "b", (), BLUE)
    copy = world.add(STRANGER.address, "s", (), BLUE)
    world.add(C, "c", (copy,))
    assert world.winner() == BLUE


def test_equivocators_and_who_has_no_stake_do_not_vote():
    world = World()
    world.add(A, "a", (), RED)
    blue = world.add(B, "b", (), BLUE)
    world.add(C, "c", (blue,))
    world.add(STRANGER.address, "s", (blue,))
    assert world.winner() == BLUE
    assert world.winner(equivocators=frozenset({C})) == RED
    world.add(C, "c'", (blue,), seq=0)
    assert world.winner() == RED


def test_of_three_rivals_one_wins():
    world = World()
    world.add(A, "a", (), RED)
    blue = world.add(B, "b", (), BLUE)
    world.add(C, "c", (blue,), GREEN)  # saw two: abstains
    world.add(D, "d", (blue,))
    ordered = world.order()
    assert [(c.record, c.lost_to) for c in ordered] == [(RED, BLUE.id), (BLUE, None), (GREEN, BLUE.id)]


def test_two_rivals_in_one_block():
    world = World()
    world.add(A, "a", (), RED, BLUE)
    assert world.winner() == RED


# The attack: a rival withheld below a payment that everyone has acknowledged.


def attack(seed: int) -> tuple[World, Record, Record]:
    """Honest validators build on what they know; one, with a quarter of the stake, keeps a low block to itself.

    Returns the window after all have seen all, the acknowledged payment and its withheld rival.
    """
    random_ = random.Random(seed)
    world, honest, thief = World(), [A, B, C], D
    paid, rival = pay(amount=1 + 2 * seed), pay(amount=2 + 2 * seed)
    base = world.add(thief, f"{seed} base")
    last = {author: world.add(author, f"{seed} first {number}", (base,)) for number, author in enumerate(honest)}
    withheld = world.add(thief, f"{seed} withheld", (base,), rival)
    merchant = random_.choice(honest)
    for turn in range(random_.randint(0, 3)):  # the chain grows before the payment
        author = random_.choice(honest)
        last[author] = world.add(author, f"{seed} grow {turn}", set(last.values()))
    last[merchant] = world.add(merchant, f"{seed} payment", set(last.values()), paid)
    others = [author for author in honest if author != merchant]
    random_.shuffle(others)
    for author in others:  # the acknowledgements: more than 2/3 of stake has the payment in its past
        last[author] = world.add(author, f"{seed} ack {author.hex()[:4]}", (last[author], last[merchant]))
    for author in random_.sample([*honest, thief], 4):  # the rival comes out, and is even built on
        last[author] = world.add(author, f"{seed} late {author.hex()[:4]}", (*last.values(), withheld))
    return world, paid, rival


def test_a_withheld_rival_cancels_no_acknowledged_payment():
    cancelled = 0
    for seed in range(200):
        world, paid, _ = attack(seed)
        cancelled += world.winner() != paid
    assert cancelled == 0


def test_mutant_plain_order_would_let_the_attack_through():
    """Without votes the rule is (height, id) alone: what the withheld block is made for."""
    cancelled = 0
    for seed in range(200):
        world, _, rival = attack(seed)
        cancelled += world.winner(stake={}) == rival
    assert cancelled == 200


# One DAG has one order, however it arrived.


def forged(seed: int):
    """Blocks of five authors on partial views, with double spends and a fork, by the real machinery."""
    random_ = random.Random(seed)
    forge = Forge()
    blocks = []
    for step in range(14):
        key = random_.choice(KEYS[:5])
        records = tuple(
            pay(nonce=random_.randint(0, 2), amount=random_.randint(1, 2), key=random_.choice(KEYS[5:7]))
            for _ in range(random_.randint(0, 2))
        )
        own = forge.last.get(key.address)
        seen = random_.sample(blocks, min(len(blocks), random_.randint(0, 2)))
        parents = {block.id for block in [*([own] if own else []), *seen]}
        blocks.append(forge.block(key, tuple(parents), tuple(dict.fromkeys(records))))
        if step == 7:
            twin = forge.block(KEYS[4], (NETWORK,), (pay(amount=9, key=KEYS[5]),), prev=None)
            blocks.append(twin)
    return blocks


def arrive(blocks, random_: random.Random) -> Dag:
    nodes: dict[bytes, Node] = {}
    dag = Dag(NETWORK, load=nodes.get)
    waiting = list(blocks)
    while waiting:
        ready = [block for block in waiting if not dag.missing(block.header)]
        block = random_.choice(ready)
        waiting.remove(block)
        placed = dag.place(block, [dag.node(parent) for parent in block.header.parents])
        dag.apply(placed)
        nodes[block.id] = placed.node
    return dag


@pytest.mark.parametrize("seed", range(25))
def test_any_order_of_arrival_gives_one_order(seed):
    blocks = forged(seed)
    random_ = random.Random(seed)
    outcomes = set()
    for _ in range(4):
        dag = arrive(blocks, random_)
        parents = {block.id: block.header.parents for block in blocks}
        found = window(dag.heads(), parents=parents.__getitem__, settled={NETWORK}.__contains__)
        assert found == set(parents)
        random_.shuffle(blocks)
        forked = frozenset(key.address for key in KEYS if dag.is_equivocator(key.address))
        items = [item_of(block) for block in blocks]
        stake = {key.address: 1 + number for number, key in enumerate(KEYS)}
        outcomes.add(
            order(
                items,
                reaches=lambda one, other, dag=dag: dag.node(one).reaches(dag.node(other)),
                stake=stake,
                equivocators=forked,
            )
        )
    assert len(outcomes) == 1


@given(st.integers(0, 2**32), st.lists(st.integers(1, 5), min_size=4, max_size=4))
def test_of_every_slot_exactly_one_record_counts(seed, stakes):
    random_ = random.Random(seed)
    world = World()
    authors = [A, B, C, D]
    for step in range(random_.randint(1, 10)):
        known = list(world.items)
        records = [pay(random_.randint(0, 1), random_.randint(1, 3)) for _ in range(random_.randint(0, 2))]
        world.add(random_.choice(authors), str(step), random_.sample(known, min(len(known), 2)), *records)
    ordered = world.order(stake=dict(zip(authors, stakes, strict=True)))
    slots = {(c.record.sender, c.record.nonce) for c in ordered}
    winners = {c.record.id for c in ordered if c.lost_to is None}
    assert len(winners) == len(slots)
    assert {c.lost_to for c in ordered if c.lost_to} <= winners
    assert len({c.record.id for c in ordered}) == len(ordered)
    shuffled = list(world.items.values())
    random_.shuffle(shuffled)
    assert ordered == order(shuffled, reaches=world.reaches, stake=dict(zip(authors, stakes, strict=True)))


def test_an_item_is_a_block_s_outline():
    block = Forge().block(KEYS[0], (), (RED,))
    assert item_of(block) == Item(block.id, 1, A, 0, (RED,))
    assert item_of(block).place == (1, block.id)
    assert replace(item_of(block), height=2).place > item_of(block).place
