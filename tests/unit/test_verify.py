"""Verification of a stored chain: what is sound passes, and every kind of damage is found, named, and told once."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blyan_node.chain.block import Block, decode_block, encode_body, seal
from blyan_node.chain.dag import Branch, Node
from blyan_node.chain.finals import MAX_ENTRY, Finals, StoredCut, StoredResult
from blyan_node.chain.keys import Key
from blyan_node.chain.ledger import Movement
from blyan_node.chain.replica import Replica
from blyan_node.chain.rules import check_in_isolation
from blyan_node.chain.state import State
from blyan_node.chain.store import Prefix, Store
from blyan_node.chain.tables import Tables, author_key, branch_entry, height_key, node_entry
from blyan_node.chain.verify import Fault, Progress, Verified, verify, verify_store
from blyan_node.chain.verify_blocks import LENGTHS
from blyan_node.codec import encode, pack, unpack
from blyan_node.errors import AlreadyRunning, StoreError
from tests.support.chains import GENESIS as OTHER_GENESIS
from tests.support.chains import KEYS, STRANGER
from tests.support.decided import GENESIS, NETWORK, VALIDATORS, write_chain
from tests.unit.test_replica import random_dag

K = 9


@dataclass
class Damaged:
    """A copy of the sound chain, to be damaged entry by entry."""

    store: Store

    def __post_init__(self) -> None:
        self.tables = Tables(self.store, GENESIS)
        self.blocks = [self.tables.indexed(id) for id in self.tables.ids("ABT", None)]

    def put(self, key: bytes, value: bytes | None) -> None:
        self.store.write([(key, value)])

    def get(self, key: bytes) -> bytes:
        value = self.store.get(key)
        assert value is not None
        return value

    def flip(self, key: bytes, at: int = -1) -> None:
        value = bytearray(self.get(key))
        value[at] ^= 1
        self.put(key, bytes(value))

    def keys(self, prefix: Prefix, *parts: bytes | int) -> list[bytes]:
        return list(self.store.keys(prefix.key(*parts)))

    def final_in(self, k: int, *, carrying: bool = False) -> Block:
        """A block that a cut made final."""
        return next(
            block
            for block in self.blocks
            if self.store.get(Prefix.FINAL.key(block.id)) == k.to_bytes(8) and (block.records or not carrying)
        )

    def of(self, key: Key) -> list[Block]:
        return [block for block in self.blocks if block.header.author == key.address]

    def node(self, block: Block) -> Node:
        node = self.tables.node(block.id)
        assert node is not None
        return node

    def branch(self, number: int) -> Branch:
        branch = self.tables.branch(number)
        assert branch is not None
        return branch

    def cut(self, k: int) -> StoredCut:
        return unpack(StoredCut, self.get(Prefix.CUT.key(k)), most=MAX_ENTRY)

    def change(self, k: int, **changes: Any) -> None:
        self.put(Prefix.CUT.key(k), pack(replace(self.cut(k), **changes)))

    def state(self) -> State:
        return Finals(self.store, GENESIS).last.state

    def faults(self) -> list[Fault]:
        return [finding for finding in verify_store(self.store, GENESIS) if isinstance(finding, Fault)]

    def told(self) -> list[tuple[str, str]]:
        return [(fault.where, fault.what) for fault in self.faults()]


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sound") / "chain"
    write_chain(directory)
    return directory


@pytest.fixture
def chain(sound: Path, tmp_path: Path) -> Iterator[Damaged]:
    shutil.copytree(sound, tmp_path / "chain")
    with Store(tmp_path / "chain") as store:
        yield Damaged(store)


def named(block: Block) -> str:
    return f"block {block.id.hex()}"


# What is sound


def test_a_sound_chain_is_clean_and_nothing_is_written(chain: Damaged) -> None:
    before = {key: chain.store.get(key) for key in chain.store.keys(b"")}
    found = list(verify_store(chain.store, GENESIS))
    assert found[-1] == Verified(len(chain.blocks), K, 0, complete=True)
    assert all(isinstance(finding, Progress) for finding in found[:-1])
    stages = [finding.stage for finding in found[:-1] if isinstance(finding, Progress)]
    assert list(dict.fromkeys(stages)) == ["blocks", "DAG", "cuts"]
    last = {finding.stage: finding for finding in found if isinstance(finding, Progress)}
    assert all(each.done == each.total > 0 for each in last.values())
    assert {key: chain.store.get(key) for key in chain.store.keys(b"")} == before


def test_the_sound_chain_has_what_can_go_wrong(chain: Damaged) -> None:
    """Or the tests below would prove little."""
    state = chain.state()
    assert (state.k, len(state.slashed), len(state.models), len(state.layers)) == (K, 1, 1, 1)
    authors = [branch.author for branch in chain.tables.branches().values()]
    assert len(authors) > len(set(authors))  # an equivocator has two branches
    results = [unpack(StoredResult, chain.get(key), most=MAX_ENTRY) for key in chain.keys(Prefix.RESULT)]
    assert {result.k for result in results} == set(range(1, K + 1))
    assert any(result.void is not None for result in results)
    kinds = {unpack(Movement, chain.get(key), most=MAX_ENTRY).kind for key in chain.keys(Prefix.MOVEMENT)}
    assert {"transfer", "received", "fee", "released", "slashed", "manifest", "layer"} <= kinds
    assert any(chain.store.get(Prefix.FINAL.key(block.id)) is None and block.records for block in chain.blocks)
    assert len(chain.keys(Prefix.VOTE)) == 6


def test_a_chain_without_blocks_is_clean(tmp_path: Path) -> None:
    assert list(verify(tmp_path / "new", GENESIS)) == [Verified(0, 0, 0, complete=True)]
    Replica.open(tmp_path / "opened", GENESIS).close()
    assert list(verify(tmp_path / "opened", GENESIS))[-1] == Verified(0, 0, 0, complete=True)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6), shuffle=st.randoms(use_true_random=False))
def test_any_dag_in_any_order_of_arrival_is_clean(
    tmp_path_factory: pytest.TempPathFactory, seed: int, shuffle: Any
) -> None:
    directory = tmp_path_factory.mktemp("random")
    blocks = random_dag(seed, 40)
    shuffle.shuffle(blocks)
    with Store(directory) as store:
        replica = Replica(store, OTHER_GENESIS)
        for block in blocks:
            replica.accept(block.raw)
        count = replica.count()
        assert list(verify_store(store, OTHER_GENESIS))[-1] == Verified(count, 0, 0, complete=True)


def test_a_database_of_another_network_or_in_use_is_refused(chain: Damaged) -> None:
    with pytest.raises(StoreError, match="of network"):
        list(verify_store(chain.store, OTHER_GENESIS))
    with pytest.raises(AlreadyRunning, match="another process"):
        list(verify(chain.store.directory, GENESIS))


def test_every_table_is_known_to_verification() -> None:
    assert LENGTHS.keys() == set(Prefix)


# Blocks


def test_a_flipped_bit_of_a_header(chain: Damaged) -> None:
    block = chain.blocks[-1]
    chain.flip(Prefix.BLOCK.key(block.id), 20)
    assert chain.told() == [(named(block), "under its id stands another block")]


def test_a_flipped_bit_of_the_encoding(chain: Damaged) -> None:
    block = chain.blocks[-1]
    chain.flip(Prefix.BLOCK.key(block.id), 0)
    ((where, what),) = chain.told()
    assert where == named(block)
    assert what.startswith("it is unreadable: ")


def test_a_flipped_bit_of_a_signature(chain: Damaged) -> None:
    block = chain.final_in(3)
    chain.flip(Prefix.BLOCK.key(block.id), block.raw.index(block.signature) + 5)
    assert chain.told() == [(named(block), "it breaks a rule: the block's author did not sign it")]


def test_a_flipped_bit_of_a_body_stops_the_ledger_where_it_is_needed(chain: Damaged) -> None:
    block = chain.final_in(5, carrying=True)
    chain.flip(Prefix.BLOCK.key(block.id))
    assert chain.told() == [
        (named(block), "it breaks a rule: the body is not the one that the header names"),
        ("cut 5", "it cannot be folded, its blocks being damaged: the ledger was not checked from there on"),
    ]


def test_the_ledger_stops_but_the_cuts_are_checked_on(chain: Damaged) -> None:
    block = chain.final_in(5, carrying=True)
    chain.flip(Prefix.BLOCK.key(block.id))
    chain.change(8, certificate=chain.cut(7).certificate)
    chain.change(6, deciders=chain.cut(1).deciders)
    chain.put(chain.keys(Prefix.ROW)[3], None)
    assert chain.told()[2:] == [
        ("cut 6", "the validators that are stored with it are not those that decide the next cut"),
        ("cut 8", "its certificate does not prove it: the certificate of another cut"),
        ("the state", "its rows are not those of the root that is stored with the last cut"),
    ]


def test_a_body_that_is_missing(chain: Damaged) -> None:
    block = chain.of(VALIDATORS[0])[-1]
    chain.put(Prefix.BLOCK.key(block.id), encode([block.header_bytes, block.signature, b""]))
    assert chain.told() == [(named(block), "its body is missing")]


def test_a_record_that_its_sender_did_not_sign(chain: Damaged) -> None:
    """A validator's own forgery: the block is signed, the record in it is not."""
    keys = {key.address: key for key in [*KEYS, STRANGER]}
    heads = [b for b in chain.blocks if chain.store.get(Prefix.HEAD.key(b.id)) is not None]
    block = next(b for b in heads if b.header.author in keys)
    sound = next(b for b in chain.blocks if b.records).records[0]
    record = replace(sound, signature=bytes(65))
    forged = forge(keys[block.header.author], block, records=(record,))
    swap(chain, block, forged)
    ((where, what),) = chain.told()
    assert where == named(forged)
    assert what.startswith("it breaks a rule: ")
    with pytest.raises(Exception) as caught:
        check_in_isolation(decode_block(forged.raw), NETWORK)
    assert what == f"it breaks a rule: {caught.value}"


