"""Which images are to be captioned: those of a folder, or of a list."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dymu.errors import BadImage
from dymu.files import escaped, expanded, first_line
from dymu.media.images import in_folder

LISTS = (".jsonl", ".parquet")


@dataclass(frozen=True)
class Source:
    """An image: its name in the file of captions, and its path."""

    name: str
    path: Path


def sources_in(named: Path) -> tuple[list[Source], str]:
    """The images of a folder in the order of their names, or of a list in its order; and what was left out, in words.

    A list is a `.jsonl` or `.parquet` file whose rows have a field `image` with a path, from the list's folder on.

    Raises:
        BadImage: it is neither, cannot be read, holds none, or one twice.
    """
    path = expanded(named)
    if path.is_dir():
        files, left_out = in_folder(path)
        return [Source(escaped(file.name), file) for file in files], left_out
    if path.suffix.lower() not in LISTS or not path.is_file():
        raise BadImage(f"{named} is neither a folder of images nor a list of them ({' or '.join(LISTS)}): name one.")
    paths = [_image_of(row, number, named) for number, row in enumerate(_rows(path, named), 1)]
    names = [escaped(image) for image in paths]
    if not names:
        raise BadImage(f"{named} has no rows: name a list of images.")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise BadImage(f"{named} names {twice} twice: leave one out, since captions are told apart by these names.")
    return [Source(name, path.parent / image) for name, image in zip(names, paths, strict=True)], ""


def _rows(path: Path, named: Path) -> list[Any]:
    try:
        if path.suffix.lower() == ".jsonl":
            return [json.loads(line) for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
        from pyarrow import parquet

        return [{"image": value} for value in parquet.read_table(path, columns=["image"])["image"].to_pylist()]
    except ImportError as error:
        raise BadImage(f"{named} is read by pyarrow, which is not installed: `pip install pyarrow`.") from error
    except Exception as error:  # pyarrow raises its own
        raise BadImage(f"{named} cannot be read ({first_line(error)}): give rows with a field `image`.") from error


def _image_of(row: Any, number: int, named: Path) -> str:
    image = row.get("image") if isinstance(row, dict) else None
    if not isinstance(image, str) or not image:
        raise BadImage(f"row {number} of {named} has no path in a field `image`: write one.")
    return image
