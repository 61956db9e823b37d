"""What commands print and write: results on stdout, notes and progress on stderr, whole files."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dymu.cli.errors import BadOutput
from dymu.files import expanded, target_of, whole_file
from dymu.measure.markdown import cells

NARROWEST = 40
"""Columns of a terminal that tables need; a narrower one wraps their lines."""


class Output:
    """Prints for a person, or as one JSON object when `as_json`."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self._out = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
        self._err = Console(highlight=False, markup=False, emoji=False, soft_wrap=True, stderr=True)
        for console in (self._out, self._err):
            console.width = max(console.width, NARROWEST)

    def result(self, data: dict[str, Any], for_people: Callable[[], Iterable[Any]]) -> None:
        """The command's answer: `data` as the last line of stdout, or what `for_people` gives."""
        if self.as_json:
            print(json.dumps(data), flush=True)
        else:
            for part in for_people():
                self._out.print(part)

    def markdown(self, pages: Iterable[str], numbers: bool = True) -> Iterable[Any]:
        """Pages with tables, drawn where stdout is a terminal and as they are where it is a file; see `table`."""
        if not self._out.is_terminal:
            return pages
        blocks = (block for page in pages for block in page.split("\n\n"))
        return [part for block in blocks for part in (*_drawn(block, self._out.width, numbers), "")]

    def wrote(self, path: Path) -> None:
        """Name a file that was written."""
        self._err.print(f"wrote {path}", style="dim")

    def note(self, text: str) -> None:
        """Something worth knowing that is not the answer."""
        self._err.print(f"note: {text}", style="dim")

    @contextmanager
    def during(self, text: str) -> Iterator[None]:
        """A spinner while something takes long; nothing where stderr is no terminal."""
        with self._err.status(Text(text)):
            yield


def _drawn(block: str, width: int, numbers: bool) -> Iterator[Any]:
    """A paragraph of Markdown for a terminal; a table that is wider than that is cut into several."""
    if not block.startswith("|"):
        yield block.removeprefix("<sub>").removesuffix("</sub>").strip("*")
        return
    header, _, *lines = (cells(line) for line in block.split("\n"))
    widths = [max(map(len, column)) + 2 for column in zip(header, *lines, strict=True)]
    parts: list[list[int]] = []
    for index in range(1, len(header)):
        if not parts or sum(widths[i] for i in (0, *parts[-1], index)) > width:
            parts.append([])
        parts[-1].append(index)
    for number, part in enumerate(parts):
        if number:
            yield ""
        drawn = table(*(header[i] for i in (0, *part)), numbers=numbers)
        for line in lines:
            drawn.add_row(*(line[i] for i in (0, *part)))
        yield drawn


def table(*columns: str, title: str | None = None, numbers: bool = True) -> Table:
    """An empty table: the first column names the rows, the others hold numbers or words."""
    empty = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        justify: Any = "right" if numbers and index else "left"
        empty.add_column(column, justify=justify, style="" if index else "bold", overflow="fold")
    return empty


def facts(named: dict[str, str]) -> Iterator[Any]:
    """Names and what they are, below each other."""
    printed = table("", "", numbers=False)
    printed.show_header = False
    for pair in named.items():
        printed.add_row(*pair)
    yield printed


