"""`dymu calibrate-videos`: thresholds that also say when tokens go on from frame to frame."""

import warnings
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import typer

import dymu
from dymu.cli.commands import Debug, Json, app, parse_budget, quieten_transformers
from dymu.cli.output import Output, check_writable, over_time_for_people


@app.command("calibrate-videos")
def calibrate_videos(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model's folder or hub name.")],
    videos: Annotated[list[Path], typer.Argument(metavar="VIDEOS", help="Sample videos, or folders of frames.")],
    thresholds: Annotated[Path, typer.Option(metavar="FILE", help="The model's thresholds for images.")],
    per_second: Annotated[
        list[float],
        typer.Option("--per-second", metavar="N", help="Tokens per second of video to keep on average. Give several."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE.json", help="The thresholds file to write.")],
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            "-b",
            metavar="N|0.15",
            help="Tokens of an image, or a fraction; every frame keeps the same fraction. Give `dymu run` the same.",
            show_default="the only one in the thresholds file",
        ),
    ] = None,
    frames: Annotated[
        int, typer.Option(metavar="N", min=2, help="Of each video, spread over its length; as many as on use.")
    ] = 32,
    fps: Annotated[
        float | None,
        typer.Option(
            metavar="N", min=0.001, help="Frames per second of folders, which do not say it.", show_default=False
        ),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Find the similarities at which videos keep the wanted number of tokens per second, on sample videos."""
    from dymu.cli import models
    from dymu.thresholds import Thresholds

    out = Output(as_json)
    wanted = None if budget is None else parse_budget(budget)
    check_writable(output, "thresholds", (".json",))
    read = Thresholds.load(thresholds)
    read.tokens_for(wanted)
    for video in videos:
        if not video.expanduser().exists():
            raise dymu.BadVideo(f"{video} does not exist: check the path.")
    with out.step("loading torch and transformers"):
        quieten_transformers()
    with out.step(f"loading {model}"):
        loaded = models.load(model)
    began = perf_counter()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        found = dymu.calibrate_videos(
            loaded.model, loaded.processor, videos, read, per_second, budget=wanted, frames=frames, fps=fps
        )
    seconds = perf_counter() - began
    found.save(output)
    for warning in warned:
        if warning.filename == __file__:  # libraries' talk is left out
            out.note(str(warning.message))
    entries = [asdict(entry) for entry in found.over_time]
    data: dict[str, Any] = {"file": str(output), "seconds": round(seconds, 3), "over_time": entries}
    out.result(data, lambda: over_time_for_people(entries))
