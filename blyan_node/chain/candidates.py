"""What the consensus asks of the DAG that is here: the cut that could be decided now, and whether one is valid.

Implements :class:`blyan_node.chain.height.View` over a replica.
"""

from __future__ import annotations

from blyan_node.chain.cut import MAX_HEADS
from blyan_node.chain.dag import Dag, lies_in, merge
from blyan_node.chain.height import Base, Window
from blyan_node.chain.replica import Replica


class Candidates:
    """See the module. Reads only."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica

    def heads(self, base: Base) -> tuple[bytes, ...]:
        """Return the heads of the cut to propose now: all that honest authors build on, and the previous heads."""
        dag = self._replica.dag
        tips = [id for id, _ in dag.tips()]
        heads = _antichain(dag, [*base.prev_heads, *tips])
        if len(heads) > MAX_HEADS:  # what covers the previous cut must stay; the rest waits for the next one
            covering = [head for head in heads if any(_reaches(dag, head, prev) for prev in base.prev_heads)]
            heads = covering + [head for head in heads if head not in covering]
        return tuple(sorted(heads[:MAX_HEADS]))

    def window(self, base: Base, heads: tuple[bytes, ...]) -> Window:
        """Examine the heads of a cut; never changes once nothing is missing."""
        dag = self._replica.dag
        if missing := tuple(head for head in heads if dag.node(head) is None):
            return Window(missing=missing)
        covered, before = dag.past_of(heads), dag.past_of(base.prev_heads)
        ordered = len(_antichain(dag, heads)) == len(heads)
        ordered = ordered and all(lies_in(dag.known(prev), covered) for prev in base.prev_heads)
        nodes = [dag.known(id) for id in self._replica.window(heads, before)]
        content = any(node.carries for node in nodes) or self._replica.final.state.is_due()
        anchored = frozenset(dag.author_of(node) for node in nodes if node.anchor == base.k - 1)
        return Window(ordered=ordered, content=content, anchored=anchored)

    def has_content(self) -> bool:
        """Tell whether the cut of what is here would have content: then a cut is wanted."""
        base = self._replica.final.base()
        return self.window(base, self.heads(base)).content

    def is_unacknowledged(self, author: bytes) -> bool:
        """Tell whether another's block with records lies under what an author would build on, not under its own."""
        dag = self._replica.dag
        tips = [id for id, _ in dag.choose_parents(author)]
        known = merge(dag.past_of([tip]) for tip in [*self._replica.final.heads, *_own(dag, author)])
        above = (dag.known(id) for id in self._replica.window(tips, known))
        return any(node.carries and dag.author_of(node) != author for node in above)

    def is_anchored(self, author: bytes) -> bool:
        """Tell whether an author wrote a block on the last final cut already."""
        dag = self._replica.dag
        return any(dag.known(tip).anchor == self._replica.final.k for tip in _own(dag, author))


def _own(dag: Dag, author: bytes) -> list[bytes]:
    return [branch.tip for branch in dag.branches_of(author)]


def _reaches(dag: Dag, later: bytes, earlier: bytes) -> bool:
    return dag.known(later).reaches(dag.known(earlier))


def _antichain(dag: Dag, ids: tuple[bytes, ...] | list[bytes]) -> list[bytes]:
    """Leave out what others have in their past; sorted by (height, id)."""
    found: list[bytes] = []
    for id in sorted(set(ids), key=lambda id: (dag.known(id).height, id), reverse=True):
        if not any(_reaches(dag, other, id) for other in found):
            found.append(id)
    return found[::-1]
