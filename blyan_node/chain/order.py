"""The one order of the records of a cut, and which of two rival records counts. Pure: no store, clock or network.

A cut adds a *window* to what is final: past(its heads) minus past(the previous cut's heads). Its blocks stand in the
order (height, id), which puts parents before children, and the records of a block in their places.

Records of one sender with one nonce are *rivals*; at most one of them may count. By (height, id) alone a sender could
pay, be acknowledged by everyone, and then bring out a lower block, withheld until now, with a rival in it. So the
validators vote, by what they had seen: each with the first block of its own chain in the window that has a rival in
its past (a block lies in its own past). If that past holds one rival only, the validator's stake votes for it. A
validator that came to see several at once, or that equivocated, abstains. Most stake wins; ties go to the rival whose
first carrier is the earlier in the order. Votes are blocks under the cut's heads, so all nodes count the same ones.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from blyan_node.chain.block import Block
from blyan_node.chain.records import Record

Reaches = Callable[[bytes, bytes], bool]
"""Tells of two ids of blocks whether the second is the first or an ancestor of it."""
Slot = tuple[bytes, int]
"""(sender, nonce): what rivals share."""


@dataclass(frozen=True)
class Item:
    """What the order needs to know of a block."""

    id: bytes
    height: int
    author: bytes
    seq: int
    records: tuple[Record, ...]

    @property
    def place(self) -> tuple[int, bytes]:
        """The key of the order."""
        return self.height, self.id


@dataclass(frozen=True)
class Carried:
    """A record in its place: the first block of the window that carries it, and the rival that beat it, if one did."""

    record: Record
    block: bytes
    author: bytes
    lost_to: bytes | None = None


def item_of(block: Block) -> Item:
    """Reduce a block to what the order needs."""
    return Item(block.id, block.height, block.header.author, block.header.seq, block.records)


def window(
    heads: Iterable[bytes], *, parents: Callable[[bytes], Sequence[bytes]], settled: Callable[[bytes], bool]
) -> set[bytes]:
    """Return the ids of the blocks under ``heads`` that are not yet final.

    ``settled`` tells whether a block lies in the past of the previous cut's heads (the genesis always does); the
    search stops there, so it costs as much as the window is large.
    """
    found: set[bytes] = set()
    waiting = [head for head in heads if not settled(head)]
    while waiting:
        id = waiting.pop()
        if id not in found:
            found.add(id)
            waiting += [parent for parent in parents(id) if parent not in found and not settled(parent)]
    return found


def order(
    items: Iterable[Item], *, reaches: Reaches, stake: Mapping[bytes, int], equivocators: frozenset[bytes] = frozenset()
) -> tuple[Carried, ...]:
    """Put the records of a window in order, each once, and say of every loser of a double spend who beat it.

    ``stake`` is that of the validators who decide this cut. ``equivocators`` are authors with two blocks of one seq
    under the cut's heads; those whose two blocks both lie in the window are found here.
    """
    blocks = sorted(items, key=lambda item: item.place)
    first: dict[bytes, tuple[Record, Item]] = {}  # record → its first carrier; dicts keep the order
    carriers: defaultdict[bytes, list[bytes]] = defaultdict(list)
    slots: defaultdict[Slot, list[bytes]] = defaultdict(list)
    for item in blocks:
        for record in item.records:
            if record.id not in first:
                first[record.id] = record, item
                slots[record.sender, record.nonce].append(record.id)
            carriers[record.id].append(item.id)
    voters = _voters(blocks, stake, equivocators)
    lost: dict[bytes, bytes] = {}
    for rivals in slots.values():
        if len(rivals) > 1:
            votes = _votes({rival: carriers[rival] for rival in rivals}, voters, reaches, stake)
            winner = max(rivals, key=lambda rival: votes.get(rival, 0))  # of equals max takes the first, the earlier
            lost.update((rival, winner) for rival in rivals if rival != winner)
    return tuple(Carried(record, item.id, item.author, lost.get(id)) for id, (record, item) in first.items())


def _voters(
    blocks: Sequence[Item], stake: Mapping[bytes, int], equivocators: frozenset[bytes]
) -> dict[bytes, list[bytes]]:
    """Return of each validator that may vote the blocks of its own chain in the window, first to last."""
    chains: defaultdict[bytes, dict[int, bytes]] = defaultdict(dict)
    forked = set(equivocators)
    for item in blocks:
        if chains[item.author].setdefault(item.seq, item.id) != item.id:
            forked.add(item.author)
    return {
        author: [chain[seq] for seq in sorted(chain)]
        for author, chain in chains.items()
        if author not in forked and stake.get(author, 0) > 0
    }


def _votes(
    rivals: Mapping[bytes, Sequence[bytes]],
    voters: Mapping[bytes, Sequence[bytes]],
    reaches: Reaches,
    stake: Mapping[bytes, int],
) -> dict[bytes, int]:
    """Return the stake behind each rival, given the blocks that carry it."""

    def seen(block: bytes) -> list[bytes]:
        """Return which rivals lie in a block's past; two are as good as all."""
        found = (rival for rival, blocks in rivals.items() if any(reaches(block, carrier) for carrier in blocks))
        return list(islice(found, 2))

    votes: defaultdict[bytes, int] = defaultdict(int)
    for author, chain in voters.items():
        # Along a chain the past only grows: blocks that have seen a rival are those from some point on.
        start = bisect_left(chain, True, key=lambda block: bool(seen(block)))
        if start < len(chain) and len(known := seen(chain[start])) == 1:
            votes[known[0]] += stake[author]
    return votes
