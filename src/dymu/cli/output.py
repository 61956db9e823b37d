"""What commands print and write: results on stdout, notes and progress on stderr, whole files."""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dymu.cli.errors import BadOutput


class Output:
    """Prints for a person, or as one JSON object when `as_json`."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self._out = Console(highlight=False, soft_wrap=True)
        self._err = Console(stderr=True, highlight=False, soft_wrap=True)

    def result(self, data: dict[str, Any], for_people: Callable[[], Iterable[Any]]) -> None:
        """The command's answer: `data` as the last line of stdout, or what `for_people` gives."""
        if self.as_json:
            print(json.dumps(data), flush=True)
        else:
            for part in for_people():
                self._out.print(part if not isinstance(part, str) else Text(part))

    def note(self, text: str) -> None:
        """Something worth knowing that is not the answer."""
        self._err.print(Text(f"note: {text}", style="dim"))

    @contextmanager
    def step(self, text: str) -> Iterator[None]:
        """A spinner while something takes long; nothing where stderr is no terminal."""
        with self._err.status(Text(text)):
            yield


def table(*columns: str, title: str | None = None, numbers: bool = True) -> Table:
    """An empty table: the first column names the rows, the others hold numbers or words."""
    made = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        names_rows = index == 0
        made.add_column(
            column,
            justify="right" if numbers and not names_rows else "left",
            style="bold" if names_rows else "",
        )
    return made


def check_writable(path: Path, what: str, extensions: tuple[str, ...]) -> None:
    """Refuse, before any long work, a place that could not be written in the end."""
    if path.suffix.lower() not in extensions:
        raise BadOutput(
            f"{path} does not end in {' or '.join(extensions)}, which says how to write {what}: give it such a name."
        )
    if path.is_dir():
        raise BadOutput(f"{path} is a folder: name the file for {what}.")
    if not path.parent.is_dir():
        raise BadOutput(f"{path.parent} is not a folder, so {path.name} cannot be written: make it.")
    if not os.access(path.parent, os.W_OK):
        raise BadOutput(f"{path.parent} may not be written to: name another place for {what}.")


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Have `write` fill a file beside `path`, then move it there: half a file is never seen."""
    partial = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write(partial)
        os.replace(partial, path)
    except OSError as error:
        raise BadOutput(f"{path} could not be written ({error.strerror or error}).") from error
    finally:
        partial.unlink(missing_ok=True)
