"""`dymu draw`: what merges in pictures, at several budgets or layer by layer, on one sheet."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

import dymu
from dymu.cli import errors, models
from dymu.cli.app import (
    PICTURES,
    RUN,
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
from dymu.cli.output import Output, check_writable, table, write_whole
from dymu.files import expanded
from dymu.thresholds import Thresholds

COLUMNS = 4
"""Budgets where none are named."""


@app_command(RUN, "dymu draw examples/photo.jpg examples/scene.png -o sheet.png")
def draw(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGES", help="Images, or folders of them.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="SHEET.png", help="The picture to write.")],
    model: ModelOrDemo = None,
    thresholds: ThresholdsName = None,
    budget: Annotated[
        list[float] | None,
        typer.Option("--budget", "-b", metavar="N|0.15", parser=parse_budget,
                     show_default=f"{COLUMNS} of those calibrated, or one with --layers",
                     help="Image tokens to keep on average: a number, or a fraction of all. Give several."),
    ] = None,
    layers: Annotated[
        bool, typer.Option("--layers", help="Draw what has merged after every encoder layer, at one budget.")
    ] = False,
    device: Device = None,
    dtype: Dtype = None,
    revision: Revision = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Draw which tokens of pictures merge: a row for each picture, a column for each budget or encoder layer.

    Every outlined patch is one token for the language model; what merged has its mean colour.
    """
    from dymu.media.images import load

    out = Output(as_json)
    check_writable(output, "the picture", PICTURES)
    if layers and len(budget or ()) > 1:
        raise typer.BadParameter("--layers draws one budget: give one -b.")
    files = [file for named in existing(images, "image", dymu.BadImage) for file in image_files(out, named)]
    if expanded(output).exists() and any(expanded(output).samefile(file) for file in files):
        raise errors.BadOutput(f"{output} is one of the images: name another file for the picture.")
    pictures = []
    for file in files:
        loaded_image = load(file)
        pictures.append(loaded_image.image)
        for note in loaded_image.notes:
            out.note(f"{file}: {note}")
    named = models.named(model or models.demo_model(), revision)
    calibrated = named.thresholds(thresholds)
    budgets = [calibrated.tokens_for(one) for one in budget or _usual(calibrated, layers)]
    with out.during("loading torch and transformers"):
        quieten_transformers()
        from dymu.survey import sheet
    with out.during(f"loading {named.name}"):
        loaded = models.load(named, device, dtype)
    try:
        with out.during("drawing"):
            if layers:
                drawn = sheet.by_layer(loaded.model, loaded.processor, calibrated, budgets[0], pictures)
            else:
                drawn = sheet.by_budget(loaded.model, loaded.processor, calibrated, budgets, pictures)
            headings = [_heading(layers, budgets, index) for index in range(len(drawn[0]))]
            labels = [
                [f"{kept} of {original}, {heading}" for (_, kept, original), heading in zip(row, headings, strict=True)]
                for row in drawn
            ]
            picture = sheet.sheet([[drawing for drawing, _, _ in row] for row in drawn], labels)
    except ValueError as error:  # each patch is found in the image by its colours, and there may be none
        raise errors.BadOutput(f"what merged cannot be drawn: {errors.one_line(error)}.") from error
    write_whole(output, lambda partial: picture.save(partial))
    rows = [
        {"image": str(file), "original": row[0][2], "kept": [kept for _, kept, _ in row]}
        for file, row in zip(files, drawn, strict=True)
    ]
    data: dict[str, Any] = {
        "picture": str(output),
        "model": named.name,
        "thresholds": calibrated.source,
        "by": "layer" if layers else "budget",
        "budgets": budgets,
        "images": rows,
    }
    if layers:
        out.note(f"merged at a budget of {budgets[0]:g}")
    out.result(data, lambda: _for_people(rows, headings))
    out.wrote(output)


def _usual(calibrated: Thresholds, layers: bool) -> list[float]:
    """The budgets where none are named."""
    some = models.some_budgets(calibrated, COLUMNS)
    return some[len(some) // 2 :][:1] if layers else some


def _heading(layers: bool, budgets: Sequence[float], index: int) -> str:
    return f"layer {index}" if layers else f"budget {budgets[index]:g}"


def _for_people(rows: Sequence[dict[str, Any]], headings: Sequence[str]) -> Iterator[Any]:
    """As a table with a column for each image, since there may be many layers."""
    printed = table("tokens", *(row["image"] for row in rows))
    printed.add_row("all", *(str(row["original"]) for row in rows))
    for heading, *kept in zip(headings, *(row["kept"] for row in rows), strict=True):
        printed.add_row(heading, *map(str, kept))
    yield printed
