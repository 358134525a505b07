"""What a step computes, counted in steps: decodes flow while prompts are worked through, and nobody starves."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import cast

from hypothesis import given
from hypothesis import strategies as st

from blyan_node.inference.batch import LEAST_PROMPT, STEP_TOKENS, compose
from blyan_node.inference.messages import Leg, Open
from blyan_node.inference.seat import Input, Seat
from blyan_node.model.activation import Activation
from blyan_node.model.cache import Cache
from blyan_node.model.shard import Shard
from blyan_node.p2p.transport import PeerId

SHARD = cast(Shard, object())
OPEN = Open(bytes(16), 0, bytes(32), bytes(32), (Leg("me", 0, 3),), 0, 4096, 0, 0, 0, ())


def seat(*items: Input, legs: tuple[Leg, ...] = OPEN.route) -> Seat:
    made = Seat(replace(OPEN, route=legs), PeerId("entry"), SHARD, cast(Cache, None))
    made.inputs.extend(items)
    return made


def tokens(number: int, count: int, position: int = 0, *, more: bool = False) -> Input:
    return Input(0, position, count, more, tuple(range(position, position + count)), None, (), number)


def test_decodes_proceed_in_every_step_of_a_long_prompt() -> None:
    arrivals = itertools.count(100)
    long = seat(*(tokens(index, 128, 128 * index, more=index < 9) for index in range(10)))
    talking = [seat(tokens(50 + index, 1)) for index in range(20)]
    steps, computed = 0, 0
    while long.inputs:
        batch = compose([long, *talking], lambda: next(arrivals))
        taken = {id(one): item for one, item in batch}
        assert all(id(one) in taken for one in talking)
        part = taken[id(long)]
        assert part.position == computed
        assert part.tokens == tuple(range(computed, computed + part.count))
        computed += part.count
        assert part.more == (computed < 1280)
        assert sum(item.count for _, item in batch) <= STEP_TOKENS
        for one in talking:
            one.inputs.append(tokens(next(arrivals), 1))
        steps += 1
    assert computed == 1280
    assert 1280 // (STEP_TOKENS - 20) < steps <= 20  # chunks of 128 leave pieces of 108 and 20


def test_more_decodes_than_a_step_is_meant_for_still_leave_prompts_their_least() -> None:
    many, prompt = [seat(tokens(index, 1)) for index in range(300)], seat(tokens(1000, 128))
    batch = compose([prompt, *many], lambda: 2000)
    assert len(batch) == 301
    assert batch[-1][1].count == LEAST_PROMPT


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    arrivals = itertools.count(100)
    long = seat(*(tokens(index, 128, 128 * index, more=True) for index in range(50)))
    short = seat(tokens(60, 40))
    assert [one for one, _ in compose([long, short], lambda: next(arrivals))] == [long]
    batch = compose([long, short], lambda: next(arrivals))
    assert [(one, item.count) for one, item in batch] == [(short, 40), (long, STEP_TOKENS - 40)]


def test_sessions_that_run_over_other_units_take_turns_with_a_long_prompt() -> None:
    arrivals = itertools.count(100)
    long = seat(*(tokens(index, 128, 128 * index, more=True) for index in range(50)))
    other = seat(tokens(60, 1), legs=(Leg("me", 0, 1), Leg("you", 2, 3)))
    assert [one for one, _ in compose([long, other], lambda: next(arrivals))] == [long]
    assert [one for one, _ in compose([long, other], lambda: next(arrivals))] == [other]


@given(st.lists(st.lists(st.integers(1, 300), min_size=1, max_size=4), min_size=1, max_size=8))
def test_all_is_computed_once_in_order_and_in_bounded_steps(sizes: list[list[int]]) -> None:
    arrivals = itertools.count()
    seats = []
    for counts in sizes:
        starts = [sum(counts[:index]) for index in range(len(counts))]
        seats.append(seat(*(tokens(next(arrivals), n, at) for n, at in zip(counts, starts, strict=True))))
    done = {id(one): 0 for one in seats}
    while any(one.inputs for one in seats):
        batch = compose([one for one in seats if one.inputs], lambda: next(arrivals))
        assert len({id(one) for one, _ in batch}) == len(batch) > 0
        assert sum(item.count for _, item in batch if item.count > 1) <= STEP_TOKENS
        for one, item in batch:
            assert item.position == done[id(one)]
            assert item.tokens == tuple(range(item.position, item.position + item.count))
            done[id(one)] += item.count
    assert list(done.values()) == [sum(counts) for counts in sizes]


def test_activations_are_cut_by_rows() -> None:
    rows = bytes(range(24))
    whole = Input(0, 7, 3, False, None, Activation("float32", (3, 2), rows), ((1, 2),), 4)
    first, rest = whole.split(1)
    assert (first.position, first.count, first.more) == (7, 1, True)
    assert first.activation == Activation("float32", (1, 2), rows[:8])
    assert (rest.position, rest.count, rest.more) == (8, 2, False)
    assert rest.activation == Activation("float32", (2, 2), rows[8:])
    assert first.trace == rest.trace == whole.trace
