"""`dymu forecast`: how many image tokens pictures will keep, told before any encoder runs."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

import dymu
from dymu.cli import models
from dymu.cli.app import (
    FIND,
    Debug,
    Json,
    Revision,
    ThresholdsName,
    app_command,
    parse_budget,
    quieten_transformers,
)
from dymu.cli.calibrate import existing, image_files
from dymu.cli.errors import BadInput
from dymu.cli.output import Output, table
from dymu.thresholds import Thresholds

NUMBERS = ("expected", "reserve", "least", "most")


@app_command(FIND, "dymu forecast photos/ --thresholds models/demo -b 77")
def forecast(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGES", help="Images, or folders of them.")],
    thresholds: ThresholdsName = None,
    budget: Annotated[
        float | None,
        typer.Option("--budget", "-b", metavar="N|0.15", parser=parse_budget,
                     show_default="the only one in the thresholds file",
                     help="Image tokens kept on average: a number, or a fraction of all."),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, show_default=False,
                     help="Of each of these images with nothing merged, for models whose images differ in it."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="PATH|ID", show_default=False,
                     help="A model's folder or hub name. Only its processor is loaded, and only where images differ in "
                     "how many tokens they have, to count them."),
    ] = None,
    revision: Revision = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Tell how many image tokens pictures will keep, from their pixels, without running the model."""
    out = Output(as_json)
    if tokens is not None and model is not None:
        raise typer.BadParameter("--tokens is a number and --model counts: give one of them.")
    files = [file for named in existing(images, "image", dymu.BadImage) for file in image_files(out, named)]
    named = None if model is None else models.named(model, revision)
    if named is not None:
        calibrated = named.thresholds(thresholds)
    elif thresholds is not None:
        calibrated = Thresholds.load(thresholds)
    else:
        raise typer.BadParameter("name a thresholds file with --thresholds, or the --model that ships one.")
    counter = _counter(out, calibrated, named, tokens)
    rows, skipped = _told(calibrated, files, budget, counter)
    for each in skipped:
        out.note(f"skipped: {each['image']} {each['why']}")
    if not rows:
        raise BadInput(f"none of the {len(files)} images could be read: {skipped[0]['image']} {skipped[0]['why']}")
    total = {name: sum(row[name] for row in rows) for name in NUMBERS}
    data = {"budget": calibrated.tokens_for(budget), "images": rows, "skipped": skipped, "total": total}
    out.result(data, lambda: _for_people(rows, total))


def _counter(out: Output, calibrated: Thresholds, named: models.Named | None, tokens: int | None) -> Any:
    """What says how many tokens an image has with nothing merged: the number, the model's processor, or nothing.

    Raises:
        BadInput: it is needed and was not given.
    """
    if tokens is not None or calibrated.image_tokens is None:
        return tokens
    if named is None:
        raise BadInput(
            f"by {calibrated} images differ in how many tokens they have: give --tokens, or the --model, whose "
            "processor counts them."
        )
    with out.during(f"loading the processor of {named.name}"):
        quieten_transformers()
        return models.processor(named)


def _told(
    calibrated: Thresholds, files: Sequence[Path], budget: float | None, counter: Any
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """One row for each image that can be read, and those that cannot, with why."""
    from dymu.measure.progress import Bar

    rows: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    with Bar(len(files) > 1) as bar:
        task = bar.add_task("looking at images", total=len(files))
        for file in files:
            try:
                rows.append(
                    {"file": str(file), **msgspec.to_builtins(calibrated.forecast(file, budget, tokens=counter))}
                )
            except dymu.BadImage as error:
                skipped.append({"image": str(file), "why": str(error).removeprefix(f"{file} ")})
            bar.advance(task)
    return rows, skipped


def _for_people(rows: Sequence[dict[str, Any]], total: dict[str, float]) -> Iterator[Any]:
    printed = table("image", *NUMBERS)
    for name, row in [(row["file"], row) for row in rows] + [("total", total)] * (len(rows) > 1):
        printed.add_row(name, f"{row['expected']:,.1f}", *(f"{row[number]:,}" for number in NUMBERS[1:]))
    yield printed
    yield ""
    yield "reserve: enough for 95 of 100 pictures like those of calibration"
