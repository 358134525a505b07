"""How the progress of publishing a model is shown, by the CLI and by the demo."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from blyan_node.api.client import CannotReach


def show_progress(steps: Iterator[dict[str, Any]], console: Console) -> None:
    """Draw a bar, or in plain output one line for each kind of step; CannotReach if the node ends before the work."""
    columns = (TextColumn("  {task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    kind = ""
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("")
        for step in steps:
            if step.get("published"):
                return
            progress.update(bar, description=step["stage"], completed=step["done"], total=step["total"])
            # Stages are phrases such as "storing layer.3": the verb says what goes on.
            if (verb := step["stage"].partition(" ")[0]) != kind and not console.is_terminal:
                kind = verb
                console.print(f"  {verb} ({step['total']} steps)…")
    raise CannotReach("the node ended before the model was published; see its log")
