"""Ask a model the questions of tasks, in every row of a comparison."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

import msgspec
from PIL import Image
from transformers import PreTrainedModel

from dymu.errors import AlreadyApplied, BadImage, BadPrompt, BadQuestion
from dymu.evaluation.divergence import divergences
from dymu.evaluation.methods import METHODS, UNTOUCHED, Row, options_of, way_of
from dymu.evaluation.results import (
    FORMAT,
    Answers,
    Examples,
    Header,
    Line,
    Model,
    ResultFile,
    Results,
)
from dymu.evaluation.rows import check, encoded, running
from dymu.evaluation.tasks import Example, Task, check_tasks, described, example_of, length_of, score_of
from dymu.families.resolve import resolve
from dymu.files import escaped, expanded
from dymu.handle import Handle, handle_of, name_of
from dymu.measure.costs import cost
from dymu.measure.lines import as_written
from dymu.measure.progress import Bar
from dymu.measure.provenance import device_name, fingerprint, short_hash, thresholds_hash, versions
from dymu.measure.results import BadResults
from dymu.measure.times import Cost
from dymu.prompting import Answer, answers, check_question, image_tokens, inputs_for, items_by_prompt
from dymu.reducers import LayerMemory
from dymu.thresholds import Thresholds

SAMPLE = 16
"""Examples of a task whose images say how many tokens an image has, where that differs and nothing else says it."""


def evaluate(
    model: PreTrainedModel,
    processor: Any,
    tasks: Sequence[Task],
    rows: Sequence[Row],
    output: str | os.PathLike[str],
    *,
    thresholds: Iterable[Thresholds] = (),
    limit: int | None = None,
    batch_size: int = 8,
    timed: int = 8,
    seed: int = 0,
    progress: bool = True,
    workers: Workers | None = None,
) -> Results:
    """Ask every question in every way, and write the answers and their costs.

    All rows answer a batch before the next batch, so that a run stopped at any point compares like with like. A file
    that holds a part of this very run is continued.

    Args:
        model: a transformers model of a described family, without DyMU; it is as it was afterwards.
        processor: the model's processor.
        tasks: the questions.
        rows: ways to run the model, each once, see `rows_for`.
        output: the result file.
        thresholds: for the rows that need them, one for each schedule.
        limit: questions per task; None: all.
        batch_size: questions that are answered together.
        timed: questions per task of which every row is timed as well, alone, one row after the other.
        seed: of all random numbers.
        progress: show a bar on stderr, or lines where that is no terminal.
        workers: what answers batches elsewhere, see `Workers`; None: this process does. Then nothing may be timed.

    Raises:
        BadResults: `output` belongs to another run, or another process is writing it.
        BadBudget, BadThresholds, UnsupportedModel: the model cannot run a row.
        AlreadyApplied: DyMU is applied to the model.
        DymuError: two tasks have the same name.
        BadPrompt: a task, or an example or score of it, is not as `Task` and `Example` say, or fails.
        BadOutput: `output` cannot be written.
        ValueError: a `batch_size` below 1, something to be timed by workers, or a row of an unknown method or way to
            unmerge.
    """
    if batch_size < 1:
        raise ValueError("evaluate needs a batch_size of at least 1")
    if workers is not None and timed:
        raise ValueError("workers beside each other cannot be timed: evaluate them with timed=0")
    if handle_of(model) is not None:
        raise AlreadyApplied("DyMU is applied to this model, so nothing could be compared; call handle.remove() first.")
    by_schedule = {calibrated.schedule or "": calibrated for calibrated in thresholds}
    check_tasks(tasks)
    lengths = {escaped(task.name): length_of(task, limit) for task in tasks}
    tokens = full_tokens(model, processor, by_schedule.values(), tasks)
    for row in rows:
        check(row, model, tokens, by_schedule)
    header = Header(
        dymu_results=FORMAT,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        model=Model(
            name=name_of(model),
            revision=getattr(model.config, "_commit_hash", None),
            weights=fingerprint(model),
            dtype=str(model.dtype).removeprefix("torch."),
        ),
        tasks={
            name: {**described(task), "length": length}
            for task, (name, length) in zip(tasks, lengths.items(), strict=True)
        },
        rows=list(rows),
        yes_no={escaped(task.name): list(task.yes_no) for task in tasks},
        batch_size=batch_size,
        timed=timed,
        seed=seed,
        versions=versions("torch", "transformers"),
        device=device_name(model.device),
        processor=short_hash([processor.chat_template, processor.image_processor.to_dict()]),
        thresholds={schedule: thresholds_hash(calibrated) for schedule, calibrated in by_schedule.items()},
    )
    with ResultFile(expanded(output), header) as file, Bar(progress, remaining=False) as bar:
        asker = _Asker(file, model, processor, by_schedule, tokens, seed)
        by_encoding = _by_encoding(rows)
        todo = bar.add_task("", total=sum(lengths.values()) * len(rows))
        if workers is not None:
            jobs = [
                Job(name, start, min(start + batch_size, length))
                for name, length in lengths.items()
                for start in range(0, length, batch_size)
            ]
            _take_over(file, header, jobs, workers, lambda job: bar.advance(todo, (job.stop - job.start) * len(rows)))
            return file.results
        for task, (name, length) in zip(tasks, lengths.items(), strict=True):
            for start in range(0, length, batch_size):
                batch = _Batch(asker, task, name, start, min(start + batch_size, length))
                for row in by_encoding:
                    bar.update(todo, description=f"{name} · {row.key}")
                    batch.answer(row)
                    bar.advance(todo, batch.stop - batch.start)
                    if batch.stop == length:
                        bar.say(f"{name} · {row.key}: all {length:,} questions")
                batch.time(rows, timed)
    return file.results


class Job(msgspec.Struct, frozen=True):
    """A batch of a task, its name and the questions from `start` to `stop`, and the rows that have answered it."""

    task: str
    start: int
    stop: int
    answered: tuple[str, ...] = ()


Workers = Callable[[Header, Sequence[Job]], Iterator[tuple[Job, Sequence[Line]]]]
"""Answers the batches of a run, in any order, and gives the lines of each; see `Answering`."""


class Answering:
    """A worker that answers batches of a run.

    Args:
        model, processor, tasks, thresholds: see `evaluate`.
        header: of the run.

    Raises:
        BadResults: the run has a model of other weights.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        tasks: Sequence[Task],
        thresholds: Iterable[Thresholds],
        header: Header,
    ) -> None:
        if fingerprint(model) != header.model.weights:
            raise BadResults("a worker has other weights than the machine that writes the results: make them the same.")
        self._model, self._processor, self._header = model, processor, header
        self._tasks = {escaped(task.name): task for task in tasks}
        self._thresholds = {calibrated.schedule or "": calibrated for calibrated in thresholds}
        self._tokens = full_tokens(model, processor, self._thresholds.values(), tasks)

    def __call__(self, job: Job) -> list[Line]:
        """The lines of a batch: its examples, and the answers of rows that have not answered it."""
        lines = _Lines(Results(self._header))
        asker = _Asker(lines, self._model, self._processor, self._thresholds, self._tokens, self._header.seed)
        batch = _Batch(asker, self._tasks[job.task], job.task, job.start, job.stop)
        for row in _by_encoding(self._header.rows):
            if row.key not in job.answered:
                batch.answer(row)
        return lines.added


