"""Ask a model a task's questions in every way that is compared."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn
from transformers import PreTrainedModel

from dymu.apply import name_of
from dymu.asking import generate, inputs_for
from dymu.errors import BadImage
from dymu.evaluate.costs import cost
from dymu.evaluate.results import ResultFile, Results
from dymu.evaluate.rows import Row, applied
from dymu.families import FAMILIES, resolve
from dymu.tasks import Example, Task
from dymu.thresholds import Thresholds


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
) -> Results:
    """Ask every question in every way, and write what was answered and what it cost.

    All rows answer a batch before the next batch is made, so that a run stopped at any point compares like with like.
    A file that holds a part of this very run is continued.

    Args:
        model: a transformers model of a described family, without DyMU; it is as it was afterwards.
        processor: the model's processor.
        tasks: what to ask.
        rows: ways to run the model, see `rows_for`.
        output: the result file.
        thresholds: for the rows that need them, one for each schedule.
        limit: questions per task; None: all.
        batch_size: questions that are answered together.
        timed: questions per task of which every row is timed as well, alone, one row after the other.
        seed: of what is drawn at random.
        progress: show a bar on stderr, if that is a terminal.

    Raises:
        BadResults: `output` belongs to another run.
        BadBudget, BadThresholds, UnsupportedModel: a row cannot be had with this model.
    """
    by_schedule = {found.schedule: found for found in thresholds}
    lengths = {task.name: len(task) if limit is None else min(limit, len(task)) for task in tasks}
    header = _header(model, tasks, rows, by_schedule, lengths, batch_size, timed, seed)
    for row in rows:  # one that cannot be had is refused before any work
        with applied(row, model, processor, by_schedule):
            pass
    with ResultFile(Path(output), header) as file, _bar(progress) as bar:
        todo = bar.add_task("", total=sum(lengths.values()) * len(rows))
        for task in tasks:
            for start in range(0, lengths[task.name], batch_size):
                run = _Batch(file, model, processor, task, start, min(start + batch_size, lengths[task.name]))
                for row in rows:
                    bar.update(todo, description=f"{task.name} · {row.key}")
                    run.answer(row, by_schedule, seed)
                    bar.advance(todo, run.stop - run.start)
                run.time(rows, by_schedule, timed, seed)
        return file.results


def full_tokens(model: PreTrainedModel, processor: Any) -> int:
    """Image tokens of one picture before any merging; class token and registers, which no budget counts, left out."""
    parts = resolve(model, FAMILIES)
    inputs = inputs_for(model, processor, [([Image.new("RGB", (64, 64))], "?")])
    return _image_tokens(model, inputs)[0] - max(parts.prefix - parts.dropped(), 0)


class _Batch:
    """Some examples of a task, made when the first row that has not answered them yet asks for them."""

    def __init__(
        self, file: ResultFile, model: PreTrainedModel, processor: Any, task: Task, start: int, stop: int
    ) -> None:
        self.start, self.stop = start, stop
        self._file, self._model, self._processor, self._task = file, model, processor, task
        self._examples: list[Example] | None = None
        self._inputs: dict[str, Any] | None = None

    def answer(self, row: Row, thresholds: dict[str, Thresholds], seed: int) -> None:
        """Let one row answer, unless it has."""
        place = (self._task.name, self.start)
        if place in self._file.results.answers.get(row.key, {}):
            return
        examples = self._made()
        found: dict[str, list[Any]] = {"answers": [], "scores": [], "kept": []}
        if examples:
            with applied(row, self._model, self._processor, thresholds, seed + self.start) as handle:
                inputs = self._prepared(row)
                texts, _ = generate(self._model, self._processor, inputs, self._task.max_new_tokens)
                if handle is None:
                    found["kept"] = _image_tokens(self._model, inputs)
                else:
                    found["kept"] = _per_example(handle.last.kept, examples)
            found["answers"] = texts
            found["scores"] = [round(self._task.score(e, text), 4) for e, text in zip(examples, texts, strict=True)]
        self._file.add({"task": place[0], "start": place[1], "row": row.key, "answers": found})

    def time(self, rows: Sequence[Row], thresholds: dict[str, Thresholds], timed: int, seed: int) -> None:
        """Time every row on each example among the first `timed`, unless that was done."""
        for index in range(self.start, min(self.stop, timed)):
            turn = index % len(rows)  # so that no row always comes after the same other
            for row in (*rows[turn:], *rows[:turn]):
                if (self._task.name, index) in self._file.results.costs.get(row.key, {}):
                    continue
                example = self._example(index)
                if example is None:
                    continue
                with applied(row, self._model, self._processor, thresholds, seed + index):
                    inputs = inputs_for(self._model, self._processor, [(example.images, example.question)])
                    if index == 0:
                        generate(self._model, self._processor, inputs, 2)  # warm up
                    found = cost(self._model, inputs)
                self._file.add({"task": self._task.name, "start": index, "row": row.key, "cost": found})

    def _made(self) -> list[Example]:
        """The examples, those left out whose image cannot be read."""
        if self._examples is None:
            found: dict[str, list[Any]] = {"index": [], "kind": [], "references": [], "measures": [], "skipped": []}
            self._examples = []
            for index in range(self.start, self.stop):
                try:
                    example = self._task[index]
                except BadImage as error:
                    found["skipped"].append([index, str(error)])
                    continue
                self._examples.append(example)
                found["index"].append(index)
                found["kind"].append(example.kind)
                found["references"].append(list(example.references))
                found["measures"].append({name: round(value, 4) for name, value in example.measures.items()})
            if (self._task.name, self.start) not in self._file.results.examples:
                self._file.add({"task": self._task.name, "start": self.start, "examples": found})
        return self._examples

    def _example(self, index: int) -> Example | None:
        try:
            return self._task[index]
        except BadImage:
            return None

    def _prepared(self, row: Row) -> dict[str, Any]:
        asked = [(example.images, example.question) for example in self._made()]
        if row.method == "downscale":
            return inputs_for(self._model, self._processor, asked)
        if self._inputs is None:
            self._inputs = inputs_for(self._model, self._processor, asked)
        return self._inputs


def _image_tokens(model: PreTrainedModel, inputs: dict[str, Any]) -> list[int]:
    """Image tokens of each prompt, none merged."""
    placeholder = resolve(model, FAMILIES).image_token_id
    counts: list[int] = (inputs["input_ids"] == placeholder).sum(1).tolist()
    return counts


def _per_example(kept: list[int], examples: Sequence[Example]) -> list[int]:
    """Counts per image, in the order of the prompts, to counts per prompt."""
    left = iter(kept)
    return [sum(islice(left, len(example.images))) for example in examples]


def _header(
    model: PreTrainedModel,
    tasks: Sequence[Task],
    rows: Sequence[Row],
    thresholds: dict[str, Thresholds],
    lengths: dict[str, int],
    batch_size: int,
    timed: int,
    seed: int,
) -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": {
            "name": name_of(model),
            "revision": getattr(model.config, "_commit_hash", None),
            "weights": _fingerprint(model),
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        "thresholds": {schedule: _hash(found) for schedule, found in thresholds.items()},
        "tasks": {task.name: {**task.describe(), "length": lengths[task.name]} for task in tasks},
        "rows": [row.__dict__ for row in rows],
        "yes_no": {task.name: list(task.yes_no) for task in tasks},
        "batch_size": batch_size,
        "timed": timed,
        "seed": seed,
        "versions": {name: version(name) for name in ("dymu", "torch", "transformers")}
        | {"python": platform.python_version()},
        "device": device_name(model),
    }


def device_name(model: nn.Module) -> str:
    """Where the model runs: the accelerator's name, or how many threads of which processor."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    return f"CPU ({_processor()}), {torch.get_num_threads()} threads"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names: Iterator[str] = iter(())
    if info.exists():
        names = (line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line)
    return next(names, platform.machine())


def _fingerprint(model: nn.Module) -> str:
    """A hash of every parameter's name, shape and first numbers: tells models apart without reading all of them."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        start = parameter.detach().flatten()[:64].float().cpu().numpy()
        digest.update(f"{name}{tuple(parameter.shape)}".encode() + start.tobytes())
    return digest.hexdigest()[:16]


def _hash(thresholds: Thresholds) -> str:
    numbers = [[entry.budget, list(entry.thresholds)] for entry in thresholds.calibrated]
    return hashlib.sha256(json.dumps(numbers).encode()).hexdigest()[:16]


def _bar(wanted: bool) -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn())  # fmt: skip
    return Progress(*columns, console=console, transient=True, disable=not (wanted and console.is_terminal))
