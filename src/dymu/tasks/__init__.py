"""What models are asked: one benchmark per file, each a `Task`."""

from __future__ import annotations

from collections.abc import Callable

from dymu.tasks.task import Example, Task


def _composed() -> Task:
    from dymu.tasks.composed import Composed

    return Composed()


def _photos() -> Task:
    from dymu.tasks.photos import Photos

    return Photos()


TASKS: dict[str, Callable[[], Task]] = {"composed": _composed, "photos": _photos}
"""Tasks by name, made when they are asked for."""

__all__ = ["TASKS", "Example", "Task"]
