"""`dymu stats`: what many pictures keep at several budgets, as a page."""

import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

import dymu
from dymu.cli import errors, models
from dymu.cli.app import (
    MEASURE,
    Debug,
    Device,
    Dtype,
    Json,
    ModelOrDemo,
    Revision,
    ThresholdsName,
    app_command,
    parse_budget,
    quieten_transformers,
)
from dymu.cli.calibrate import existing, image_files
from dymu.cli.output import Output, check_writable, table, write_text
from dymu.files import escaped, expanded

BUDGETS = 3
"""Where none are named: each costs a pass of the encoder, for 2,000 small pictures some 4 minutes of one core."""
SHOWN = 6
"""Simplest pictures on the page, and as many of the most complex ones."""
FAILURES = 5
"""Of pictures that could not be read, so many are named on the terminal; the page names more."""


@app_command(MEASURE, "dymu stats photos/ -o stats.html -b 48 -b 96")
def stats(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGES", help="Folders of images, or images.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="PAGE.html", help="The page to write.")],
    model: ModelOrDemo = None,
    thresholds: ThresholdsName = None,
    budget: Annotated[
        list[float] | None,
        typer.Option("--budget", "-b", metavar="N|0.15", parser=parse_budget,
                     show_default=f"{BUDGETS} of those calibrated",
                     help="Image tokens to keep on average: a number, or a fraction of all. Give several."),
    ] = None,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Images at a time.")] = 8,
    device: Device = None,
    dtype: Dtype = None,
    revision: Revision = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Tell how many image tokens pictures keep, what that costs, and which are simple or complex, on one HTML page.

    Only the encoder runs. Counts are written beside the page, into a .jsonl of its name, and a run that was stopped
    goes on where it was.
    """
    out = Output(as_json)
    check_writable(output, "the page", (".html", ".htm"))
    counts = expanded(output).with_suffix(".jsonl")
    check_writable(counts, "the counts", (".jsonl",))
    named_paths = existing(images, "image", dymu.BadImage)
    files = list(dict.fromkeys(file.absolute() for path in named_paths for file in image_files(out, path)))
    named = models.named(model or models.demo_model(), revision)
    calibrated = named.thresholds(thresholds)
    budgets = sorted({calibrated.tokens_for(one) for one in budget or models.some_budgets(calibrated, BUDGETS)})
    with out.during("loading torch and transformers"):
        quieten_transformers()
        from dymu.captioning.sources import Source
        from dymu.measure.provenance import device_name
        from dymu.survey.page import Made, page
        from dymu.survey.run import Counter, survey
        from dymu.survey.summary import Summary
    with out.during(f"loading {named.name}"):
        loaded = models.load(named, device, dtype)
    names = _names(files)
    sources = [Source(name, file) for name, file in zip(names, files, strict=True)]
    with dymu.apply(loaded.model, calibrated, budget=budgets[0]) as handle:
        counter = Counter(loaded.model, loaded.processor, handle, calibrated, budgets)
        header = counter.header([str(path.resolve()) for path in named_paths])
        rows = survey(counter, header, sources, counts, batch_size=batch_size)
        failed = [row for row in rows if row.error is not None]
        for row in failed[:FAILURES]:
            printed = "".join(letter if letter.isprintable() else f"\\x{ord(letter):02x}" for letter in row.error or "")
            out.note(f"not counted: {printed}")
        if len(failed) == len(rows):
            raise errors.BadInput(f"none of the {len(rows)} images could be read: {counts} says why.")
        summary = Summary.of(rows, budgets)
        paths = dict(zip(names, files, strict=True))
        with out.during("drawing"):
            simplest, most_complex = (
                counter.thumbnails([(row, paths[row.image]) for row in some], summary.shown)
                for some in summary.extremes(SHOWN)
            )
    facts = {
        "model": escaped(header.model) or named.name,
        "weights": f"{header.weights}, {header.dtype}",
        "thresholds": f"{calibrated.source} ({header.thresholds})",
        "budgets": ", ".join(f"{one:g}" for one in budgets),
        "pictures": ", ".join(header.sources),
        "counts": str(counts),
        "date": header.date,
        "device": device_name(loaded.model.device),
        "versions": ", ".join(f"{name} {number}" for name, number in header.versions.items()),
    }
    command = shlex.join(["dymu", *map(escaped, sys.argv[1:])])
    made = Made(command, {name: escaped(text) for name, text in facts.items()})
    write_text(output, page(summary, simplest, most_complex, made))
    data = {"page": str(output), "counts": str(counts), "model": named.name, **summary.data()}
    out.result(data, lambda: _for_people(data))
    out.wrote(output)


def _names(files: Sequence[Path]) -> list[str]:
    """What tells the files apart, from the folder on that holds all of them."""
    folders = {str(file.parent) for file in files}
    try:
        common = os.path.commonpath(folders)
    except ValueError:  # on several drives
        return [escaped(str(file)) for file in files]
    return [escaped(os.path.relpath(file, common)) for file in files]


def _for_people(data: dict[str, Any]) -> Iterator[Any]:
    printed = table("budget", "mean", "sd", "95 % at most", "all pictures", "of untouched", "within reserve")
    full = data["untouched"]
    for name, row in [*((f"{one['budget']:g}", one) for one in data["budgets"]), ("untouched", full)]:
        told = row.get("forecast")
        covered = f"{told['within_reserve']['value']:.1%}" if told else "–"
        printed.add_row(
            name, f"{row['mean']:,.1f}", f"{row['sd']:,.1f}", f"{row['quantile_95']:,.0f}", f"{row['total']:,}",
            f"{row['total'] / full['total']:.1%}", covered,
        )  # fmt: skip
    yield printed
    yield ""
    read = f"{data['images'] - data['failed']:,} of {data['images']:,} pictures"
    yield read + (f"; {data['failed']:,} could not be read" if data["failed"] else "")
