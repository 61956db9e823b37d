"""Progress bars."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def bar_of(show: bool, *, remaining: bool = True) -> Progress:
    """A progress bar on stderr, disabled unless that is a terminal and `show` is true.

    Args:
        remaining: whether to show the estimated time left, which is meaningful only where all steps take equally long.
    """
    console = Console(stderr=True)
    columns: list[ProgressColumn] = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    columns += [TimeElapsedColumn(), *([TimeRemainingColumn()] if remaining else [])]
    return Progress(*columns, console=console, transient=True, disable=not (show and console.is_terminal))
