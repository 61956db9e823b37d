"""`dymu check`: whether a model of the user's keeps the contract."""

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from dymu.cli import models
from dymu.cli.app import RUN, Debug, DemoOrModel, Device, Dtype, Json, Revision, app_command, quieten_transformers
from dymu.cli.output import Output, table


@app_command(RUN, "dymu check models/demo examples/photo.jpg --dtype float32")
def check(
    model: DemoOrModel = None,
    image: Annotated[
        Path | None,
        typer.Argument(metavar="IMAGE", help="What to show it.", show_default="a picture that is drawn for it"),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    revision: Revision = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check that a model answers as before where nothing merges, in batches, and once DyMU is removed."""
    from dymu.media import images

    out = Output(as_json)
    picture = None if image is None else images.load(image)
    for note in picture.notes if picture else ():
        out.note(f"{image}: {note}")
    named = models.named(model or models.demo_model(), revision)
    with out.during("loading torch and transformers"):
        quieten_transformers()
        from dymu.measure.check import check as checked
    with out.during(f"loading {named.name}"):
        loaded = models.load(named, device, dtype)
    with out.during("checking"):
        result = checked(loaded.model, loaded.processor, picture.image if picture else None)

    told = table("", "", "", numbers=False)
    told.show_header = False
    for finding in result.findings:
        told.add_row(finding.part, "pass" if finding.passed else "FAIL", finding.seen)
    kind = {"dtype": str(loaded.model.dtype).removeprefix("torch."), "device": str(loaded.model.device)}
    data = {"model": named.name, **kind, "passed": result.passed, "findings": msgspec.to_builtins(result.findings)}
    out.result(data, lambda: [told, "", f"{named.name}, in {data['dtype']} on {data['device']}"])
    if not result.passed:
        raise typer.Exit(1)
