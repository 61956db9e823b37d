"""A result file: one JSON object per line, appended as they come, so that a killed run loses one batch at most.

The first line is the header, which describes the run. Each further line holds one batch: its examples, or one row's
answers to them, or one row's cost of one example.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import msgspec

from dymu.choices import UNMERGE
from dymu.evaluation.methods import FORMER, METHODS, UNTOUCHED, Row, way_of
from dymu.files import Amount, Count, decoded
from dymu.measure.lines import LineFile, as_written, lines_of
from dymu.measure.results import BadResults, check_same_run
from dymu.measure.times import Cost

FORMAT: Literal[1] = 1
CHANGING = ("date",)
"""Header fields that may differ between a run and its continuation."""


class Model(msgspec.Struct, forbid_unknown_fields=True):
    """The model: its name, the hub's revision, a hash of its weights, and their dtype."""

    name: str
    revision: str | None
    weights: str
    dtype: str


class Header(msgspec.Struct, forbid_unknown_fields=True):
    """The first line of a file.

    Attributes:
        tasks: by name, see `Task.describe`, and `length`, the number of questions.
        yes_no: by task, the kinds whose answers are yes or no.
        timed: questions per task of which every row is timed.
        processor, thresholds: hashes of the model's processor, and of thresholds by schedule.

    Raises:
        ValueError: a task without its length, or a row of an unknown method or way to unmerge.
    """

    dymu_results: Literal[1]
    date: str
    model: Model
    tasks: dict[str, dict[str, Any]]
    rows: Annotated[list[Row], msgspec.Meta(min_length=1)]
    yes_no: dict[str, list[str]]
    batch_size: Count
    timed: Count
    seed: int
    versions: dict[str, str]
    device: str
    processor: str = ""
    thresholds: dict[str, str] = {}

    def __post_init__(self) -> None:
        for name, task in self.tasks.items():
            if not isinstance(task.get("length"), int):
                raise ValueError(f"`tasks` does not say the `length` of {name}")
        for row in self.rows:
            if row.method not in METHODS:
                raise ValueError(f"`rows` hold an unknown method, {row.method!r}")
            if row.unmerge not in (*UNMERGE, FORMER):
                raise ValueError(f"`rows` hold an unknown way to unmerge, {row.unmerge!r}")


class Examples(msgspec.Struct, forbid_unknown_fields=True):
    """One batch of examples, and the index of each that was left out with the reason.

    Raises:
        ValueError: not as many of one as of another, or of the kind `all`.
    """

    index: list[Count]
    kind: list[str]
    references: list[list[str]]
    measures: list[dict[str, float]]
    skipped: list[tuple[Count, str]]

    def __post_init__(self) -> None:
        if not len(self.index) == len(self.kind) == len(self.references) == len(self.measures):
            raise ValueError("`index`, `kind`, `references` and `measures` differ in length")
        if "all" in self.kind:
            raise ValueError('the kind "all" stands for all kinds together')


class Answers(msgspec.Struct, forbid_unknown_fields=True):
    """A row's answers to a batch.

    Attributes:
        answers: their texts.
        scores: from 0 to 1.
        kept: image tokens.
        same: whether the text equals the untouched model's.
        kl: KL divergence in nats of the untouched model's distribution of a token from the row's, the mean over the
            tokens of the untouched model's answer, each after the same tokens. None where it is no finite number, or
            that answer holds an image's placeholder.

    `same` and `kl` are None where files of older versions do not say.

    Raises:
        ValueError: not as many of one as of another.
    """

    answers: list[str]
    scores: list[Annotated[float, msgspec.Meta(ge=0, le=1)]]
    kept: list[Count]
    same: list[bool | None] = []
    kl: list[Amount | None] = []

    def __post_init__(self) -> None:
        self.same = self.same or [None] * len(self.answers)
        self.kl = self.kl or [None] * len(self.answers)
        if not len(self.answers) == len(self.scores) == len(self.kept) == len(self.same) == len(self.kl):
            raise ValueError("`answers`, `scores`, `kept`, `same` and `kl` differ in length")


