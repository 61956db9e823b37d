"""A result file: one JSON object, written anew and whole after every cell: a killed run loses one cell at most."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from dymu.errors import DymuError

FORMAT = 1
SAME = ("model", "device", "dtype", "seed", "versions", "variants", "answer_tokens")
"""What a run and its continuation must agree in."""
PLACE = ("layout", "batch", "budget", "kept")
NEEDED = (*SAME, "full_tokens", "checks", "cells", "date", "command")


class BadBench(DymuError):
    """A file that `dymu bench` did not write, or that belongs to another run."""


class BenchFile:
    """The result file of one run.

    Args:
        path: made if it does not exist; else continued.
        header: what is measured, without `cells`.

    Raises:
        BadBench: the file belongs to another run, or is none.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self._path = path
        self.body: dict[str, Any] = json.loads(json.dumps({"dymu_bench": FORMAT, **header, "cells": []}))
        if path.exists():
            before = load(path)
            differing = [name for name in SAME if before[name] != self.body[name]]
            if differing:
                raise BadBench(
                    f"{path} belongs to another run, which differs in {', '.join(differing)}: name another file with "
                    "-o, or delete it."
                )
            self.body["cells"] = [cell for cell in before["cells"] if not cell.get("left_out")]

    def has(self, **place: Any) -> bool:
        """Whether the cell at this budget, batch and layout was measured."""
        return any(all(cell[name] == value for name, value in place.items()) for cell in self.body["cells"])

    def add(self, cell: dict[str, Any]) -> None:
        """Add a cell and write the file, whole or not at all."""
        self.body["cells"].append(json.loads(json.dumps(cell)))
        part = self._path.with_name(f".{self._path.name}.{os.getpid()}.part")
        try:
            part.write_text(json.dumps(self.body, indent=1) + "\n", encoding="utf-8")
            part.replace(self._path)
        finally:
            part.unlink(missing_ok=True)


def load(path: Path) -> dict[str, Any]:
    """What a result file holds, finished or not.

    Raises:
        BadBench: it is none.
    """
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadBench(f"{path} cannot be read ({error.strerror}): check its name.") from error
    except ValueError as error:
        raise BadBench(f"{path} is no result file: it is no JSON; name one that dymu bench wrote.") from error
    if not isinstance(body, dict) or body.get("dymu_bench") != FORMAT or not set(NEEDED) <= set(body):
        raise BadBench(f"{path} is no result file of this version of dymu bench; name one that it wrote.")
    for number, cell in enumerate(body["cells"], 1):
        if not set(PLACE) <= set(cell) or not {"left_out", "variants"} & set(cell):
            raise BadBench(f"cell {number} of {path} is damaged; delete it there, and dymu bench measures it anew.")
    return body
