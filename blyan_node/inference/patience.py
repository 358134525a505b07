"""How long a session waits for its next token, and whom it suspects when none comes. Pure.

A stage that is gone is found by its channel within two seconds. What is left is one that lives but lets nothing
through: the step that it owes is overdue by what the session's steps took so far. The stages are asked how far they
got; the first that is behind the log holds the token up, unless there is much in front of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

STALL = 30.0  # seconds without a token, besides those that a prompt or a queue may take, that nobody is granted more of
LEAST = 10.0  # seconds that a step may take whatever those before took: others' prompts get in between
SLOWER = 10.0  # times the slowest step so far
UNDER_WAY = 0.5
PREFILL_RATE = 20.0  # positions per second that the slowest stage is granted


@dataclass
class Patience:
    """The deadline of a session's next token."""

    slowest: float = 0.0  # seconds that a step took at most
    stalls: int = 0  # in a row, without a token

    def prefill(self, positions: int) -> float:
        """Seconds until the first token of an epoch in which up to so many positions are computed."""
        return (STALL if self.slowest == 0.0 else self.step()) + positions / PREFILL_RATE

    def step(self) -> float:
        """Seconds that a step may take: more with each stall, since the machine may just be slow."""
        return min(STALL, max(LEAST, SLOWER * self.slowest) * float(2**self.stalls))

    def queue(self, waiting: int) -> float:
        """Seconds more for a stage with so many positions in front of it, and for a token that is on its way."""
        return min(STALL, UNDER_WAY + waiting / PREFILL_RATE)

    def took(self, seconds: float) -> None:
        """A step brought a token."""
        self.slowest, self.stalls = max(self.slowest, seconds), 0


def suspects(computed: Sequence[int | None], log: int, stalls: int) -> list[int]:
    """The stages to replace, by their index, the one that holds the frame up first.

    ``computed`` is how many positions of ``log`` each says that it has done, None where it did not answer. A stage that
    lies can put the blame on the next one: when that did not help, after the first of ``stalls``, both go.
    """
    late = next((index for index, done in enumerate(computed) if done is None or done < log), len(computed) - 1)
    return [late, late - 1] if stalls > 1 and late else [late]
