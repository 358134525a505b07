"""For each rule of a block: one that breaks it, and its neighbour that does not."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest

from blyan_node.chain.block import (
    MAX_BODY,
    MAX_HEADER,
    MAX_RECORDS,
    Anchor,
    decode_block,
    encode_body,
    make_block,
    seal,
)
from blyan_node.chain.keys import GROUP_ORDER
from blyan_node.chain.outcome import Accepted, Orphan
from blyan_node.chain.records import MAX_ARGUMENTS, check_record, sign_record
from blyan_node.chain.replica import Replica
from blyan_node.chain.rules import check_in_isolation
from blyan_node.codec import decode, encode, pack, to_value
from blyan_node.errors import CodecError, CycleDetected, RuleError, SignatureError
from tests.support.chains import GENESIS, KEYS, NETWORK, STRANGER, Forge

ALICE, BOB, CAROL, DAVE = KEYS[:4]


@pytest.fixture
def forge():
    return Forge()


@pytest.fixture
def replica(tmp_path):
    with Replica.open(tmp_path / "chain", GENESIS) as replica:
        yield replica


def record_of(data: bytes = b"data", nonce: int = 0):
    return sign_record(ALICE, NETWORK, "data", data, nonce=nonce)


# In isolation


def test_a_plain_block_passes(forge):
    check_in_isolation(decode_block(forge.block(records=(record_of(),)).raw), NETWORK)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 0}, "version"),
        ({"version": 2}, "version"),
        ({"network": bytes(32)}, "another network"),
        ({"chain": "C"}, "chain"),
        ({"chain": "a"}, "chain"),
        ({"parents": (b"\2" * 32, b"\1" * 32)}, "sorted"),
        ({"parents": (b"\1" * 32, b"\1" * 32)}, "twice"),
        ({"body_len": 0}, "body"),
        ({"body_hash": bytes(32)}, "body"),
        ({"seq": 1}, "prev"),
        ({"prev": b"\1" * 32}, "prev"),
    ],
)
def test_each_header_field_is_checked(forge, changes, message):
    block = forge.block(records=(record_of(),))
    check_in_isolation(block, NETWORK)
    with pytest.raises(RuleError, match=message):
        check_in_isolation(forge.reforge(ALICE, block, **changes), NETWORK)


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("parents", tuple(bytes([i]) * 32 for i in range(16)), tuple(bytes([i]) * 32 for i in range(17))),
        ("parents", (bytes(32),), ()),
        ("parents", (bytes(32),), (bytes(31),)),
        ("type", "x" * 32, "x" * 33),
        ("type", "x", ""),
        ("author", ALICE.address, ALICE.address[:19]),
        ("prev", None, b"short"),
        ("chain", "B", "AB"),
        ("chain", "B", ""),
    ],
)
def test_header_fields_have_bounds(forge, field, good, bad):
    block = forge.block()
    assert forge.reforge(ALICE, block, **{field: good})
    with pytest.raises(CodecError):
        forge.reforge(ALICE, block, **{field: bad})


def test_three_chains_exist(forge):
    block = forge.block()
    for chain in "ABT":
        check_in_isolation(forge.reforge(ALICE, block, chain=chain), NETWORK)


def test_somebody_elses_signature_is_refused(forge):
    block = forge.block()
    for signer in (BOB, STRANGER):
        with pytest.raises(SignatureError):
            check_in_isolation(forge.reforge(signer, block), NETWORK)


def test_the_high_s_is_refused(forge):
    block = forge.block()
    r, s, v = block.signature[:32], int.from_bytes(block.signature[32:64]), block.signature[64]
    twin = r + (GROUP_ORDER - s).to_bytes(32) + bytes([v ^ 1])
    with pytest.raises(SignatureError, match="low"):
        check_in_isolation(decode_block(encode([block.header_bytes, twin, block.body])), NETWORK)


def test_a_body_of_256_kib_passes_and_a_byte_more_does_not(forge):
    def body(last: int):
        return (*(record_of(bytes(MAX_ARGUMENTS - 1000), i) for i in range(2)), record_of(bytes(last), 2))

    fill = MAX_BODY - len(encode_body(body(1000))) + 1000
    assert len(encode_body(body(fill))) == MAX_BODY
    check_in_isolation(decode_block(forge.block(records=body(fill)).raw), NETWORK)
    with pytest.raises(RuleError, match="several blocks"):
        forge.block(records=body(fill + 1))
    block, large = forge.block(), encode_body(body(fill + 1))
    with pytest.raises(CodecError):
        seal(ALICE, replace(block.header, body_len=len(large), body_hash=hashlib.sha256(large).digest()), large)


def test_records_have_a_bound(forge):
    record = record_of(b"")
    check_in_isolation(forge.block(records=(record,) * MAX_RECORDS), NETWORK)
    with pytest.raises(RuleError, match="several blocks"):
        forge.block(records=(record,) * (MAX_RECORDS + 1))
    with pytest.raises(CodecError):
        decode_block(_with_body(forge.block(), encode_body((record,) * (MAX_RECORDS + 1))))


def test_a_header_over_4_kib_is_refused(forge):
    block = forge.block()
    assert len(block.header_bytes) < MAX_HEADER
    with pytest.raises(CodecError):
        decode_block(encode([bytes(MAX_HEADER + 1), block.signature, block.body]))


def test_a_block_has_three_parts(forge):
    parts = decode(forge.block().raw, most=10_000)
    for wrong in (parts[:2], [*parts, b""], [parts[0], parts[1][:64], parts[2]]):
        with pytest.raises(CodecError):
            decode_block(encode(wrong))


def test_header_and_body_are_canonical_themselves(forge):
    block = forge.block(seq=0)
    header = block.header_bytes
    assert header[1] == 1  # the version, in one byte
    for part in ([header[:1] + b"\xcc\x01" + header[2:], block.body], [header, b"\xdc\x00\x00"]):
        with pytest.raises(CodecError, match="canonical"):
            decode_block(encode([part[0], block.signature, part[1]]))


def _with_body(block, body: bytes) -> bytes:
    header = pack(replace(block.header, body_len=len(body), body_hash=hashlib.sha256(body).digest()))
    return encode([header, block.signature, body])


def test_every_record_inside_is_checked(forge):
    good, fine = record_of(nonce=1), record_of(nonce=2)
    for bad, message in [
        (replace(good, sender=BOB.address), "sender"),
        (replace(good, nonce=9), "sender"),
        (replace(good, fee=1), "sender"),
        (replace(good, expires_at_cut=1), "sender"),
        (replace(good, kind="else"), "sender"),
        (replace(good, arguments=b"else"), "sender"),
        (replace(good, signature=fine.signature), "sender"),
        (sign_record(ALICE, bytes(32), "data", b"", nonce=0), "another network"),
    ]:
        with pytest.raises(RuleError, match=message):
            check_in_isolation(forge.block(records=(fine, bad)), NETWORK)
    check_in_isolation(forge.block(records=(fine, good)), NETWORK)


@pytest.mark.parametrize(
    ("at", "value"),
    [(1, b""), (1, b"k" * 33), (2, bytes(19)), (3, -1), (6, bytes(MAX_ARGUMENTS + 1)), (7, bytes(64)), (0, bytes(31))],
)
def test_record_fields_have_bounds(forge, at, value):
    value_of = to_value(record_of())
    value_of[at] = value
    with pytest.raises(CodecError):
        decode_block(_with_body(forge.block(), encode([value_of])))


def test_a_record_is_signed_for_its_own_domain():
    record = record_of()
    check_record(record, NETWORK)
    undomained = replace(record, signature=ALICE.sign(record.id))
    with pytest.raises(SignatureError):
        check_record(undomained, NETWORK)


def test_an_unknown_kind_of_record_is_no_fault_of_the_block(forge, replica):
    odd = sign_record(STRANGER, NETWORK, "no-such-kind", b"\xff\xff", nonce=2**63 - 1)
    assert isinstance(replica.accept(forge.block(records=(odd,)).raw), Accepted)


# In context


def accept(replica, *blocks):
    for block in blocks:
        assert isinstance(replica.accept(block.raw), Accepted)


def refuse(replica, block, message: str, error=RuleError):
    heads = replica.heads()
    with pytest.raises(error, match=message):
        replica.accept(block.raw)
    with pytest.raises(RuleError, match=message):  # by now it is remembered
        replica.accept(block.raw)
    assert replica.heads() == heads
    assert not replica.has(block.id)


def test_the_author_is_a_validator(forge, replica):
    accept(replica, forge.block(ALICE))
    refuse(replica, forge.block(STRANGER), "no validator")


def test_the_anchor_of_the_first_blocks_is_the_genesis(forge, replica):
    first = forge.block()
    refuse(replica, forge.reforge(ALICE, first, anchor=Anchor(0, bytes(32))), "anchor")
    accept(replica, first)


def test_a_block_on_one_with_a_wrong_anchor_is_refused(forge, replica):
    wrong = forge.block(ALICE, anchor=Anchor(0, bytes(32)))
    refuse(replica, wrong, "anchor")
    refuse(replica, forge.block(BOB, (wrong.id,)), "builds on a refused block")


def test_what_waits_for_a_block_with_a_wrong_anchor_is_refused_with_it(forge, replica):
    wrong = forge.block(ALICE, anchor=Anchor(0, bytes(32)))
    waiting = forge.block(BOB, (wrong.id,))
    assert isinstance(replica.accept(waiting.raw), Orphan)
    refuse(replica, wrong, "anchor")
    refuse(replica, waiting, "builds on a refused block")


def test_parents_that_are_not_here_make_an_orphan(forge, replica):
    a = forge.block(ALICE)
    b = forge.block(BOB, (a.id,))
    outcome = replica.accept(b.raw)
    assert isinstance(outcome, Orphan)
    assert outcome.missing == (a.id,)
    accept(replica, a)


def test_parents_are_an_antichain(forge, replica):
    a = forge.block(ALICE)
    b = forge.block(BOB, (a.id,))
    c = forge.block(CAROL, (a.id,))
    d = forge.block(DAVE, (b.id,))
    accept(replica, a, b, c, d)
    for parents in [(a.id, b.id), (a.id, d.id), (b.id, d.id), (a.id, c.id, d.id), (NETWORK, a.id)]:
        forge = Forge(heights=forge.heights)
        refuse(replica, forge.block(KEYS[4], parents), "ancestor", CycleDetected)
    accept(replica, Forge(heights=forge.heights).block(KEYS[4], (c.id, d.id)))


def test_the_height_is_exact(forge, replica):
    a = forge.block(ALICE)
    b = forge.block(BOB)
    c = forge.block(ALICE)
    accept(replica, a, b, c)
    for height in (0, 1, 2, 4):
        refuse(replica, Forge(heights=forge.heights).block(CAROL, (b.id, c.id), height=height), "height")
    accept(replica, Forge(heights=forge.heights).block(CAROL, (b.id, c.id)))
    refuse(replica, Forge(heights=forge.heights).block(DAVE, height=2), "height 2 where its parents make it 1")


def test_seq_counts_the_authors_blocks(forge, replica):
    a = forge.block(ALICE)
    b = forge.block(BOB, (a.id,))
    accept(replica, a, b)
    for seq in (2, 3, 2**63 - 1):
        refuse(replica, Forge(dict(forge.heights), {ALICE.address: a}).block(ALICE, (b.id,), seq=seq), "seq")
    accept(replica, Forge(dict(forge.heights), {ALICE.address: a}).block(ALICE, (b.id,)))


def test_an_authors_first_block_has_no_prev(forge, replica):
    a = forge.block(ALICE)
    accept(replica, a)
    refuse(replica, forge.block(BOB, (a.id,), seq=1, prev=a), "seq|prev")
    accept(replica, Forge(forge.heights).block(BOB, (a.id,)))


def test_a_second_first_block_in_its_own_past_is_refused(forge, replica):
    a = forge.block(ALICE)
    accept(replica, a)
    refuse(replica, forge.block(ALICE, (a.id,), prev=None), "seq 0 where the author has 1")


def test_prev_is_the_authors_block_before(forge, replica):
    a0 = forge.block(ALICE)
    b0 = forge.block(BOB, (a0.id,))
    a1 = forge.block(ALICE, (b0.id,))
    accept(replica, a0, b0, a1)
    for prev in (b0.id, a0.id, NETWORK, bytes(32)):
        refuse(replica, forge.reforge(ALICE, _next(forge, a1), prev=prev), "prev")
    accept(replica, _next(forge, a1))


def _next(forge, block):
    return Forge(dict(forge.heights), {ALICE.address: block}).block(ALICE, (block.id,))


def test_prev_lies_in_the_past(forge, replica):
    a0 = forge.block(ALICE)
    b0 = forge.block(BOB)
    accept(replica, a0, b0)
    refuse(
        replica, Forge(dict(forge.heights), {ALICE.address: a0}).block(ALICE, (b0.id,)), "seq 1 where the author has 0"
    )
    accept(replica, Forge(dict(forge.heights), {ALICE.address: a0}).block(ALICE, (a0.id, b0.id)))


def test_prev_is_by_the_same_author(forge, replica):
    a = forge.block(ALICE)
    b = forge.block(BOB, (a.id,))
    accept(replica, a, b)
    good = forge.block(ALICE, (b.id,))
    refuse(replica, forge.reforge(ALICE, good, prev=b.id), "not the author's block")
    accept(replica, good)


def test_prev_is_not_on_another_branch(forge, replica):
    a, twin = forge.block(ALICE), forge.block(ALICE, prev=None, timestamp_ms=9)
    accept(replica, a, twin)
    good = Forge(dict(forge.heights), {ALICE.address: a}).block(ALICE, (a.id,))
    refuse(replica, forge.reforge(ALICE, good, prev=twin.id), "prev does not lie")
    accept(replica, good)


def fork(forge, replica):
    """Alice writes two first blocks; Bob builds on one, Carol on the other: all of it is allowed."""
    a, twin = forge.block(ALICE), forge.block(ALICE, prev=None, timestamp_ms=9)
    b, c = forge.block(BOB, (a.id,)), forge.block(CAROL, (twin.id,))
    accept(replica, a, twin, b, c)
    assert replica.is_equivocator(ALICE.address)
    return a, twin, b, c


def test_an_equivocator_cannot_join_its_branches(forge, replica):
    a, twin, b, c = fork(forge, replica)
    for last, parents in [(a, (a.id, twin.id)), (twin, (b.id, c.id)), (a, (a.id, c.id))]:
        joined = Forge(dict(forge.heights), {ALICE.address: last}).block(ALICE, parents)
        refuse(replica, joined, "equivocates in the block's own past")
    accept(replica, Forge(dict(forge.heights), {ALICE.address: a}).block(ALICE, (b.id,)))


def test_nobody_builds_directly_on_an_author_whose_fork_is_in_the_past(forge, replica):
    a, twin, b, c = fork(forge, replica)
    a1 = Forge(dict(forge.heights), {ALICE.address: a}).block(ALICE, (a.id,))
    forge.heights[a1.id] = a1.height
    accept(replica, a1)
    for parents in [(a.id, c.id), (a1.id, c.id), (a.id, twin.id), (a1.id, b.id, c.id)]:
        refuse(replica, Forge(forge.heights).block(DAVE, parents), "nobody builds")
    both = Forge(forge.heights).block(DAVE, (b.id, c.id))  # on those who were deceived: the fork stays in the past
    accept(replica, both)
    accept(replica, Forge(forge.heights).block(KEYS[5], (a1.id, b.id)))  # has not seen the twin


def test_a_block_on_a_refused_block_is_refused(forge, replica):
    bad = forge.block(ALICE, height=3)
    forge.heights[bad.id] = 1
    on_bad = forge.block(BOB, (bad.id,))
    refuse(replica, bad, "height")
    refuse(replica, on_bad, "builds on a refused block")


def test_make_block_sorts_parents():
    ids = (b"\2" * 32, b"\1" * 32)
    block = make_block(
        ALICE, NETWORK, (), chain="A", type="t", seq=0, prev=None, parents=ids, height=1, anchor=Anchor(0, NETWORK),
        timestamp_ms=0,
    )  # fmt: skip
    assert block.header.parents == ids[::-1]
