"""Interface of a task: examples with reference answers, and a rule that scores a model's answers."""

from __future__ import annotations

import math
import reprlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Real
from typing import Protocol, runtime_checkable

import msgspec
from PIL import Image

from dymu.errors import BadPrompt, DymuError
from dymu.files import escaped, first_line


@dataclass(frozen=True)
class Example:
    """One question about one or several images.

    Attributes:
        images: RGB, in the order in which the question shows them.
        question: as the model is to read it, instructions on the form of the answer included.
        references: answers that count as right; more than one where people disagree.
        kind: of question (`counting`, `colour`, ...); accuracy is also computed for each.
        measures: of the image's complexity (`objects`, `words`, ...).
    """

    images: tuple[Image.Image, ...]
    question: str
    references: tuple[str, ...]
    kind: str
    measures: Mapping[str, float] = field(default_factory=dict)


@runtime_checkable
class Task(Protocol):
    """Examples in an order in which the first N, for any N, are balanced over the kinds and so a fair sample.

    Attributes:
        name: short, for tables.
        max_new_tokens: of an answer, at most.
        yes_no: kinds whose answers are yes or no; F1 of "yes" is computed for them as well.
    """

    name: str
    max_new_tokens: int
    yes_no: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """The example at this index, the same on every machine."""
        ...

    def score(self, example: Example, answer: str) -> float:
        """Score an answer from 0 (wrong) to 1 (right)."""
        ...

    def describe(self) -> dict[str, object]:
        """Identity of the questions, as JSON holds it: two runs whose descriptions are equal ask the same."""
        ...


def check_tasks(tasks: Sequence[Task]) -> None:
    """Check, before any work, that tasks can be told apart and that their own fields are as `Task` says.

    Raises:
        BadPrompt: a field of one is not.
        DymuError: two have the same name.
    """
    for task in tasks:
        _check_fields(task)
    (name, times), *_ = Counter(escaped(task.name) for task in tasks).most_common(1) or [("", 0)]
    if times > 1:
        raise DymuError(f"{times} tasks are named {name}; give each task once, or rename a folder.")


def _check_fields(task: Task) -> None:
    if not isinstance(task.name, str) or not task.name.strip():
        raise _bad("a task", "name", task.name, "a text that is not empty")
    if type(task.max_new_tokens) is not int or task.max_new_tokens < 1:
        raise _bad(task.name, "max_new_tokens", task.max_new_tokens, "a whole number of at least 1")
    if not _are_texts(task.yes_no):
        raise _bad(task.name, "yes_no", task.yes_no, "a tuple of texts")


def length_of(task: Task, limit: int | None) -> int:
    """How many questions to ask, at most `limit`.

    Raises:
        BadPrompt: the task cannot say how many it has.
    """
    with _named(f"the length of {task.name}"):
        return len(task) if limit is None else min(limit, len(task))


def described(task: Task) -> dict[str, object]:
    """The identity of its questions.

    Raises:
        BadPrompt: the task cannot say it, or it is not what JSON holds.
    """
    with _named(f"the description of {task.name}"):
        description = dict(task.describe())
        msgspec.json.encode(escaped(msgspec.to_builtins(description)))  # it must fit in the result file
    return description


def example_of(task: Task, index: int) -> Example:
    """The example of a task at this index.

    Raises:
        BadPrompt: it cannot be had, or a field of it is not as `Example` says.
    """
    where = f"example {index} of {task.name}"
    with _named(where):
        example = task[index]
    if not isinstance(example, Example):
        raise BadPrompt(f"{where} is {reprlib.repr(example)}, which is no Example: mend the task.")
    if not isinstance(example.question, str):
        raise _bad(where, "question", example.question, "a text")
    if not isinstance(example.images, (list, tuple)) or not all(isinstance(one, Image.Image) for one in example.images):
        raise _bad(where, "images", example.images, "a tuple of PIL images")
    if not isinstance(example.kind, str) or example.kind in ("", "all"):
        raise _bad(where, "kind", example.kind, 'a text, but not "all", which stands for all kinds together')
    if not _are_texts(example.references):
        raise _bad(where, "references", example.references, "a tuple of texts")
    if example.kind in task.yes_no and not example.references:
        raise _bad(where, "references", example.references, "at least one text where the answer is yes or no")
    measures = example.measures
    if not isinstance(measures, Mapping) or not _are_texts([*measures]) or not all(map(_is_finite, measures.values())):
        raise _bad(where, "measures", measures, "finite numbers by name")
    return example


def score_of(task: Task, index: int, example: Example, answer: str) -> float:
    """The task's score of an answer to the example at this index.

    Raises:
        BadPrompt: it cannot be had, or is no number from 0 to 1.
    """
    with _named(f"the score of example {index} of {task.name}"):
        score = task.score(example, answer)
    if not _is_finite(score) or not 0 <= score <= 1:
        raise _bad(f"example {index} of {task.name}", "score", score, "a number from 0 to 1")
    return float(score)


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Says of which part of a task an exception is; what the library raises says so itself."""
    try:
        yield
    except DymuError:
        raise
    except (Exception, SystemExit) as error:
        message = first_line(error).rstrip(".")
        raise BadPrompt(f"{what} cannot be had ({type(error).__name__}: {message}): mend the task.") from error


def _bad(where: str, field: str, value: object, rule: str) -> BadPrompt:
    return BadPrompt(f"{where} has the {field} {reprlib.repr(value)}, which must be {rule}: mend the task.")


def _are_texts(values: object) -> bool:
    return isinstance(values, (list, tuple)) and all(isinstance(value, str) for value in values)


def _is_finite(value: object) -> bool:
    try:
        return isinstance(value, Real) and math.isfinite(value)
    except OverflowError:  # an integer larger than any float
        return False
