"""Windows: what lies between two sets of heads in the DAG of a replica, in order, and what it comes to for the ledger.

A cut makes a window final; what lies above the last cut is the window that is still tentative. Reads only, and caches
what does not change, or what changes only with the DAG or the last cut.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from blyan_node.chain.catalog import Catalog
from blyan_node.chain.dag import Dag, Past, lies_in
from blyan_node.chain.finals import Finals
from blyan_node.chain.genesis import Genesis
from blyan_node.chain.order import Carried, Item, item_of, order, window
from blyan_node.chain.tables import Tables
from blyan_node.chain.view import View, make_view

MAX_ITEMS = 16384


class Windows:
    """See the module. Whoever changes the DAG or the last cut says so, by :meth:`added` and :meth:`committed`."""

    def __init__(self, dag: Dag, tables: Tables, finals: Finals, genesis: Genesis) -> None:
        self._dag, self._tables, self._finals, self._network = dag, tables, finals, genesis.network
        self._items: OrderedDict[bytes, Item] = OrderedDict()
        self._last: tuple[tuple[int, tuple[bytes, ...]], list[tuple[int, bytes]]] | None = None
        self._view: View | None = None
        self._catalog: Catalog | None = None
        self._settled: Past = {}
        self.committed()

    def added(self, item: Item) -> None:
        """Tell that a block joined the DAG."""
        self._remember(item)
        self._view = self._catalog = None  # also by an acknowledgement: it may be a vote between rivals

    def committed(self) -> None:
        """Tell that there is a new last cut."""
        self._settled = self._dag.past_of(self._finals.last.heads)
        self._view = self._catalog = None

    def is_final(self, id: bytes) -> bool:
        """Tell whether a block that is here, or the genesis, lies under the last final cut."""
        return lies_in(self._dag.known(id), self._settled)

    def under(self, heads: Iterable[bytes], above: Past | None = None) -> set[bytes]:
        """Return the ids of the blocks under ``heads`` that do not lie in a past (of the last cut, if None)."""
        settled = self._settled if above is None else above
        known = self._dag.known
        return window(heads, parents=lambda id: known(id).parents, settled=lambda id: lies_in(known(id), settled))

    def of_cut(self, k: int) -> set[bytes]:
        """Return the ids of the blocks that a final cut made final."""
        return self.under(self._heads_of(k), self._dag.past_of(self._heads_of(k - 1)))

    def places(self, k: int) -> list[tuple[int, bytes]]:
        """Return (height, id), in order, of the blocks that cut ``k`` made final; for the next cut, of all the rest."""
        is_final = k <= self._finals.last.k
        heads = self._heads_of(k) if is_final else self._dag.heads()
        if self._last is None or self._last[0] != (k, heads):
            ids = self.of_cut(k) if is_final else self.under(heads)
            self._last = (k, heads), sorted((self._dag.known(id).height, id) for id in ids)
        return self._last[1]

    def _heads_of(self, k: int) -> tuple[bytes, ...]:
        stored = self._finals.stored(k)
        return (self._network,) if stored is None else stored.cut.heads

    # The ledger

    def view(self) -> View:
        """Return the ledger as of now, tentative and final."""
        if self._view is None:
            tips = (id for id, _ in self._dag.tips())  # what an equivocator alone wrote comes into no cut
            items, equivocators = self._examined((*self._finals.last.heads, *tips))
            self._view = make_view(
                self._finals.last.state,
                items,
                network=self._network,
                reaches=self._reaches,
                equivocators=equivocators,
                lookup=self._finals.result,
            )
        return self._view

    def catalog(self) -> Catalog:
        """Return the models on the chain, tentatively."""
        if self._catalog is None:
            self._catalog = Catalog(self.view().tentative)
        return self._catalog

    def ordered(self, heads: tuple[bytes, ...]) -> tuple[list[Item], tuple[Carried, ...]]:
        """Return the blocks under ``heads`` that are not final, and their records in order."""
        items, equivocators = self._examined(heads)
        stake = self._finals.last.state.stake()
        return items, order(items, reaches=self._reaches, stake=stake, equivocators=equivocators)

    def _reaches(self, later: bytes, earlier: bytes) -> bool:
        return self._dag.known(later).reaches(self._dag.known(earlier))

    def _examined(self, heads: tuple[bytes, ...]) -> tuple[list[Item], frozenset[bytes]]:
        """Return what lies under ``heads`` and is not final, and who is proven an equivocator under them."""
        items = [self._item(id) for id in sorted(self.under(heads))]
        past, authors = self._dag.past_of(heads), {item.author for item in items}
        return items, frozenset(author for author in authors if self._dag.reach(author, past)[1])

    def _item(self, id: bytes) -> Item:
        if (item := self._items.get(id)) is None:
            node = self._dag.known(id)
            if node.carries:
                item = item_of(self._tables.indexed(id))
            else:
                item = Item(id, node.height, self._dag.author_of(node), node.seq, ())
            self._remember(item)
        return item

    def _remember(self, item: Item) -> None:
        self._items[item.id] = item
        if len(self._items) > MAX_ITEMS:
            self._items.popitem(last=False)
