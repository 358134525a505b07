"""The static split: every layer once, nobody above its memory, the slowest stage as fast as can be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blyan_node.errors import ConfigError
from blyan_node.inference.partition import LayerPartitioner


def test_layer_partitioning():
    partitioner = LayerPartitioner()
    partitions = partitioner.partition_model(num_gpus=4)
    assert len(partitions) == 4
    assert sum(len(p["layers"]) for p in partitions) == 32
    assert [len(p["layers"]) for p in partitions] == [8, 8, 8, 8]


def test_the_fast_get_more_as_far_as_they_have_room():
    counts = [len(p["layers"]) for p in LayerPartitioner(24).partition_model(3, speed=[1, 1, 2])]
    assert counts == [6, 6, 12]
    counts = [len(p["layers"]) for p in LayerPartitioner(24).partition_model(3, memory=[20, 20, 4], speed=[1, 1, 2])]
    assert counts == [10, 10, 4]


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(1, 9)), min_size=1, max_size=4), st.integers(1, 12))
def test_no_split_has_a_faster_slowest_stage(nodes, layers):
    memory, speed = [room for room, _ in nodes], [fast for _, fast in nodes]
    if sum(memory) < layers:
        with pytest.raises(ConfigError, match="do not fit"):
            LayerPartitioner(layers).partition_model(len(nodes), memory, speed)
        return
    parts = LayerPartitioner(layers).partition_model(len(nodes), memory, speed)
    assert [layer for part in parts for layer in part["layers"]] == list(range(layers))
    counts = [len(part["layers"]) for part in parts]
    assert all(count <= room for count, room in zip(counts, memory, strict=True))
    slowest = max(count / fast for count, fast in zip(counts, speed, strict=True))
    # with anything less for the slowest, the layers have no place
    faster = slowest * (1 - 1e-9)
    assert sum(min(room, int(faster * fast)) for room, fast in nodes) < layers


@pytest.mark.parametrize("given_", [{"memory": [1]}, {"speed": [1.0]}, {"speed": [0.0, 1.0]}, {"memory": [-1, 40]}])
def test_what_describes_other_nodes_is_refused(given_):
    with pytest.raises(ConfigError):
        LayerPartitioner().partition_model(2, **given_)
