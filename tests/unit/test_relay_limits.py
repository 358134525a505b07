from __future__ import annotations

from blyan_node.p2p.transport import PeerId
from blyan_node.relay.limits import MOST_PEERS, Buckets

ONE, OTHER = PeerId("one"), PeerId("other")


def test_a_burst_and_then_the_rate():
    buckets = Buckets(2.0, 3)
    assert [buckets.admit(ONE, 0.0) for _ in range(5)] == [True, True, True, False, False]
    assert buckets.admit(OTHER, 0.0), "each peer has a bucket of its own"
    assert not buckets.admit(ONE, 0.4)
    assert buckets.admit(ONE, 0.5)
    assert not buckets.admit(ONE, 0.6)
    assert [buckets.admit(ONE, 1000.0) for _ in range(5)] == [True, True, True, False, False]


def test_memory_is_bounded():
    buckets = Buckets(1.0, 1)
    for number in range(MOST_PEERS + 1):
        assert buckets.admit(PeerId(str(number)), 0.0)
    assert not buckets.admit(PeerId("1"), 0.0)
    assert buckets.admit(PeerId("0"), 0.0), "the one longest unseen was forgotten"
