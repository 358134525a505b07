"""Inputs for decoders: bytes at random, and what was well formed before it was cut, flipped, spliced or twisted.

An input follows from the name of its target and a number, so it can be replayed:
``.venv/bin/python -m tests.support.fuzzing TARGET NUMBER`` shows it and runs into what it breaks.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import msgpack

from blyan_node.chain import effects
from blyan_node.chain.block import MAX_HEADER, Header, decode_block, decode_body, encode_body
from blyan_node.chain.cut import (
    PRECOMMIT,
    PREVOTE,
    Certificate,
    Cut,
    DoubleVote,
    Proposal,
    Signed,
    Vote,
    Votes,
    sign_proposal,
    sign_vote,
)
from blyan_node.chain.effects import LogEntry, pack_message, unpack_message
from blyan_node.chain.evidence import check_evidence
from blyan_node.chain.genesis import parse_genesis
from blyan_node.chain.invite import Checkpoint, Invite, parse_invite
from blyan_node.chain.records import KINDS, MAX_ARGUMENTS, Evidence, Record
from blyan_node.chain.retention import Page
from blyan_node.chain.state import state_of_rows
from blyan_node.chain.validators import ValidatorSet
from blyan_node.codec import MAX_DEPTH, MAX_INT, decode, encode, pack, unpack
from blyan_node.errors import BlyanError, ConfigError, RuleError
from blyan_node.p2p.rpc import Method
from blyan_node.relay import genesis as genesis_exchange
from blyan_node.relay import messages
from tests.support.chains import GENESIS, KEYS, NETWORK

VECTORS = Path(__file__).parents[1] / "unit" / "vectors"
ID = bytes(range(32))


@dataclass(frozen=True)
class Target:
    """A decoder: how to ``read``, what ``write`` must give back, and well-formed ``samples``."""

    read: Callable[[bytes], Any]
    write: Callable[[Any], bytes]
    samples: tuple[bytes, ...]
    errors: tuple[type[BlyanError], ...] = (RuleError,)

    def run(self, data: bytes) -> bool:
        """Decode one input; return whether it was well formed. Raises whatever it should not."""
        try:
            value = self.read(data)
        except self.errors:
            return False
        again = self.write(value)
        assert again == data, f"it decodes to {value!r}, which encodes to {again.hex()}"
        return True


def typed(cls: type, *samples: Any, most: int = 2**21) -> Target:
    """A dataclass and some of its instances."""
    return Target(lambda data: unpack(cls, data, most=most), pack, tuple(map(pack, samples)))


def golden(name: str) -> dict[str, Any]:
    """The pinned vectors of a file."""
    found: dict[str, Any] = json.loads((VECTORS / f"{name}.json").read_text())
    return found


def read_record(data: bytes) -> Record:
    record = unpack(Record, data, most=MAX_ARGUMENTS + 1024)
    assert len(record.id) == 32
    try:
        arguments = record.parsed()
    except RuleError:
        return record  # void, not malformed
    assert pack(arguments) == record.arguments
    if isinstance(arguments, Evidence):
        try:
            check_evidence(arguments, NETWORK)
        except RuleError:
            pass
    return record


def read_block(data: bytes) -> bytes:
    block = decode_block(data)
    assert pack(block.header) == block.header_bytes
    assert encode_body(block.records) == block.body
    return encode([block.header_bytes, block.signature, block.body])


def read_state(data: bytes) -> bytes:
    (row,) = state_of_rows([data]).rows()
    return row


def read_invite(data: bytes) -> bytes:
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise RuleError("a user types text") from None
    assert str(parse_invite(text)) == "".join(text.split()), "white space alone is skipped"
    return data


def read_genesis(data: bytes) -> bytes:
    try:
        genesis = parse_genesis(data.decode())
    except UnicodeDecodeError:
        raise RuleError("the exchange of the genesis checks this") from None
    assert parse_genesis(genesis.to_toml()) == genesis
    return data


@cache
def targets() -> dict[str, Target]:
    """Everything that chain and relay hash or send."""
    chain, finality, ledger = (
        {name: bytes.fromhex(value) for name, value in golden(file).items() if isinstance(value, str)}
        for file in ("chain", "finality", "ledger")
    )
    rows = tuple(bytes.fromhex(row) for name in ("genesis rows", "cut 10 rows") for row in golden("ledger")[name])
    records = tuple(value for name, value in {**chain, **ledger}.items() if name.endswith(" record"))
    blocks = tuple(value for name, value in chain.items() if name.endswith(" block"))
    made = [decode_block(raw) for raw in blocks]
    cut = unpack(Cut, finality["cut"], most=2**20)
    certificate = unpack(Certificate, finality["certificate"], most=2**20)
    vote = sign_vote(KEYS[0], NETWORK, k=4, round=1, step=PREVOTE, cut=ID)
    proposal = sign_proposal(KEYS[0], NETWORK, round=2, valid_round=1, cut=cut)
    votes = Votes(4, 1, PRECOMMIT, cut, (Signed(vote.validator, vote.signature),))
    spoken = (
        proposal,
        vote,
        effects.Majority(4, 1, PREVOTE, ID),
        effects.GetVotes(4, 1, PRECOMMIT, None),
        votes,
        effects.InRound(4, 1),
    )
    text = str(Invite.make(NETWORK, "net", (ADDRESS,), Checkpoint(12, ID)))
    found = {
        "block": Target(read_block, bytes, blocks),
        "header": typed(Header, *(block.header for block in made), most=MAX_HEADER),
        "body": Target(decode_body, encode_body, tuple(block.body for block in made)),
        "record": Target(read_record, pack, records),
        "cut": typed(Cut, cut),
        "certificate": typed(Certificate, certificate),
        "vote": typed(Vote, vote),
        "proposal": typed(Proposal, proposal),
        "votes": typed(Votes, votes),
        "double vote": typed(DoubleVote, unpack(DoubleVote, finality["double vote"], most=2**20)),
        "validators": typed(ValidatorSet, ValidatorSet.of(GENESIS.validators)),
        "vote log": typed(LogEntry, LogEntry(proposal, None, None), LogEntry(None, vote, votes)),
        "message": Target(unpack_message, pack_message, tuple(map(pack_message, spoken))),
        "state": Target(read_state, bytes, rows),
        "invite": Target(read_invite, bytes, (text.encode(),)),
        "genesis": Target(read_genesis, bytes, (GENESIS.to_toml().encode(),), (RuleError, ConfigError)),
    }
    for kind, cls in KINDS.items():
        samples = [unpack(Record, raw, most=2**20) for raw in records]
        found[f"{kind} arguments"] = typed(cls, *(each.parsed() for each in samples if each.kind == kind))
    found |= exchanged(made[0].raw, cut, certificate, unpack(Record, records[0], most=2**20), vote)
    return found


def exchanged(block: bytes, cut: Cut, certificate: Certificate, record: Record, vote: Vote) -> dict[str, Target]:
    """Requests and answers, with the bounds of their methods."""
    item = messages.CutItem(cut, certificate, ValidatorSet.of(GENESIS.validators))
    cursor = messages.Cursor(3, 7, ID)
    samples: list[Any] = [
        messages.Status(NETWORK, 9, 3, ID, 1, (ID, NETWORK)),
        messages.GetBlocks((ID,)),
        messages.Blocks((block, block)),
        messages.GetCuts(3),
        messages.Cuts((item, messages.CutItem(cut, certificate, None))),
        messages.GetSince(cursor),
        messages.Since((block,), cursor),
        messages.GetState(8, 1),
        messages.StatePage(8, Page(2, (b"row", b"rows"))),
        messages.Tell(pack_message(vote)),
        messages.Told(),
        messages.GetChunk(ID, 9, 1),
        messages.Chunk(b"data", (ID, ID)),
        messages.Submit(record),
        messages.Submitted("no"),
        genesis_exchange.GetGenesis(),
        genesis_exchange.GenesisText(GENESIS.to_toml()),
    ]
    by_class = {type(sample): sample for sample in samples}
    found = {}
    for method in methods():
        for cls, most in ((method.request, method.max_request), (method.response, method.max_response)):
            found[cls.__name__] = typed(cls, by_class[cls], most=most)
    return found


def methods() -> list[Method[Any, Any]]:
    """All requests that the relay answers."""
    spaces = (vars(messages), vars(genesis_exchange))
    return [value for space in spaces for value in space.values() if isinstance(value, Method)]


ADDRESS = "/ip4/10.0.0.1/tcp/4001/p2p/16Uiu2HAmVHRgAfPjoP6KGTJqYgQnNd7fk9hrwqCTzhTNxrmBVPUH"


def make_input(name: str, number: int) -> bytes:
    """The input of this number for a target."""
    rng = random.Random(f"{name}/{number}")
    samples = targets()[name].samples
    sample = rng.choice(samples)
    return rng.choice(WAYS)(rng, sample, samples)


def at_random(rng: random.Random, _sample: bytes, _samples: tuple[bytes, ...]) -> bytes:
    return rng.randbytes(rng.choice((0, 1, 2, 8, 40, 200)))


def cut_off(rng: random.Random, sample: bytes, _samples: tuple[bytes, ...]) -> bytes:
    kept = sample[: rng.randrange(len(sample) + 1)]
    return kept + rng.randbytes(rng.choice((0, 0, 1, 5)))


def flipped(rng: random.Random, sample: bytes, _samples: tuple[bytes, ...]) -> bytes:
    data = bytearray(sample)
    for _ in range(rng.choice((1, 1, 2, 8)) if data else 0):
        data[_place(rng, len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def overwritten(rng: random.Random, sample: bytes, _samples: tuple[bytes, ...]) -> bytes:
    data = bytearray(sample)
    for _ in range(rng.choice((1, 2, 4))):
        at = _place(rng, len(data))
        data[at : at + rng.randrange(3)] = rng.choice((rng.randbytes(1), bytes([rng.choice(MARKERS)]), b""))
    return bytes(data)


def spliced(rng: random.Random, sample: bytes, samples: tuple[bytes, ...]) -> bytes:
    other = rng.choice(samples)
    return sample[: rng.randrange(len(sample) + 1)] + other[rng.randrange(len(other) + 1) :]


def nested(rng: random.Random, sample: bytes, _samples: tuple[bytes, ...]) -> bytes:
    depth = rng.choice((MAX_DEPTH - 1, MAX_DEPTH, MAX_DEPTH + 1, 100, 2000))
    at = rng.randrange(len(sample) + 1)
    return rng.choice((b"", sample[:at])) + bytes([rng.choice((0x91, 0x92, 0x9F))]) * depth + sample[at:]


def twisted(rng: random.Random, sample: bytes, _samples: tuple[bytes, ...]) -> bytes:
    """Well-formed msgpack in which one value is another: what comes as far as the readers."""
    try:
        value = decode(sample, most=2**22)
    except RuleError:
        return flipped(rng, sample, _samples)  # text
    return bytes(msgpack.packb(_twist(rng, value), use_bin_type=True))


WAYS = (at_random, cut_off, flipped, overwritten, spliced, nested, twisted, twisted, twisted)
MARKERS = (
    0x00,
    0x7F,
    0x80,
    0x90,
    0x91,
    0xA1,
    0xC0,
    0xC1,
    0xC4,
    0xC6,
    0xCA,
    0xCC,
    0xCF,
    0xD0,
    0xD3,
    0xD9,
    0xDC,
    0xDD,
    0xFF,
)
ODD = (
    0,
    1,
    2**31,
    2**31 - 1,
    MAX_INT,
    MAX_INT + 1,
    -1,
    b"",
    bytes(20),
    bytes(32),
    b"\xff",
    None,
    True,
    False,
    [],
    [[]],
    0.5,
    {},
)


def _place(rng: random.Random, length: int) -> int:
    """Mostly near the start, where the structure is."""
    return rng.randrange(max(1, min(length, rng.choice((8, 64, length)))))


def _twist(rng: random.Random, value: Any) -> Any:
    if isinstance(value, list) and value and rng.random() < 0.9:
        items, at = list(value), rng.randrange(len(value))
        match rng.randrange(8):
            case 0:
                del items[at]
            case 1:
                items.insert(at, rng.choice(ODD))
            case 2:
                items.insert(at, items[at])
            case 3:
                rng.shuffle(items)
            case _:
                items[at] = _twist(rng, items[at])
        return items
    if isinstance(value, bytes) and rng.random() < 0.6:
        return rng.choice((value[:-1], value + b"\0", value[::-1], b"\xff" * len(value), _twist_inside(rng, value)))
    if type(value) is int and rng.random() < 0.6:
        return rng.choice((value + 1, max(0, value - 1), value * 2**40 & MAX_INT))
    return rng.choice(ODD)


def _twist_inside(rng: random.Random, value: bytes) -> bytes:
    """A header, a body or arguments travel as bytes within."""
    try:
        inner = decode(value, most=2**20)
    except RuleError:
        return flipped(rng, value, ())
    return bytes(msgpack.packb(_twist(rng, inner), use_bin_type=True))


def fuzz(name: str, numbers: range) -> int:
    """Run a target on many inputs; return how many were well formed. A failure tells how to replay it."""
    target, taken = targets()[name], 0
    for number in numbers:
        data = make_input(name, number)
        try:
            taken += target.run(data)
        except Exception as error:
            shown = data.hex() if len(data) < 2000 else f"{len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()}"
            raise AssertionError(
                f"{name!r} on input {number} ({shown}): {type(error).__name__}: {error}\n"
                f"replay: .venv/bin/python -m tests.support.fuzzing {name!r} {number}"
            ) from error
    return taken


if __name__ == "__main__":
    _, chosen, which = sys.argv
    sys.stdout.write(f"{make_input(chosen, int(which)).hex()}\n")
    sys.stdout.write(f"well formed: {targets()[chosen].run(make_input(chosen, int(which)))}\n")