def check_writable(path: Path, what: str, extensions: tuple[str, ...]) -> None:
    """Refuse, before any long work, a path that could not be written in the end."""
    path = expanded(path)
    if path.name.lower() in extensions:
        raise BadOutput(
            f"{path} is an ending without a name: name the file for {what}, such as {what.split()[-1]}{path.name}."
        )
    if path.suffix.lower() not in extensions:
        raise BadOutput(
            f"{path} does not end in {' or '.join(extensions)}, which says how to write {what}: give it such a name."
        )
    target_of(path)
    if not path.parent.is_dir():
        raise BadOutput(f"{path.parent} is not a folder, so {path.name} cannot be written: make it.")
    if not os.access(path.parent, os.W_OK):
        raise BadOutput(f"{path.parent} may not be written to: name another place for {what}.")


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` fill the file; half a file is never seen.

    Raises:
        BadOutput: it could not be written.
    """
    with whole_file(path) as partial:
        write(partial)


def write_text(path: Path, text: str) -> None:
    """The same of text."""
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def run_for_people(data: dict[str, Any]) -> Iterator[Any]:
    """What `dymu run` gives as JSON, as a table."""
    compared = "untouched" in data
    sides = [data["untouched"], data] if compared else [data]
    printed = table("", *(["all tokens"] if compared else []), "with DyMU", numbers=False)
    printed.add_row("answer", *(side["answer"] for side in sides))
    shares = (side["kept_tokens"] / side["original_tokens"] for side in sides)
    counts = (f"{side['kept_tokens']} of {side['original_tokens']}" for side in sides)
    printed.add_row("image tokens", *(f"{count} ({share:.0%})" for count, share in zip(counts, shares, strict=True)))
    if "repeats" in data:
        for name, key in {
            "vision encoder": "encoder_ms",
            "prefill": "prefill_ms",
            "each token after": "decode_ms_per_token",
        }.items():
            printed.add_row(name, *(f"{side[key]:.1f} ms" for side in sides))
    stored = (side["cache_bytes"] for side in sides)
    printed.add_row("KV cache", *("none" if number is None else f"{number / 2**10:,.0f} KiB" for number in stored))
    yield from (printed, "")
    if "repeats" in data:
        runs = f"medians of {data['repeats']} runs each"
        if data["repeats"] == 1:
            runs = "one run each, since they took long: on a busy machine that says little"
        if compared:
            yield (
                f"Encoder and prefill take {data['time_to_first_token_ratio']:.2f} of the untouched "
                f"model's time ({runs}, taken in turn after a warm-up)."
            )
        else:
            yield f"Times: {runs}, after a warm-up."
    if "picture" in data:
        yield f"What merged is drawn in {data['picture']}"


def thresholds_data(thresholds: Any) -> dict[str, Any]:
    """What a thresholds file holds, as JSON."""
    data: dict[str, Any] = msgspec.to_builtins(thresholds)
    data["budgets"] = data.pop("calibrated")
    return data


def thresholds_for_people(data: dict[str, Any]) -> Iterator[Any]:
    """What `dymu inspect` gives as JSON, as tables."""
    encoder, tokens, layers = data["encoder"], data["image_tokens"], data["merge_layers"]
    about_encoder = (
        "{model_type}: {layers} layers, of which {depth} are read; {hidden_size} wide, {heads} heads; "
        "{tokens} image tokens"
    )
    yield from facts(
        {
            "file": data["file"],
            "model": data["model"] or "not said",
            "encoder": about_encoder.format(**encoder) if encoder else "not said",
            "an image has": f"{_number(tokens)} tokens on average" if tokens else "one picture",
            "schedule": data["schedule"] or "not said",
            "merging in": "all layers" if layers is None else f"layers {', '.join(map(str, layers))}",
            "calibrated on": "not said"
            if data["images"] is None
            else f"{data['images']} images ({len(data['skipped'])} skipped)",
            "forecasts": _about_forecasts(data["forecasts"]),
            "created": f"{data['created'] or 'not said'}, by dymu {data['dymu'] or '(not said)'}",
        }
    )
    yield ""
    yield _numbers_table(
        "image tokens",
        {"budget": "budget", "achieved": "kept on average", "sd": "sd", "min": "least", "max": "most"},
        data["budgets"],
    )
    yield ""
    yield "thresholds: the similarity above which tokens merge, first layer first, – for never"
    per_layer = table("budget", "", numbers=False)
    for entry in data["budgets"]:
        values = ("–" if value > 1 else f"{value:.3f}" for value in entry["thresholds"])
        per_layer.add_row(_number(entry["budget"]), "  ".join(values))
    yield per_layer
    if data["over_time"]:
        yield ""
        yield from over_time_for_people(data["over_time"])


def _about_forecasts(forecasts: dict[str, Any] | None) -> str:
    """How well the counts of images left out of the fit were told, in words."""
    if forecasts is None:
        return "none"
    known = [entry["r2"] for entry in forecasts["budgets"] if entry["r2"] is not None]
    return f"R² {min(known):.2f} to {max(known):.2f} on images left out" if known else "every image keeps all"


def over_time_for_people(entries: Sequence[dict[str, Any]]) -> Iterator[Any]:
    """Similarities over time, as a table."""
    names = {"budget": "budget", "per_second": "tokens per second", "achieved": "kept", "threshold": "similarity"}
    yield _numbers_table("videos, over time", {**names, "videos": "videos", "seconds": "seconds"}, entries)


def _numbers_table(title: str, columns: dict[str, str], entries: Sequence[dict[str, Any]]) -> Table:
    """One row for each entry; `columns` are its fields and their headings."""
    filled = table(*columns.values(), title=title)
    for entry in entries:
        numbers = (f"{entry[name]:.3f}" if name == "threshold" else _number(entry[name]) for name in columns)
        filled.add_row(*numbers)
    return filled


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}".rstrip("0").rstrip(".")
