"""Budgets for methods that leave what a picture needs: solved so that images keep so many tokens on average."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import msgspec

from dymu.errors import BadImage, BadPrompt, BadQuestion
from dymu.evaluation.methods import METHODS, Row, is_solved
from dymu.evaluation.rows import encoded_images, running
from dymu.evaluation.tasks import Example, Task, example_of, length_of
from dymu.measure.progress import Bar
from dymu.prompting import check_question, inputs_for

NEAR = 0.005
"""Part of the budget by which the mean may miss it."""
DOUBLINGS, HALVINGS = 12, 30
"""Of the step until two numbers enclose the budget, and of what lies between them, at most."""


def solved(
    rows: Iterable[Row],
    model: Any,
    processor: Any,
    tasks: Sequence[Task],
    *,
    limit: int | None = None,
    batch_size: int = 8,
    before: Iterable[Row] = (),
    say: Callable[[str], object] = print,
    progress: bool = True,
) -> list[Row]:
    """The rows, those of methods that leave what a picture needs with the number by which images keep the budget.

    Every number that is tried encodes the images of all questions once; the language model does not run.

    Args:
        rows: see `rows_for`; what names its number already stays as it is.
        model, processor, tasks, limit, batch_size: see `dymu.evaluate`.
        before: rows of a file that is continued: a number in there is taken as it stands.
        say: told every number that is solved, in one sentence.

    Raises:
        DymuError: the model cannot run a row.
    """
    rows, numbers = list(rows), dict[tuple[str, int, str], str]()
    for row in before:
        if row.solved:
            numbers[row.method, row.budget, row.options] = row.solved
    tried = dict[tuple[str, str], dict[float, float]]()  # of other budgets, too
    for row in rows:
        if is_solved(row) or (row.method, row.budget, row.options) in numbers:
            continue
        known = tried.setdefault((row.method, row.options), {})
        number, sentence = _solved(row, known, model, processor, tasks, limit, batch_size, progress)
        numbers[row.method, row.budget, row.options] = number
        say(sentence)
    return [
        row if is_solved(row) else msgspec.structs.replace(row, solved=numbers[row.method, row.budget, row.options])
        for row in rows
    ]


def _solved(
    row: Row,
    known: dict[float, float],
    model: Any,
    processor: Any,
    tasks: Sequence[Task],
    limit: int | None,
    batch_size: int,
    progress: bool,
) -> tuple[str, str]:
    """The argument that is solved for a row, and a sentence that tells what images keep."""
    method = METHODS[row.method]
    assert method.solves is not None
    field, least = method.solves

    with Bar(progress, remaining=False) as bar:

        def mean(value: float) -> float:
            now = msgspec.structs.replace(row, solved=f"{field}={value:g}")
            todo = bar.add_task(now.key, total=sum(length_of(task, limit) for task in tasks))
            tokens = images = 0
            for examples in _batches(processor, tasks, limit, batch_size):
                with running(now, model, None, {}, row.budget) as handle:
                    if examples and handle is not None:
                        asked = [(example.images, example.question) for example in examples]
                        encoded_images(model, inputs_for(model, processor, asked))
                        tokens += sum(item.budgeted for item in handle.last.items)
                        images += len(handle.last.items)
                bar.advance(todo, len(examples))
            bar.remove_task(todo)
            return tokens / max(images, 1)

        value = nearest(mean, row.budget, getattr(method.make(row, 1.0, 0), field), least, known)
    off = known[value] - row.budget
    sentence = f"{row.method}: by {field}={value:g} an image keeps {known[value]:.1f} tokens on average"
    if abs(off) > max(NEAR * row.budget, 0.5):
        sentence += (
            f", {abs(off):.1f} {'more' if off > 0 else 'fewer'} than the budget of {row.budget}, which no number of it "
            "reaches on these images"
        )
    return f"{field}={value:g}", f"{sentence}."


def nearest(
    mean: Callable[[float], float], budget: float, start: float, least: float, known: dict[float, float]
) -> float:
    """The value of five digits at which `mean`, which falls where values rise, is nearest to a budget.

    Args:
        start: where to begin.
        least: of the values.
        known: means by value, to which those that are asked for are added.
    """

    def ask(value: float) -> None:
        value = float(f"{max(value, least):.5g}")
        if value not in known:
            known[value] = mean(value)

    def off(value: float) -> float:
        return abs(known[value] - budget)

    def ends() -> tuple[float, float]:
        """Between which the budget lies."""
        low = max((value for value, kept in known.items() if kept > budget), default=-math.inf)
        return low, min((value for value, kept in known.items() if kept <= budget and value > low), default=math.inf)

    ask(start)
    for doubling in range(DOUBLINGS):
        low, high = ends()
        if max(-low, high) < math.inf or high == least:
            break
        ask(start + 0.5 * 2**doubling * (1 if high == math.inf else -1))
    for turn in range(HALVINGS):
        low, high = ends()
        best = min(sorted(known), key=off)
        count = len(known)
        if max(-low, high) == math.inf or off(best) <= NEAR * budget:
            break
        # Means fall about by the same part for the same step; halves, now and then, in case they do not.
        part = math.log(known[low] / budget) / math.log(known[low] / known[high])
        ask(low + (high - low) * (0.5 if turn % 3 == 2 else min(max(part, 0.1), 0.9)))
        if len(known) == count:
            break
    return min(sorted(known), key=off)


def _batches(processor: Any, tasks: Sequence[Task], limit: int | None, batch_size: int) -> Iterator[list[Example]]:
    """The examples of tasks that show an image and can be asked, see `dymu.evaluate`."""
    for task in tasks:
        for start in range(0, length_of(task, limit), batch_size):
            batch = list[Example]()
            for index in range(start, min(start + batch_size, length_of(task, limit))):
                with suppress(BadImage, BadQuestion):
                    example = example_of(task, index)
                    with suppress(BadPrompt):
                        check_question(processor, example.question)
                        batch += [example] if example.images else []
            yield batch