class Line(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """A line after the first, with one of `examples`, `answers` and `cost`.

    Raises:
        ValueError: it has none of them, or several.
    """

    task: str
    start: Count
    row: str = ""
    examples: Examples | None = None
    answers: Answers | None = None
    cost: Cost | None = None

    def __post_init__(self) -> None:
        if (self.examples, self.answers, self.cost).count(None) != 2:
            raise ValueError("it needs one of `examples`, `answers` and `cost`, and no other of them")


@dataclass
class Results:
    """The contents of a result file.

    Attributes:
        header: describes the run.
        examples: by (task, start).
        answers: by row key, then by (task, start).
        costs: by row key, then by (task, index).
        asked: (task, index) of every example.
    """

    header: Header
    examples: dict[tuple[str, int], Examples] = field(default_factory=dict)
    answers: dict[str, dict[tuple[str, int], Answers]] = field(default_factory=dict)
    costs: dict[str, dict[tuple[str, int], Cost]] = field(default_factory=dict)
    asked: set[tuple[str, int]] = field(default_factory=set)

    def only(self, unmerge: Collection[str]) -> Results:
        """The same with the rows that unmerge in these ways, or in one that equals one of them, or have nothing to."""
        rows = [
            row
            for row in self.header.rows
            if row == UNTOUCHED or way_of(row) in {METHODS[row.method].unmerges(way, row.options) for way in unmerge}
        ]
        return replace(self, header=msgspec.structs.replace(self.header, rows=rows))

    def take(self, line: Line) -> None:
        """Add one line."""
        batch = (line.task, line.start)
        if line.examples is not None:
            self.examples[batch] = line.examples
            self.asked |= {(line.task, index) for index in line.examples.index}
        elif line.answers is not None:
            self.answers.setdefault(line.row, {})[batch] = line.answers
        elif line.cost is not None:
            self.costs.setdefault(line.row, {})[batch] = line.cost

    def misfit(self, line: Line) -> str | None:
        """Why a line cannot follow those that were added; None where it can."""
        batch = (line.task, line.start)
        if line.examples is not None:
            new, yes_no = line.examples, self.header.yes_no.get(line.task, [])
            if any(kind in yes_no and not texts for kind, texts in zip(new.kind, new.references, strict=True)):
                return "a question of yes or no has no reference"
            if batch in self.examples:
                return None if new == self.examples[batch] else "an earlier line holds other examples of this batch"
            if len({(line.task, index) for index in new.index} - self.asked) < len(new.index):
                return "it holds an example twice, or one of another batch"
        elif line.answers is not None:
            examples = self.examples.get(batch)
            if examples is None or len(examples.index) != len(line.answers.answers):
                return "no earlier line holds as many examples as it has answers"
        elif batch not in self.asked:
            return "no earlier line holds its example"
        return None

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read a result file, finished or not; an incomplete last line is left out.

        Raises:
            BadResults: it is none, or damaged: which line, which field, and why.
        """
        first, *others = lines_of(path) or [b""]
        other_version = f"{path} is no result file of this version of dymu evaluate"
        results = cls(decoded(first, Header, BadResults, other_version, "name one that it wrote."))
        for number, text in enumerate(others, 2):
            damaged, then = f"line {number} of {path} is damaged", "delete it, and dymu evaluate asks that batch again."
            line = decoded(text, Line, BadResults, damaged, then)
            if why := results.misfit(line):
                raise BadResults(f"{damaged} ({why}); {then}")
            results.take(line)
        return results


class ResultFile:
    """A result file that lines are appended to; a context, in which no other process may write it.

    Args:
        path: created if it does not exist; else continued.
        header: describes the run.

    Raises:
        BadResults: the file belongs to another run, or another process is writing it.
        BadOutput: it cannot be written.
    """

    def __init__(self, path: Path, header: Header) -> None:
        self._path, header = path, as_written(header)
        self._file = LineFile(path, "dymu evaluate")
        try:
            self._begin(header)
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.__exit__()

    def _begin(self, header: Header) -> None:
        """Continue what the file holds, or write the header."""
        if self._file.empty:
            self.results = Results(header)
            self._file.write(header)
            return
        self.results = Results.load(self._path)
        check_same_run(self._path, header, self.results.header, {*Header.__struct_fields__} - {*CHANGING})
        self._file.cut()

    def add(self, line: Line) -> None:
        """Append a line and make sure that it is on the disk.

        Raises:
            BadOutput: it cannot be written.
        """
        line = as_written(line)
        self._file.write(line)
        self.results.take(line)
