"""The file of captions: a header, and a line for each image, appended as they come."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

import msgspec

from dymu.files import Count, decoded
from dymu.measure.lines import LineFile, as_written, lines_of
from dymu.measure.results import BadResults, check_same_run

FORMAT: Literal[1] = 1
CHANGING = ("date",)
"""Header fields that may differ between a run and its continuation."""


class Header(msgspec.Struct, forbid_unknown_fields=True):
    """The first line: what the captions depend on.

    Attributes:
        source: the folder or the list of the images.
        weights, thresholds, processor: hashes.
        budget: image tokens; None: the model was untouched.
    """

    dymu_captions: Literal[1]
    date: str
    source: str
    model: str
    weights: str
    dtype: str
    processor: str
    thresholds: str
    budget: float | None
    unmerge: str
    prompt: str
    max_new_tokens: Count
    versions: dict[str, str]
    cache: str = "merged"


class Row(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """The line of an image; where one has an error, a later line of the same image counts.

    Attributes:
        image: as it was named: a file of the folder, or what the list says.
        caption: what the model said.
        original, kept: its tokens, and those that are left.
        error: why there is no caption.

    Raises:
        ValueError: neither a caption nor an error, or both.
    """

    image: str
    caption: str | None = None
    original: Count | None = None
    kept: Count | None = None
    error: str | None = None

    def __post_init__(self) -> None:
        if (self.caption is None) == (self.error is None):
            raise ValueError("it needs a `caption` or an `error`")


class CaptionFile:
    """A file of captions that rows are appended to; a context, in which no other process may write it.

    Args:
        path: created if it does not exist; else continued.

    Attributes:
        rows: by image; those with an error are asked for again.

    Raises:
        BadResults: the file belongs to another run, is damaged, or another process is writing it.
        BadOutput: it cannot be written.
    """

    def __init__(self, path: Path, header: Header) -> None:
        header = as_written(header)
        self.rows: dict[str, Row] = {}
        self._file = LineFile(path, "dymu caption")
        try:
            if self._file.empty:
                self._file.write(header)
            else:
                before, self.rows = read(path)
                check_same_run(path, header, before, {*Header.__struct_fields__} - {*CHANGING})
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
        row = as_written(row)
        if self.rows.get(row.image) == row:
            return
        self._file.write(row)
        self.rows[row.image] = row


def read(path: Path) -> tuple[Header, dict[str, Row]]:
    """The header and the rows by image; an incomplete last line is left out.

    Raises:
        BadResults: it is no file of captions, or damaged: which line, which field, and why.
    """
    first, *others = lines_of(path) or [b""]
    what = f"{path} is no file of captions of this version of dymu caption"
    header = decoded(first, Header, BadResults, what, "name one that it wrote.")
    rows: dict[str, Row] = {}
    for number, text in enumerate(others, 2):
        damaged = f"line {number} of {path} is damaged"
        row = decoded(text, Row, BadResults, damaged, "delete it, and dymu caption asks for that image again.")
        if row.image in rows and rows[row.image].error is None:
            raise BadResults(f"{damaged} (an earlier line is of the same image, {row.image}); delete one of them.")
        rows[row.image] = row
    return header, rows
