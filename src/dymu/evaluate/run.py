"""Ask a model a task's questions in every way that is compared."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
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

from dymu.apply import Handle, handle_of, name_of
from dymu.asking import generate, inputs_for
from dymu.errors import AlreadyApplied, BadImage, DymuError
from dymu.evaluate.costs import cost
from dymu.evaluate.results import BadResults, ResultFile, Results
from dymu.evaluate.rows import Row, applied, check
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
        rows: ways to run the model, each once, see `rows_for`.
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
        AlreadyApplied: DyMU is applied to the model.
        DymuError: two tasks are of one name.
        ValueError: a `batch_size` below 1.
    """
    if batch_size < 1:
        raise ValueError("evaluate needs a batch_size of at least 1")
    if handle_of(model) is not None:
        raise AlreadyApplied("DyMU is applied to this model, so nothing could be compared; call handle.remove() first.")
    by_schedule = {found.schedule or "": found for found in thresholds}
    lengths = {task.name: len(task) if limit is None else min(limit, len(task)) for task in tasks}
    if len(lengths) < len(tasks):
        raise DymuError(f"two tasks are of one name, of {', '.join(lengths)}; give each once, or rename a folder.")
    tokens = full_tokens(model, processor, by_schedule.values())
    for row in rows:
        check(row, model, tokens, by_schedule)
    header = _header(model, processor, tasks, rows, by_schedule, lengths, batch_size, timed, seed)
    with ResultFile(Path(output), header) as file, _bar(progress) as bar:
        asker = _Asker(file, model, processor, by_schedule, seed)
        todo = bar.add_task("", total=sum(lengths.values()) * len(rows))
        for task in tasks:
            for start in range(0, lengths[task.name], batch_size):
                batch = _Batch(asker, task, start, min(start + batch_size, lengths[task.name]))
                for row in rows:
                    bar.update(todo, description=f"{task.name} · {row.key}")
                    batch.answer(row)
                    bar.advance(todo, batch.stop - batch.start)
                batch.time(rows, timed)
        return file.results


def full_tokens(model: PreTrainedModel, processor: Any, thresholds: Iterable[Thresholds] = ()) -> int:
    """Image tokens of one image before any merging; class token and registers, which no budget counts, left out.

    Where images are cut into tiles this is the mean of those that the thresholds were found on.
    """
    for found in thresholds:
        if found.image_tokens is not None:
            return round(found.image_tokens)
    parts = resolve(model, FAMILIES)
    inputs = inputs_for(model, processor, [([Image.new("RGB", (64, 64))], "?")])
    return _image_tokens(model, inputs)[0] - max(parts.prefix - parts.dropped(), 0)


class _Asker:
    """What all batches share: the model, and the file that they write."""

    def __init__(
        self,
        file: ResultFile,
        model: PreTrainedModel,
        processor: Any,
        thresholds: dict[str, Thresholds],
        seed: int,
    ) -> None:
        self.file, self.model, self.processor = file, model, processor
        self._thresholds, self._seed = thresholds, seed
        self._warm: set[Row] = set()

    def inputs(self, examples: Sequence[Example]) -> dict[str, Any]:
        return inputs_for(self.model, self.processor, [(example.images, example.question) for example in examples])

    def applied(self, row: Row, seed: int) -> AbstractContextManager[Handle | None]:
        return applied(row, self.model, self.processor, self._thresholds, self._seed + seed)

    def kept(self, handle: Handle | None, inputs: dict[str, Any], examples: Sequence[Example]) -> list[int]:
        """Image tokens of each prompt, in the last call."""
        if handle is None:
            return _image_tokens(self.model, inputs)
        left = iter(handle.last.kept)
        return [sum(islice(left, len(example.images))) for example in examples]

    def cost(self, row: Row, example: Example, seed: int) -> dict[str, float]:
        """What the example costs a row, which is warmed up first."""
        with self.applied(row, seed):
            inputs = self.inputs([example])
            if row not in self._warm:
                cost(self.model, inputs)
                self._warm.add(row)
            return cost(self.model, inputs)


