"""What models are asked: one benchmark per file, each a `Task`."""

from dymu.tasks.task import Example, Task

__all__ = ["Example", "Task"]
