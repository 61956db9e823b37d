"""Result files: continued by the run that they belong to, refused by any other."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from dymu.errors import DymuError
from dymu.files import expanded, first_line, next_step, shortened

Number = int | float


class BadResults(DymuError):
    """A result file that cannot be read, or that belongs to another run."""


def check_same_run(path: Path, header: msgspec.Struct, before: msgspec.Struct, names: Iterable[str]) -> None:
    """Raises: BadResults, unless the record of a run and that of the file agree in all of these fields."""
    pairs = {name: (getattr(before, name), getattr(header, name)) for name in sorted(names)}
    differing = [_difference(name, *pair) for name, pair in pairs.items() if pair[0] != pair[1]]
    if differing:
        raise BadResults(
            f"{path} belongs to another run, which differs in {', '.join(differing)}: name another file with -o, or "
            "delete it."
        )


def _difference(name: str, before: Any, now: Any) -> str:
    """The name of a field, and of one that holds versions which of them differ."""
    if name != "versions":
        return name
    changed = (key for key in sorted({*before, *now}) if before.get(key) != now.get(key))
    return f"versions ({', '.join(f'{key} {before.get(key)}, now {now.get(key)}' for key in changed)})"


def read_bytes(path: Path) -> bytes:
    """The bytes of a result file, whose name may begin with `~/`.

    Raises:
        BadResults: it cannot be read.
    """
    file = expanded(path)
    try:
        if file.exists() and not file.is_file():
            raise BadResults(f"{path} is a folder, a device or a pipe: name a result file.")
        return file.read_bytes()
    except (OSError, ValueError) as error:
        raise BadResults(f"{shortened(path)} cannot be read ({first_line(error)}): {next_step(error)}.") from error