@dataclass
class _Lines:
    """What a worker adds to a result file that is elsewhere."""

    results: Results
    added: list[Line] = field(default_factory=list)

    def add(self, line: Line) -> None:
        self.results.take(line)
        self.added.append(line)


def _take_over(
    file: ResultFile, header: Header, jobs: Sequence[Job], workers: Workers, done: Callable[[Job], object]
) -> None:
    """Have workers answer what the file does not hold, and add it.

    Raises:
        BadResults: the file holds other examples of a batch.
    """
    answers = file.results.answers
    left = list[Job]()
    for job in jobs:
        answered = tuple(row.key for row in header.rows if (job.task, job.start) in answers.get(row.key, {}))
        if len(answered) == len(header.rows):
            done(job)
        else:
            left.append(msgspec.structs.replace(job, answered=answered))
    for job, lines in workers(header, left):
        for line in lines:
            before = file.results.examples.get((line.task, line.start))
            if line.examples is None or before is None:
                file.add(line)
            elif before != as_written(line.examples):
                raise BadResults(_others(job.task, job.start, job.stop))
        done(job)


def _others(task: str, start: int, stop: int) -> str:
    return (
        f"examples {start} to {stop - 1} of {task} are not those of the result file, as where an image was mended or "
        "replaced: begin a new file with -o."
    )


