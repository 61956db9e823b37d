"""What commands print and write: results on stdout, notes and progress on stderr, whole files."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
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


def run_for_people(data: dict[str, Any]) -> Iterator[Any]:
    """What `dymu run` gives as JSON, as a table."""
    full = data.get("untouched")
    sides = [full, data] if full else [data]
    made = table("", *(["all tokens", "with DyMU"] if full else ["with DyMU"]), numbers=False)
    made.add_row("answer", *(Text(side["answer"]) for side in sides))
    made.add_row("image tokens", *(_kept(side) for side in sides))
    made.add_row("vision encoder", *(f"{side['encoder_ms']:.1f} ms" for side in sides))
    made.add_row("prefill", *(f"{side['prefill_ms']:.1f} ms" for side in sides))
    made.add_row("each token after", *(f"{side['decode_ms_per_token']:.1f} ms" for side in sides))
    made.add_row("KV cache", *(f"{side['cache_bytes'] / 2**10:,.0f} KiB" for side in sides))
    yield made
    yield ""
    repeats = data["repeats"]
    if full:
        yield (
            f"Encoder and prefill take {1 / data['speedup_encoder_prefill']:.2f} of the untouched "
            f"model's time ({_runs(repeats)}, taken in turn after a warm-up)."
        )
    else:
        yield f"Times: {_runs(repeats)}, after a warm-up."
    if "picture" in data:
        yield f"What merged is drawn in {data['picture']}"


def _runs(repeats: int) -> str:
    if repeats == 1:
        return "one run each, since they took long: on a busy machine that says little"
    return f"medians of {repeats} runs each"


def _kept(side: dict[str, Any]) -> str:
    kept, original = side["kept_tokens"], side["original_tokens"]
    return f"{kept} of {original} ({kept / original:.0%})"


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def thresholds_for_people(data: dict[str, Any]) -> Iterator[Any]:
    """What `dymu inspect` gives as JSON, as tables."""
    yield from facts(
        {
            "file": data["file"],
            "model": data["model"] or "not said",
            "encoder": _encoder_for_people(data["encoder"]),
            "an image has": f"{_number(data['image_tokens'])} tokens on average"
            if data["image_tokens"]
            else "one picture",
            "schedule": data["schedule"] or "not said",
            "merging in": "all layers" if data["merge_layers"] is None else f"layers {_list(data['merge_layers'])}",
            "found on": f"{data['images']} images ({len(data['skipped'])} skipped)"
            if data["images"] is not None
            else "not said",
            "made": f"{data['created'] or 'not said'}, by dymu {data['dymu'] or '(not said)'}",
        }
    )
    yield ""
    kept = table("budget", "kept on average", "sd", "least", "most", title="image tokens")
    for entry in data["budgets"]:
        seen = (entry[name] for name in ("achieved", "sd", "min", "max"))
        kept.add_row(_number(entry["budget"]), *(_number(value) for value in seen))
    yield kept
    yield ""
    yield "thresholds: the similarity above which tokens merge, first layer first, – for never"
    layers = table("budget", "", numbers=False)
    for entry in data["budgets"]:
        values = ("–" if value > 1 else f"{value:.3f}" for value in entry["thresholds"])
        layers.add_row(_number(entry["budget"]), "  ".join(values))
    yield layers
    if data["over_time"]:
        yield ""
        yield from over_time_for_people(data["over_time"])


def over_time_for_people(entries: Sequence[dict[str, Any]]) -> Iterator[Any]:
    """Similarities over time, as a table."""
    made = table("budget", "tokens per second", "kept", "similarity", "videos", "seconds", title="videos, over time")
    for entry in entries:
        numbers = {name: _number(value) for name, value in entry.items()}
        numbers["threshold"] = f"{entry['threshold']:.3f}"
        order = ("budget", "per_second", "achieved", "threshold", "videos", "seconds")
        made.add_row(*(numbers[name] for name in order))
    yield made


def _encoder_for_people(encoder: dict[str, Any] | None) -> str:
    if encoder is None:
        return "not said"
    return (
        "{model_type}: {layers} layers, of which {depth} are read; {hidden_size} wide, "
        "{heads} heads; {tokens} image tokens"
    ).format(**encoder)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}".rstrip("0").rstrip(".")


def facts(named: dict[str, str]) -> Iterator[Any]:
    """Names and what they are, below each other."""
    made = table("", "", numbers=False)
    made.show_header = False
    for name, value in named.items():
        made.add_row(name, Text(value))
    yield made
