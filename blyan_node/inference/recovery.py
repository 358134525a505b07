"""What each stage of a mended route has to do so that all hold the log again and nothing is computed twice. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Standing:
    """What a stage holds of a session; nothing, where it is new to it.

    Keys and values of positions 0 to ``held`` - 1, and the journal of what it sent for those from ``journal`` on.
    """

    held: int = 0
    journal: int = 0


@dataclass(frozen=True)
class Task:
    """What a stage has to do.

    It keeps positions 0 to ``keep`` - 1 and sends those from ``send_from`` on: out of its journal up to ``keep``, then
    as it computes them. What lies below ``send_from`` it computes for its own cache only.
    """

    keep: int
    send_from: int


def share_out(standings: Sequence[Standing]) -> tuple[Task, ...]:
    """The tasks of a route's stages, from what each of them holds.

    The last stage needs what it lacks. Whoever stands before a stage sends that from its journal, as far as this
    reaches up to what it holds; where it does not reach, the stage forgets what it has to send and computes it again.
    Then it needs in turn what it lacks. The first stage gets its part from the entry's log: from ``keep`` on.
    """
    tasks: list[Task] = []
    needed = standings[-1].held
    for standing in reversed(standings):
        send_from = needed
        remembered = standing.journal <= send_from
        keep = standing.held if remembered else min(standing.held, send_from)
        tasks.append(Task(keep, send_from))
        needed = keep
    return tuple(reversed(tasks))
