"""How much of something each peer may send: token buckets."""

from __future__ import annotations

from collections import OrderedDict

from blyan_node.p2p.transport import PeerId

MOST_PEERS = 1024


class Buckets:
    """Lets each peer do something ``rate`` times a second in the long run, and ``burst`` times at once.

    At most MOST_PEERS peers are remembered; beyond, the one longest unseen is forgotten (so, forgiven).
    """

    def __init__(self, rate: float, burst: int) -> None:
        self._rate, self._burst = rate, burst
        self._left: OrderedDict[PeerId, tuple[float, float]] = OrderedDict()

    def admit(self, peer: PeerId, now: float) -> bool:
        """Take one token of a peer's bucket at ``now``, in seconds; False where there is none."""
        left, since = self._left.pop(peer, (float(self._burst), now))
        left = min(float(self._burst), left + (now - since) * self._rate)
        admitted = left >= 1
        self._left[peer] = (left - 1 if admitted else left, now)
        if len(self._left) > MOST_PEERS:
            self._left.popitem(last=False)
        return admitted
