"""Tasks: questions about images, and rules that score the answers."""

from dymu.evaluation.tasks.task import Example, Task, check_tasks, described, example_of, length_of, score_of

__all__ = ["Example", "Task", "check_tasks", "described", "example_of", "length_of", "score_of"]
