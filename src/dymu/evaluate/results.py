"""A result file: one JSON object per line, appended as they are found, so that a killed run loses one batch at most.

The first line says what was run. Each further line holds one batch: its examples, or what one row answered to them, or
what one example cost a row.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dymu.errors import DymuError

FORMAT = 1
CHANGING = ("date",)
"""What may differ between a run and its continuation."""


class BadResults(DymuError):
    """A result file that cannot be read, or that belongs to another run."""


@dataclass
class Results:
    """What a result file holds so far.

    Attributes:
        header: what was run.
        examples: (task, start) -> kinds, references, measures, or why an example was skipped.
        answers: row key -> (task, start) -> answers, scores, kept.
        costs: row key -> (task, index) -> milliseconds, FLOPs, bytes.
    """

    header: dict[str, Any]
    examples: dict[tuple[str, int], dict[str, list[Any]]] = field(default_factory=dict)
    answers: dict[str, dict[tuple[str, int], dict[str, list[Any]]]] = field(default_factory=dict)
    costs: dict[str, dict[tuple[str, int], dict[str, float]]] = field(default_factory=dict)

    def take(self, line: dict[str, Any]) -> None:
        """Add one line."""
        place = (line["task"], line["start"])
        if "examples" in line:
            self.examples[place] = line["examples"]
        elif "answers" in line:
            self.answers.setdefault(line["row"], {})[place] = line["answers"]
        else:
            self.costs.setdefault(line["row"], {})[place] = line["cost"]

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read a result file, finished or not.

        Raises:
            BadResults: it is none.
        """
        lines = list(_whole_lines(path))
        if not lines or lines[0].get("dymu_results") != FORMAT or not {"rows", "tasks", "yes_no"} <= set(lines[0]):
            raise BadResults(f"{path} is no result file of this version of dymu evaluate; name one that it wrote.")
        results = cls(lines[0])
        try:
            for line in lines[1:]:
                results.take(line)
        except (KeyError, TypeError) as error:
            raise BadResults(f"{path} holds a line that dymu evaluate never writes ({error}).") from error
        return results


class ResultFile:
    """A result file open for appending. Use as a context manager.

    Args:
        path: made if it does not exist; else continued.
        header: what is run.

    Raises:
        BadResults: the file belongs to another run.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        header = json.loads(json.dumps({"dymu_results": FORMAT, **header}))
        self._path = path
        if path.exists() and path.stat().st_size:
            self.results = Results.load(path)
            differing = [
                name
                for name in {**header, **self.results.header}
                if name not in CHANGING and header.get(name) != self.results.header.get(name)
            ]
            if differing:
                raise BadResults(
                    f"{path} belongs to another run, which differs in {', '.join(sorted(differing))}: "
                    "name another file with -o, or delete it."
                )
            _cut_torn_line(path)
            self._stream = path.open("a", encoding="utf-8")
        else:
            self.results = Results(header)
            self._stream = path.open("a", encoding="utf-8")
            self._write(header)

    def add(self, line: dict[str, Any]) -> None:
        """Append a line and make sure that it is on the disk."""
        self._write(line)
        self.results.take(json.loads(json.dumps(line)))

    def __enter__(self) -> ResultFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def _write(self, line: dict[str, Any]) -> None:
        self._stream.write(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n")
        self._stream.flush()
        os.fsync(self._stream.fileno())


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file, without one at the end that a killed run left torn."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise BadResults(f"{path} cannot be read ({error.strerror}): check its name.") from error
    for number, line in enumerate(text.split("\n")[:-1], 1):
        try:
            read = json.loads(line)
        except ValueError as error:
            raise BadResults(f"{path} is no result file, or damaged: line {number} is no JSON.") from error
        if not isinstance(read, dict):
            raise BadResults(f"{path} is no result file: line {number} is no object.")
        yield read


def _cut_torn_line(path: Path) -> None:
    with path.open("rb+") as stream:
        whole = stream.read().rfind(b"\n") + 1
        stream.truncate(whole)
