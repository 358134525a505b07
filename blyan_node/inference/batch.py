"""What one step of a stage computes: decodes first, then as much of the prompts as there is room for. Pure.

A long prompt is cut wherever a step is full, so that it holds up nobody's next token by more than one step (Agrawal et
al., 2024, Sarathi-Serve).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from blyan_node.inference.seat import Input, Seat

STEP_TOKENS = 128
"""Positions of a step, where prompts wait: each costs 3 % more than in steps of 256, and decodes wait half as long."""

LEAST_PROMPT = 32
"""Positions of prompts in a step however many decodes there are: one for every seat at most."""


def compose(ready: Sequence[Seat], arrival: Callable[[], int]) -> list[tuple[Seat, Input]]:
    """Take at most one input from each of the seats that have some, and put back what was cut off.

    The one that waited longest decides over which units this step runs: sessions whose routes cut the shard elsewhere
    get a step of their own. All single positions are taken, then longer inputs by age. What a seat has left counts as
    arrived just now (``arrival`` numbers it), so prompts take turns, and a short one does not wait for a long one.
    """
    if not ready:
        return []
    oldest = min(ready, key=_age)
    together = sorted((seat for seat in ready if seat.span == oldest.span), key=_age)
    decodes = [seat for seat in together if seat.inputs[0].count == 1]
    prompts = [seat for seat in together if seat.inputs[0].count > 1]
    batch = [(seat, seat.inputs.popleft()) for seat in decodes]
    room = max(STEP_TOKENS - len(batch), LEAST_PROMPT)
    for seat in prompts:
        if room == 0:
            break
        item = seat.inputs.popleft()
        if item.count > room:
            item, rest = item.split(room)
            seat.inputs.appendleft(rest)
        batch.append((seat, item))
        room -= item.count
    for seat, _ in batch:
        if seat.inputs:
            seat.inputs[0].number = arrival()
    return batch


def _age(seat: Seat) -> int:
    return seat.inputs[0].number