def _by_encoding(rows: Iterable[Row]) -> list[Row]:
    """The rows, those together that share an encoding."""
    encodings = [_encoding(row) for row in rows]
    return sorted(rows, key=lambda row: encodings.index(_encoding(row)))


def full_tokens(
    model: PreTrainedModel, processor: Any, thresholds: Iterable[Thresholds] = (), tasks: Iterable[Task] = ()
) -> int:
    """Image tokens of one image before any merging, without class token and registers, which no budget counts.

    Where images have different numbers of tokens (tiles, native resolution), this is the mean over the images that the
    thresholds were calibrated on, or else over the first ones of the tasks.
    """
    for calibrated in thresholds:
        if calibrated.image_tokens is not None:
            return round(calibrated.image_tokens)
    parts, shown = resolve(model), list[Image.Image]()
    if parts.cuts_images or parts.tower_kind.arrangement != "batch":
        shown = [image for task in tasks for image in _first_images(task)]
    each = [([image], "?") for image in shown or [Image.new("RGB", (64, 64))]]
    counts = [image_tokens(model, inputs_for(model, processor, [one]))[0] for one in each]
    return round(sum(counts) / len(counts)) - max(parts.prefix - parts.dropped(), 0)


def _first_images(task: Task) -> list[Image.Image]:
    """The images of the first `SAMPLE` examples of a task that can be read."""
    images = list[Image.Image]()
    for index in range(length_of(task, SAMPLE)):
        with suppress(BadImage, BadQuestion):
            images += example_of(task, index).images
    return images


@dataclass
class _Asker:
    """The model and the result file, which all batches share."""

    file: ResultFile | _Lines
    model: PreTrainedModel
    processor: Any
    thresholds: dict[str, Thresholds]
    tokens: int
    seed: int
    warm: set[Row] = field(default_factory=set)

    def inputs(self, examples: Sequence[Example]) -> dict[str, Any]:
        return inputs_for(self.model, self.processor, [(example.images, example.question) for example in examples])

    def running(self, row: Row) -> AbstractContextManager[Handle | None]:
        return running(row, self.model, self.processor, self.thresholds, self.tokens, self.seed)

    def cost(self, row: Row, example: Example) -> Cost:
        """Measure an example for a row, once more where the row has not run before."""
        with self.running(row):
            inputs = self.inputs([example])
            if row not in self.warm:
                cost(self.model, inputs)
                self.warm.add(row)
            return cost(self.model, inputs)


