"""A file of JSON lines with a header and a row for each image, which a job over many images appends to and goes on
with."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Generic, Protocol, Self, TypeVar

import msgspec

from dymu.files import decoded
from dymu.measure.lines import LineFile, as_written, lines_of
from dymu.measure.results import BadResults, check_same_run

CHANGING = ("date",)
"""Header fields that may differ between a run and its continuation."""


class _OfImage(Protocol):
    """A row, which names its image and may hold an error."""

    image: str
    error: str | None


Header = TypeVar("Header", bound=msgspec.Struct)
Row = TypeVar("Row", bound=_OfImage)


class RowFile(Generic[Header, Row]):
    """A file that rows are appended to; a context, in which no other process may write it.

    Args:
        path: created if it does not exist; else continued.
        header: what the rows depend on.
        row: the type of a row.
        program: what writes such files, for messages.

    Attributes:
        rows: by image; of those with an error a later row counts.

    Raises:
        BadResults: the file belongs to another run, is damaged, or another process is writing it.
        BadOutput: it cannot be written.
    """

    def __init__(self, path: Path, header: Header, row: type[Row], program: str) -> None:
        header = as_written(header)
        self.rows: dict[str, Row] = {}
        self._file = LineFile(path, program)
        try:
            if self._file.empty:
                self._file.write(header)
            else:
                before, self.rows = read_rows(path, type(header), row, program)
                check_same_run(path, header, before, {*header.__struct_fields__} - {*CHANGING})
                self._file.cut()
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.__exit__()

    def add(self, row: Row) -> None:
        """Append a row, and make sure that it is on the disk; one that is there, such as an error, is not repeated.

        Raises:
            BadOutput: it cannot be written.
        """
        record: Any = as_written(row)  # type: ignore[type-var]
        if self.rows.get(record.image) == record:
            return
        self._file.write(record)
        self.rows[record.image] = record


def read_rows(path: Path, header: type[Header], row: type[Row], program: str) -> tuple[Header, dict[str, Row]]:
    """The header and the rows by image; an incomplete last line is left out.

    Raises:
        BadResults: it is no such file, or damaged: which line, which field, and why.
    """
    first, *others = lines_of(path) or [b""]
    what = f"{path} is no file of this version of {program}"
    top = decoded(first, header, BadResults, what, "name one that it wrote.")
    rows: dict[str, Row] = {}
    for number, text in enumerate(others, 2):
        damaged = f"line {number} of {path} is damaged"
        one = decoded(text, row, BadResults, damaged, f"delete it, and {program} asks for that image again.")
        if one.image in rows and rows[one.image].error is None:
            raise BadResults(f"{damaged} (an earlier line is of the same image, {one.image}); delete one of them.")
        rows[one.image] = one
    return top, rows