class _Batch:
    """Some examples of a task, made when the first row that has not answered them yet asks for them."""

    def __init__(self, asker: _Asker, task: Task, start: int, stop: int) -> None:
        self.start, self.stop = start, stop
        self._asker, self._file, self._task = asker, asker.file, task
        self._examples: list[Example] | None = None
        self._inputs: dict[str, Any] | None = None

    def answer(self, row: Row) -> None:
        """Let one row answer, unless it has."""
        place = (self._task.name, self.start)
        if place in self._file.results.answers.get(row.key, {}):
            return
        examples = self._made()
        found: dict[str, list[Any]] = {"answers": [], "scores": [], "kept": []}
        if examples:
            with self._asker.applied(row, self.start) as handle:
                inputs = self._prepared(row)
                found["answers"], _ = generate(
                    self._asker.model, self._asker.processor, inputs, self._task.max_new_tokens
                )
                found["kept"] = self._asker.kept(handle, inputs, examples)
            found["scores"] = [
                round(self._task.score(example, text), 4)
                for example, text in zip(examples, found["answers"], strict=True)
            ]
        self._file.add({"task": place[0], "start": place[1], "row": row.key, "answers": found})

    def time(self, rows: Sequence[Row], timed: int) -> None:
        """Time every row on each example among the first `timed`, unless that was done."""
        for index in range(self.start, min(self.stop, timed)):
            turn = index % len(rows)  # so that no row always comes after the same other
            todo = [
                row
                for row in (*rows[turn:], *rows[:turn])
                if (self._task.name, index) not in self._file.results.costs.get(row.key, {})
            ]
            example = self._example(index) if todo else None
            if example is None:
                continue
            for row in todo:
                found = self._asker.cost(row, example, index)
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
            recorded = self._file.results.examples.get((self._task.name, self.start))
            if recorded is None:
                self._file.add({"task": self._task.name, "start": self.start, "examples": found})
            elif recorded != json.loads(json.dumps(found)):
                raise BadResults(
                    f"examples {self.start} to {self.stop - 1} of {self._task.name} are not those of the result file, "
                    "as where an image was mended or replaced: begin a new file with -o."
                )
        return self._examples

    def _example(self, index: int) -> Example | None:
        try:
            return self._task[index]
        except BadImage:
            return None

    def _prepared(self, row: Row) -> dict[str, Any]:
        if row.method == "downscale":
            return self._asker.inputs(self._made())
        if self._inputs is None:
            self._inputs = self._asker.inputs(self._made())
        return self._inputs


def _image_tokens(model: PreTrainedModel, inputs: dict[str, Any]) -> list[int]:
    """Image tokens of each prompt, none merged."""
    placeholder = resolve(model, FAMILIES).placeholders["image"]
    counts: list[int] = (inputs["input_ids"] == placeholder).sum(1).tolist()
    return counts


def _header(
    model: PreTrainedModel,
    processor: Any,
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
            "weights": fingerprint(model),
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        "processor": short_hash([processor.chat_template, processor.image_processor.to_dict()]),
        "thresholds": {
            schedule: short_hash([[entry.budget, entry.thresholds] for entry in found.calibrated])
            for schedule, found in thresholds.items()
        },
        "tasks": {task.name: {**task.describe(), "length": lengths[task.name]} for task in tasks},
        "rows": [row.__dict__ for row in rows],
        "yes_no": {task.name: list(task.yes_no) for task in tasks},
        "batch_size": batch_size,
        "timed": timed,
        "seed": seed,
        "versions": {name: version(name) for name in ("dymu", "torch", "transformers")}
        | {"python": platform.python_version()},
        "device": device_name(model.device),
    }


def device_name(device: torch.device) -> str:
    """The accelerator's name, or how many threads of which processor."""
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


def fingerprint(model: nn.Module) -> str:
    """A hash of every parameter's name and shape and of some of its numbers: tells models apart without reading all."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().flatten()
        some = flat[:: max(len(flat) // 64, 1)].float().cpu().numpy()
        digest.update(f"{name}{tuple(parameter.shape)}".encode() + some.tobytes())
    return digest.hexdigest()[:16]


def short_hash(data: object) -> str:
    """16 hexadecimal digits that tell one piece of data, as JSON, from another."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _bar(wanted: bool) -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn())  # fmt: skip
    return Progress(*columns, console=console, transient=True, disable=not (wanted and console.is_terminal))
