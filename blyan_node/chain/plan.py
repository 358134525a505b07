"""The block of the project's test plan: a thin shape over the real header, for those who follow the plan."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

from blyan_node.chain.block import MAX_BODY, MAX_HEADER, VERSION, Anchor, Header
from blyan_node.chain.dag import ROOT_AUTHOR
from blyan_node.chain.rules import check_header
from blyan_node.codec import pack, unpack
from blyan_node.errors import RuleError

NO_NETWORK = bytes(32)


@dataclass(frozen=True)
class Block:
    """A block that stands alone: of no network, unsigned, with data for a body.

    ``previous_hash`` is the hash of the block before it, as hex with or without ``0x``; short ones are padded on the
    left with zeros.
    """

    index: int
    data: bytes
    block_type: str = "data"
    previous_hash: str = "0x0"

    @cached_property
    def header(self) -> Header:
        """The real header that this shape stands for. Raises RuleError where ``previous_hash`` is no hash."""
        try:
            previous = bytes.fromhex(self.previous_hash.removeprefix("0x").rjust(64, "0"))
        except ValueError as error:
            raise RuleError(f"{self.previous_hash!r} is not a hash in hex") from error
        return Header(
            version=VERSION,
            network=NO_NETWORK,
            chain="A",
            type=self.block_type,
            author=ROOT_AUTHOR,
            seq=self.index,
            prev=previous if self.index else None,
            parents=(previous,),
            height=self.index + 1,
            anchor=Anchor(0, NO_NETWORK),
            timestamp_ms=0,
            body_hash=hashlib.sha256(self.data).digest(),
            body_len=len(self.data),
        )

    def calculate_hash(self) -> str:
        """Return sha256 of the canonical header, as 64 hex digits. Raises RuleError where it has no such form."""
        return hashlib.sha256(pack(self.header)).hexdigest()

    def validate(self) -> bool:
        """Tell whether the header keeps the rules that need neither a network nor a signature."""
        try:
            header = unpack(Header, pack(self.header), most=MAX_HEADER)
            check_header(header, NO_NETWORK)
        except RuleError:
            return False
        return len(self.data) <= MAX_BODY
