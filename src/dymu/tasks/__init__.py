"""What models are asked: one benchmark per file, each a `Task`."""

from collections.abc import Callable

from dymu.tasks.task import Example, Task

TASKS: dict[str, Callable[[], Task]] = {}
"""Tasks by name, made when they are asked for."""

__all__ = ["TASKS", "Example", "Task"]
