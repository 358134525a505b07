"""The test plan's unit tests of the chain, and what its shapes promise beyond them."""

from __future__ import annotations

from pathlib import Path

import pytest

from blyan_node.chain.chain import WIDTH, Chain
from blyan_node.chain.merkle import generate_merkle_root
from blyan_node.chain.plan import Block
from blyan_node.errors import AlreadyRunning, CodecError, CycleDetected, RuleError


def create_test_block(index: int) -> Block:
    return Block(index=index, data=b"data %d" % index, block_type="data", previous_hash="0x0")


@pytest.fixture
def test_blockchain(tmp_path: Path):
    with Chain(tmp_path, "test") as chain:
        chain.add_block(b"genesis", block_type="meta")
        yield chain


def test_block_creation():
    block = Block(index=1, data=b"test_data", block_type="delta", previous_hash="0x123")
    assert block.calculate_hash() != ""
    assert block.validate()


def test_dag_cycle_detection(tmp_path):
    with Chain(tmp_path, "A") as chain:
        block1 = chain.add_block(b"data1")
        block2 = chain.add_block(b"data2", depends_on=[block1])
        with pytest.raises(CycleDetected):
            chain.add_block(b"data3", depends_on=[block2, block1])
        assert chain.replica.heads() == (block2.id,)


def test_merkle_root_generation():
    blocks = [create_test_block(i) for i in range(10)]
    merkle_root = generate_merkle_root(blocks)
    assert len(merkle_root) == 64
    assert int(merkle_root, 16)


def test_merkle_root_depends_on_every_block_and_their_order():
    blocks = [create_test_block(i) for i in range(10)]
    roots = {
        generate_merkle_root(blocks),
        generate_merkle_root(blocks[::-1]),
        generate_merkle_root(blocks[:-1]),
        generate_merkle_root([*blocks[:-1], create_test_block(10)]),
    }
    assert len(roots) == 4


def test_the_hash_of_a_block_depends_on_every_part():
    block = Block(1, b"data", "delta", "0x123")
    others = [
        Block(2, b"data", "delta", "0x123"),
        Block(1, b"date", "delta", "0x123"),
        Block(1, b"data", "layer", "0x123"),
        Block(1, b"data", "delta", "0x124"),
    ]
    assert len({each.calculate_hash() for each in [block, *others]}) == 5
    assert Block(1, b"data", "delta", "0x123").calculate_hash() == block.calculate_hash()


@pytest.mark.parametrize(
    "block",
    [
        Block(1, b"", "", "0x1"),
        Block(1, b"", "x" * 33, "0x1"),
        Block(-1, b"", "delta", "0x1"),
        Block(1, b"", "delta", "nonsense"),
        Block(1, b"", "delta", "0x" + "1" * 66),
        Block(1, bytes(256 * 1024 + 1), "delta", "0x1"),
    ],
)
def test_a_malformed_block_does_not_validate(block):
    assert not block.validate()


def test_fixture_of_the_plan(test_blockchain):
    (block,) = test_blockchain.blocks()
    assert block.type == "meta"
    assert block.records[0].arguments == b"genesis"


def test_a_diamond_is_no_cycle(tmp_path):
    with Chain(tmp_path, "B") as chain:
        base = chain.add_block(b"base")
        left = chain.add_block(b"left", depends_on=[base])
        right = chain.add_block(b"right", depends_on=[base])
        assert set(chain.replica.heads()) == {left.id, right.id}
        top = chain.add_block(b"top", block_type="delta", depends_on=[left, right.id])
        assert chain.replica.heads() == (top.id,)
        assert set(top.header.parents) == {left.id, right.id}
        assert top.chain == "B"
        assert top.type == "delta"


def test_blocks_survive_closing_the_chain(tmp_path):
    with Chain(tmp_path, "A") as chain:
        written = [chain.add_block(b"%d" % i) for i in range(5)]
    with Chain(tmp_path, "A") as chain:
        assert [block.id for block in chain.blocks()] == [block.id for block in written]
        assert chain.add_block(b"5").header.parents == (written[-1].id,)


def test_two_chains_in_one_directory_and_no_chain_twice(tmp_path):
    with Chain(tmp_path, "A"), Chain(tmp_path, "T"):
        with pytest.raises(AlreadyRunning):
            Chain(tmp_path, "A")


def test_what_a_private_chain_cannot_do(tmp_path):
    with Chain(tmp_path, "A") as chain:
        base = chain.add_block(b"base")
        with pytest.raises(CodecError):
            chain.add_block(bytes(128 * 1024 + 1))
        with pytest.raises(RuleError, match="parents that are here"):
            chain.add_block(b"", depends_on=[bytes(32)])
        with pytest.raises(RuleError, match="parents that are here"):
            chain.add_block(b"", depends_on=[])
        for _ in range(WIDTH):
            chain.add_block(b"side", depends_on=[base])
        with pytest.raises(RuleError, match="build on one of those first"):
            chain.add_block(b"one too many", depends_on=[base])
        merged = chain.add_block(b"merge")
        assert chain.replica.heads() == (merged.id,)
