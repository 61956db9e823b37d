"""The file of captions: a header, and a line for each image, appended as they come."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from dymu.files import Count
from dymu.measure.rows import RowFile, read_rows

FORMAT: Literal[1] = 1
PROGRAM = "dymu caption"


class Header(msgspec.Struct, forbid_unknown_fields=True):
    """The first line: what the captions depend on.

    Attributes:
        source: the folder or the list of the images.
        weights, thresholds, processor: hashes.
        budget: image tokens on average, or of every image; None: the model was untouched.
        at_most, exactly, focus, guard: see `dymu.apply`.
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
    at_most: float | None = None
    exactly: float | None = None
    focus: str | None = None
    guard: str | None = None


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


class CaptionFile(RowFile[Header, Row]):
    """A file of captions, see `RowFile`; images whose row has an error are asked for again."""

    def __init__(self, path: Path, header: Header) -> None:
        super().__init__(path, header, Row, PROGRAM)


def read(path: Path) -> tuple[Header, dict[str, Row]]:
    """The header and the rows by image, see `read_rows`."""
    return read_rows(path, Header, Row, PROGRAM)
