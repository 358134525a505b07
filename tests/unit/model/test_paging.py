"""Pages of the key-value cache: who gets them, that they come back, and that what they hold is computed with."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from blyan_node.errors import Overloaded
from blyan_node.model.cache import Cache, Pool, pages_for
from blyan_node.model.kv_memory import PAGE, MappedMemory
from blyan_node.model.shard import Work
from tests.unit.model.conftest import Imported
from tests.unit.model.walk import Pipeline

# The stated tolerance of a session's fp32 logits, in a batch or cut into chunks, beside the same session run alone.
TOLERANCE = 5e-5
FORMS = pytest.mark.parametrize("slab", [False, True], ids=["mapped", "slab"])


def test_pages_are_promised_at_open_and_taken_as_a_session_grows(tiny: Imported) -> None:
    shard = tiny.shard(cache_tokens=4 * PAGE)
    first = shard.open(b"a", 2 * PAGE)
    second = shard.open(b"b", 4 * PAGE, promised=1)
    assert shard.free_tokens() == PAGE
    with pytest.raises(Overloaded, match=f"room for {PAGE} tokens, not for {2 * PAGE}"):
        shard.open(b"c", PAGE + 1)
    shard.step([Work(second, 0, (5,) * (PAGE + 1))])
    assert shard.free_tokens() == 0
    shard.truncate(second, PAGE)
    assert shard.free_tokens() == PAGE
    shard.truncate(second, 0)  # what was promised stays
    assert shard.free_tokens() == PAGE
    first.close()
    first.close()
    second.close()
    assert shard.free_tokens() == 4 * PAGE
    shard.open(b"a", 4 * PAGE)


def test_a_session_that_cannot_grow_changes_nothing(tiny: Imported) -> None:
    shard = tiny.shard(cache_tokens=2 * PAGE)
    growing, other = shard.open(b"a", 4 * PAGE, promised=PAGE), shard.open(b"b", PAGE)
    shard.step([Work(growing, 0, (5,) * PAGE)])
    with pytest.raises(Overloaded):
        shard.step([Work(other, 0, (7,)), Work(growing, PAGE, (6,))])
    assert (growing.length, other.length) == (PAGE, 0)
    expected = Pipeline([tiny.shard()])
    expected.logits((5,) * PAGE)
    other.close()
    torch.testing.assert_close(shard.logits([Work(growing, PAGE, (6,))])[0], expected.logits((6,)), atol=0, rtol=0)


class Pages(RuleBasedStateMachine):
    """Any order of opening, growing, truncating and closing, beside a count of what each session has."""

    total = 12

    def __init__(self) -> None:
        super().__init__()
        self.pool = Pool(
            self.total * PAGE + 5,
            layers=1,
            kv_heads=1,
            head_dim=2,
            dtype=torch.float32,
            device=torch.device("cpu"),
            slab=True,
        )
        self.caches: dict[int, tuple[Cache, int]] = {}
        self.opened = 0

    def claimed(self) -> int:
        return sum(max(pages_for(cache.length), pages_for(promised)) for cache, promised in self.caches.values())

    @rule(promised=st.integers(0, 5 * PAGE))
    def open(self, promised: int) -> None:
        room = self.total - self.claimed()
        try:
            cache = Cache(
                self.pool,
                first=0,
                last=0,
                skipped=0,
                layers=1,
                capacity=8 * PAGE,
                promised=promised,
                on_close=lambda: None,
            )
        except Overloaded:
            assert pages_for(promised) > room
            return
        assert pages_for(promised) <= room
        self.opened += 1
        self.caches[self.opened] = cache, promised

    @precondition(lambda self: self.caches)
    @rule(data=st.data(), tokens=st.integers(1, 3 * PAGE))
    def grow(self, data: st.DataObject, tokens: int) -> None:
        key = data.draw(st.sampled_from(sorted(self.caches)))
        cache, promised = self.caches[key]
        wanted = min(cache.length + tokens, cache.capacity)
        before = self.claimed()
        held = max(pages_for(cache.length), pages_for(promised))
        try:
            cache.reserve(wanted)
        except Overloaded:
            assert before + max(0, pages_for(wanted) - held) > self.total
            return
        rows = torch.full((1, wanted - cache.length, 2), float(key))
        if wanted > cache.length:
            keys, values = cache.append(0, cache.length, rows, -rows)
            assert (keys == key).all()  # nobody else wrote into these pages
            assert (values == -key).all()
        cache.length = wanted

    @precondition(lambda self: self.caches)
    @rule(data=st.data(), share=st.floats(0, 1))
    def truncate(self, data: st.DataObject, share: float) -> None:
        cache, _ = self.caches[data.draw(st.sampled_from(sorted(self.caches)))]
        cache.truncate(int(cache.length * share))

    @precondition(lambda self: self.caches)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        cache, _ = self.caches.pop(data.draw(st.sampled_from(sorted(self.caches))))
        cache.close()

    @invariant()
    def every_page_is_counted(self) -> None:
        assert self.pool.free == self.total - self.claimed() >= 0


TestPages = Pages.TestCase
TestPages.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


@FORMS
def test_many_sessions_of_different_lengths_get_what_each_gets_alone(tiny: Imported, slab: bool) -> None:
    """Ragged batches, sessions that come and go, pages that were others' before, a truncation in between."""
    alone, shard = tiny.shard(), tiny.shard(cache_tokens=20 * PAGE, slab=slab)
    generator = torch.Generator().manual_seed(4)
    texts = {
        index: torch.randint(0, 1000, (size,), generator=generator).tolist()
        for index, size in enumerate([3, 40, 64, 1, 130, 33, 97, 200, 31, 65])
    }
    expected = {index: Pipeline([alone]).logits(text) for index, text in texts.items()}
    caches: dict[int, Cache] = {}
    waiting, worst, steps = list(texts), 0.0, 0
    while waiting or caches:
        while waiting and len(caches) < 4:
            index = waiting.pop(0)
            caches[index] = shard.open(bytes([index]), 256, promised=len(texts[index]))
        works = {}
        for turn, (index, cache) in enumerate(caches.items()):
            size = 1 if (turn + steps) % 3 == 0 else 23  # decodes and chunks of prompts in one batch
            part = texts[index][cache.length : cache.length + size]
            works[index] = Work(cache, cache.length, tuple(part))
        for (index, work), logits in zip(works.items(), shard.logits(list(works.values())), strict=True):
            rows = expected[index][work.position : work.position + work.size]
            worst = max(worst, float((logits - rows).abs().max()))
            if work.cache.length == len(texts[index]):
                caches.pop(index).close()
        steps += 1
        if steps == 4:
            victim = next(iter(caches.values()))
            shard.truncate(victim, victim.length // 2)
    assert worst < TOLERANCE
    assert shard.free_tokens() == 20 * PAGE


def test_a_slab_computes_what_mapped_memory_does_bit_for_bit(tiny: Imported) -> None:
    one, other = (Pipeline([tiny.shard(slab=slab)]) for slab in (False, True))
    for tokens in (tuple(range(70)), (5,), (6,)):
        assert torch.equal(one.logits(tokens), other.logits(tokens))


@pytest.mark.skipif(not Path("/proc/self/pagemap").exists(), reason="reads Linux's own account of memory")
def test_mapped_memory_is_the_systems_to_use_until_written_and_once_forgotten() -> None:
    memory = MappedMemory(layers=2, kv_heads=2, capacity=4096, head_dim=64, dtype=torch.float32)
    assert resident(memory) == 0
    rows = torch.ones(2, 1024, 64)
    for layer in range(2):
        memory.append(layer, 0, rows, rows)
    stripe = 1024 * 64 * 4
    assert resident(memory) == 8 * stripe  # two layers, keys and values, two heads
    memory.forget(512, 1024)
    assert resident(memory) == 4 * stripe
    keys, _ = memory.append(0, 512, rows[:, :1], rows[:, :1])
    assert (keys == 1).all()


def resident(memory: MappedMemory) -> int:
    """Bytes of memory behind its addresses: the system keeps eight bytes for each page, the highest bit says so."""
    start, pages = memory._layers[0][0].data_ptr() // mmap.PAGESIZE, len(memory._map) // mmap.PAGESIZE
    with Path("/proc/self/pagemap").open("rb") as file:
        file.seek(8 * start)
        entries = np.frombuffer(file.read(8 * pages), "<u8")
    return int((entries >> 63).sum()) * mmap.PAGESIZE


def test_addresses_that_cannot_be_had_are_a_lack_of_memory() -> None:
    with pytest.raises(MemoryError, match="no addresses"):
        MappedMemory(layers=64, kv_heads=64, capacity=1 << 30, head_dim=64, dtype=torch.float32)
