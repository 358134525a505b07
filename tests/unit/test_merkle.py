from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blyan_node.chain.merkle import EMPTY_ROOT, Tree, check_proof, leaf_hash
from blyan_node.errors import IntegrityError

# The tree heads of RFC 6962's reference implementation (certificate-transparency-go, merkle/rfc6962 test data).
INPUTS = [bytes.fromhex(text) for text in ("", "00", "10", "2021", "3031", "40414243", "5051525354555657",
                                           "606162636465666768696a6b6c6d6e6f")]  # fmt: skip
ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]


def tree_of(count: int) -> Tree:
    return Tree([leaf_hash(b"%d" % i) for i in range(count)])


def test_roots_are_those_of_rfc_6962():
    leaves = [leaf_hash(data) for data in INPUTS]
    assert [Tree(leaves[: i + 1]).root.hex() for i in range(8)] == ROOTS
    assert Tree([]).root == EMPTY_ROOT == hashlib.sha256().digest()


def test_the_tree_is_the_recursive_definition():
    def definition(leaves: list[bytes]) -> bytes:
        if len(leaves) == 1:
            return leaves[0]
        split = 1 << ((len(leaves) - 1).bit_length() - 1)
        return hashlib.sha256(b"\1" + definition(leaves[:split]) + definition(leaves[split:])).digest()

    for count in range(1, 70):
        assert tree_of(count).root == definition(tree_of(count).leaves)


@given(st.integers(1, 200), st.data())
def test_every_proof_holds_and_for_nothing_else(count, data):
    tree = tree_of(count)
    index = data.draw(st.integers(0, count - 1))
    proof = tree.proof(index)
    check_proof(tree.leaves[index], index, count, proof, tree.root)
    assert len(proof) <= max(1, count - 1).bit_length()

    parts = [tree.leaves[index], *proof, tree.root]
    which = data.draw(st.integers(0, len(parts) - 1))
    bit = data.draw(st.integers(0, 255))
    flipped = bytearray(parts[which])
    flipped[bit // 8] ^= 1 << bit % 8
    parts[which] = bytes(flipped)
    with pytest.raises(IntegrityError):
        check_proof(parts[0], index, count, parts[1:-1], parts[-1])


@given(st.integers(2, 200), st.data())
def test_a_proof_holds_at_its_own_place_only(count, data):
    tree = tree_of(count)
    index, other = data.draw(st.lists(st.integers(0, count - 1), min_size=2, max_size=2, unique=True))
    with pytest.raises(IntegrityError):
        check_proof(tree.leaves[index], other, count, tree.proof(index), tree.root)


def test_proofs_of_the_wrong_length_or_place_are_refused():
    tree = tree_of(5)
    leaf, proof = tree.leaves[2], tree.proof(2)
    for wrong in (proof[:-1], (*proof, bytes(32)), ()):
        with pytest.raises(IntegrityError):
            check_proof(leaf, 2, 5, wrong, tree.root)
    for index in (-1, 5):
        with pytest.raises(IntegrityError):
            check_proof(leaf, index, 5, proof, tree.root)
        with pytest.raises(IndexError):
            tree.proof(index)
