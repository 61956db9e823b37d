"""Progress of long work on stderr: a bar on a terminal, and lines where there is none."""

from __future__ import annotations

from time import monotonic

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LINE_EVERY_S = 30
"""Where there is no terminal, the time between two lines that say how far it is, at least."""


class Bar(Progress):
    """A progress bar; off a terminal, lines that say how far it is, and what is finished.

    Args:
        show: false: neither.
        remaining: whether to show the estimated time left, which is meaningful only where all steps take equally long.
    """

    def __init__(self, show: bool, *, remaining: bool = True) -> None:
        console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)
        columns: list[ProgressColumn] = [TextColumn("{task.description}", markup=False), BarColumn()]
        columns += [MofNCompleteColumn(), TimeElapsedColumn(), *([TimeRemainingColumn()] if remaining else [])]
        super().__init__(*columns, console=console, transient=True, disable=not (show and console.is_terminal))
        self._lines = show and not console.is_terminal
        self._said = monotonic()

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        if self._lines and monotonic() - self._said > LINE_EVERY_S:
            task = self._tasks[task_id]
            of = "" if task.total is None else f" of {task.total:,.0f}"
            self.say(f"{task.description}: {task.completed:,.0f}{of}")

    def say(self, text: str) -> None:
        """Say what is done, off a terminal, where no bar shows it."""
        if self._lines:
            self.console.print(text)
            self._said = monotonic()
