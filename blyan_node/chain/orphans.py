"""Blocks that wait for their parents. In memory, bounded, and each peer can only displace what it sent itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from blyan_node.chain.block import Block


@dataclass
class Waiting:
    """A block whose parents are not all here, who sent it, and the parents that it still waits for."""

    block: Block
    source: str
    missing: set[bytes]


class Orphans:
    """The waiting blocks.

    When a source reaches its bound in blocks or bytes its own oldest block goes. When all sources together reach
    theirs, the oldest block of the source that takes the most bytes goes. What went is fetched again when needed.
    """

    def __init__(
        self,
        *,
        per_source: int = 1024,
        bytes_per_source: int = 16 * 2**20,
        total: int = 8192,
        total_bytes: int = 64 * 2**20,
    ) -> None:
        self._per_source, self._bytes_per_source = per_source, bytes_per_source
        self._total, self._total_bytes = total, total_bytes
        self._waiting: dict[bytes, Waiting] = {}
        self._children: dict[bytes, set[bytes]] = {}
        self._of_source: dict[str, dict[bytes, int]] = {}
        self._bytes_of_source: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def size(self) -> int:
        """The bytes of all waiting blocks."""
        return sum(self._bytes_of_source.values())

    def get(self, id: bytes) -> Waiting | None:
        """Return a waiting block."""
        return self._waiting.get(id)

    def add(self, block: Block, missing: Iterable[bytes], source: str) -> None:
        """Let a block wait for its missing parents, and make room for it."""
        self._waiting[block.id] = Waiting(block, source, set(missing))
        for parent in missing:
            self._children.setdefault(parent, set()).add(block.id)
        self._of_source.setdefault(source, {})[block.id] = len(block.raw)
        self._bytes_of_source[source] = self._bytes_of_source.get(source, 0) + len(block.raw)
        while len(self._of_source[source]) > self._per_source or self._bytes_of_source[source] > self._bytes_per_source:
            self._drop_oldest(source)
        while len(self._waiting) > self._total or self.size > self._total_bytes:
            self._drop_oldest(max(self._bytes_of_source, key=lambda name: self._bytes_of_source[name]))

    def _drop_oldest(self, source: str) -> None:
        self.remove(next(iter(self._of_source[source])))

    def remove(self, id: bytes) -> None:
        """Forget a waiting block."""
        waiting = self._waiting.pop(id)
        for parent in waiting.missing:
            self._forget_child(parent, id)
        self._bytes_of_source[waiting.source] -= self._of_source[waiting.source].pop(id)
        if not self._of_source[waiting.source]:
            del self._of_source[waiting.source], self._bytes_of_source[waiting.source]

    def clear(self) -> None:
        """Forget all of them."""
        for waiting in (self._waiting, self._children, self._of_source, self._bytes_of_source):
            waiting.clear()

    def _forget_child(self, parent: bytes, child: bytes) -> None:
        self._children[parent].discard(child)
        if not self._children[parent]:
            del self._children[parent]

    def release(self, parent: bytes) -> list[Waiting]:
        """Tell that a parent is here now: take out and return, sorted by id, the blocks that miss nothing any more."""
        ready = []
        for id in sorted(self._children.get(parent, ())):
            waiting = self._waiting[id]
            waiting.missing.discard(parent)
            self._forget_child(parent, id)
            if not waiting.missing:
                self.remove(id)
                ready.append(waiting)
        return ready

    def above(self, id: bytes) -> Iterator[Waiting]:
        """Iterate over the blocks that wait for ``id``, directly or through one another."""
        seen, stack = {id}, [id]
        while stack:
            for child in self._children.get(stack.pop(), ()):
                if child not in seen:
                    seen.add(child)
                    stack.append(child)
                    yield self._waiting[child]

    def below(self, ids: Iterable[bytes]) -> tuple[bytes, ...]:
        """Return, sorted, what must be fetched for these missing blocks: those that do not wait here themselves."""
        fetch: set[bytes] = set()
        stack = list(ids)
        seen = set(stack)
        while stack:
            id = stack.pop()
            if (waiting := self._waiting.get(id)) is None:
                fetch.add(id)
                continue
            stack.extend(waiting.missing - seen)
            seen |= waiting.missing
        return tuple(sorted(fetch))