@dataclass
class _Batch:
    """Some examples of a task, loaded when the first row that has not answered them yet asks for them.

    Attributes:
        newest: the last encoding of their images, and how they were encoded, see `_encoding`.
        memory: of the encoder's layers, which methods that merge in none of them have in common.
    """

    asker: _Asker
    task: Task
    name: str
    start: int
    stop: int
    newest: tuple[Row, dict[str, Any]] | None = None
    memory: LayerMemory = field(default_factory=LayerMemory)

    def answer(self, row: Row) -> None:
        """Ask one row, unless its answers are in the file."""
        asker = self.asker
        if (self.name, self.start) in asker.file.results.answers.get(row.key, {}):
            return
        lines, kept, kl = list[Answer](), list[int](), list[float | None]()
        untouched = self.untouched
        if self.examples:
            with asker.running(row) as handle:
                inputs = self.encoded(row)
                lines = untouched if row == UNTOUCHED else self.answers(inputs)
                if handle is None:
                    kept = image_tokens(asker.model, inputs)
                elif handle.last.ran:  # one number for each prompt, that of its layers on average
                    kept = [round(sum(layers) / len(layers)) for layers in handle.last.ran]
                else:
                    of_prompts = items_by_prompt(asker.model, inputs, handle.last.items)
                    kept = [sum(item.kept for item in items) for items in of_prompts]
                kl = divergences(asker.model, untouched, lines, inputs)
        answers = Answers(
            answers=[line.text for line in lines],
            scores=[
                round(score_of(self.task, index, example, line.text), 4)
                for (index, example), line in zip(self.examples.items(), lines, strict=True)
            ],
            kept=kept,
            same=[line.text == before.text for line, before in zip(lines, untouched, strict=True)],
            kl=kl,
        )
        asker.file.add(Line(self.name, self.start, row.key, answers=answers))

    def time(self, rows: Sequence[Row], timed: int) -> None:
        """Time every row on each example among the first `timed`, unless its costs are in the file."""
        for index in range(self.start, min(self.stop, timed)):
            turn = index % len(rows)  # so that no row always comes after the same other
            costs = self.asker.file.results.costs
            todo = [row for row in (*rows[turn:], *rows[:turn]) if (self.name, index) not in costs.get(row.key, {})]
            if not todo:
                continue
            try:
                example = self.example(index)
            except (BadImage, BadQuestion):
                continue
            for row in todo:
                self.asker.file.add(Line(self.name, index, row.key, cost=self.asker.cost(row, example)))

    def example(self, index: int) -> Example:
        """One example.

        Raises:
            BadImage, BadQuestion: it is left out, and why.
            BadPrompt: it is not as `Example` says.
        """
        example = example_of(self.task, index)
        try:
            check_question(self.asker.processor, example.question)
        except BadPrompt as error:
            raise BadQuestion(f"example {index} of {self.name} is left out: {error}") from error
        return example

    @cached_property
    def examples(self) -> dict[int, Example]:
        """The examples by index, without those that cannot be asked; they are written to the file if new.

        Raises:
            BadResults: the file holds others.
            BadPrompt: one is not as `Example` says.
        """
        now, examples = Examples([], [], [], [], []), dict[int, Example]()
        for index in range(self.start, self.stop):
            try:
                example = self.example(index)
            except (BadImage, BadQuestion) as error:
                now.skipped.append((index, str(error)))
                continue
            examples[index] = example
            now.index.append(index)
            now.kind.append(example.kind)
            now.references.append(list(example.references))
            now.measures.append({name: round(float(value), 4) for name, value in example.measures.items()})
        before = self.asker.file.results.examples.get((self.name, self.start))
        if before is None:
            self.asker.file.add(Line(self.name, self.start, examples=now))
        elif before != as_written(now):
            raise BadResults(_others(self.name, self.start, self.stop))
        return examples

    def encoded(self, row: Row) -> dict[str, Any]:
        """The prompts with their images encoded as the row says; to be had while it changes the model.

        Rows that differ in how they unmerge alone share an encoding.
        """
        encoding = _encoding(row)
        if self.newest is None or self.newest[0] != encoding:
            inputs = self.inputs_of() if row.method == "downscale" else self.inputs
            self.newest = encoding, encoded(self.asker.model, inputs, self.memory)
        return self.newest[1]

    def inputs_of(self) -> dict[str, Any]:
        """The prompts of the batch."""
        return self.asker.inputs(list(self.examples.values()))

    def answers(self, inputs: dict[str, Any]) -> list[Answer]:
        """What the model answers, as it is now."""
        return answers(self.asker.model, self.asker.processor, inputs, self.task.max_new_tokens)

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """The prompts of all rows that keep the images' size."""
        return self.inputs_of()

    @cached_property
    def untouched(self) -> list[Answer]:
        """The untouched model's answers, which every row is compared with; to be had while no row changes the model."""
        return self.answers(self.encoded(UNTOUCHED)) if self.examples else []


def _encoding(row: Row) -> Row:
    """What rows have in common whose images are encoded alike."""
    method = METHODS[row.method]
    if method.pruning:  # within the language model, all of the encoder's tokens come there
        return Row("", 0)
    filled = "fill" not in options_of(row.options) and method.fill(way_of(row)) == "nearest"
    return msgspec.structs.replace(row, unmerge="exact" if filled else "none")