def forge(key: Key, block: Block, *, records: Any = None, **changes: Any) -> Block:
    """Sign a block anew, with changes."""
    from hashlib import sha256

    body = encode_body(block.records if records is None else records)
    header = replace(block.header, body_hash=sha256(body).digest(), body_len=len(body), **changes)
    return seal(key, header, body)


def swap(chain: Damaged, block: Block, other: Block) -> None:
    """Put another block in the place of a head, with all that belongs to it, as a replica with other rules would."""
    node, header = chain.node(block), other.header
    parents = [each for parent in header.parents if (each := chain.tables.node(parent))]
    height = 1 + max((each.height for each in parents), default=0)
    assert chain.store.get(Prefix.HEAD.key(block.id)) is not None
    past = dict(node.past) | {node.branch: header.seq + 1}
    new = Node(header.height, node.branch, header.seq, header.parents, past, header.anchor.k, header.carries)
    branch = replace(chain.branch(node.branch), tip=other.id, last=header.seq)
    assert height
    chain.store.write(
        [
            (Prefix.BLOCK.key(block.id), None),
            (Prefix.NODE.key(block.id), None),
            (Prefix.HEAD.key(block.id), None),
            (height_key(block.header, block.id), None),
            (author_key(block.header, block.id), None),
            (Prefix.BLOCK.key(other.id), other.raw),
            (Prefix.HEAD.key(other.id), b""),
            (height_key(header, other.id), b""),
            (author_key(header, other.id), b""),
            node_entry(other.id, new),
            branch_entry(node.branch, branch),
        ]
    )


def last_head(chain: Damaged) -> tuple[Key, Block]:
    head = chain.tables.block(chain.keys(Prefix.HEAD)[0][1:])
    assert head is not None
    return next(key for key in VALIDATORS if key.address == head.header.author), head
