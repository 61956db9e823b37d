"""`dymu calibrate` and `dymu calibrate-videos`: find thresholds on sample images and videos."""

import warnings
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import msgspec
import typer

import dymu
from dymu.choices import Schedule
from dymu.cli.app import Debug, Json, Model, NewThresholds, app, parse_budget, parse_layers, quieten_transformers
from dymu.cli.output import Output, check_writable, over_time_for_people, thresholds_data, thresholds_for_people
from dymu.thresholds import Thresholds


@app.command()
def calibrate(
    model: Model,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGES", help="Sample images, or folders of them.")],
    budget: Annotated[
        list[float],
        typer.Option("--budget", "-b", metavar="N|0.15", parser=parse_budget,
                     help="Image tokens to keep on average: a number, or a fraction of all. Give several."),
    ],
    output: NewThresholds,
    schedule: Annotated[
        Schedule, typer.Option(help="How merges spread over the encoder's layers.")
    ] = "reverse_linear",
    merge_layers: Annotated[
        str | None,
        typer.Option(metavar="1,3,5", help="Encoder layers that merge, counted from 0. All, if left out."),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Find the thresholds at which a model keeps so many tokens of sample images on average."""
    out = Output(as_json)
    layers = None if merge_layers is None else parse_layers(merge_layers)
    check_writable(output, "thresholds", (".json",))
    paths = [path for named in images for path in image_files(named)]

    def find(loaded: Any) -> Thresholds:
        return dymu.calibrate(loaded.model, loaded.processor, paths, budget, schedule=schedule, merge_layers=layers)

    thresholds, data = _save(out, model, output, find)
    data |= thresholds_data(thresholds)
    out.result(data, lambda: thresholds_for_people(data))


def _save(
    out: Output, model: str, output: Path, find: Callable[[Any], Thresholds]
) -> tuple[Thresholds, dict[str, Any]]:
    """Thresholds that are found for a loaded model and written, and the file and the seconds as JSON."""
    from dymu.cli import models

    with out.during("loading torch and transformers"):
        quieten_transformers()
    with out.during(f"loading {model}"):
        loaded = models.load(model)
    began = perf_counter()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        thresholds = find(loaded)
    seconds = perf_counter() - began
    thresholds.save(output)
    for warning in warned:
        if warning.filename == __file__:  # what calibrate says to its caller; libraries' talk is left out
            out.note(str(warning.message))
    return thresholds, {"file": str(output), "seconds": round(seconds, 3)}


def image_files(path: Path) -> list[Path]:
    """A path as it is, or the images directly in a folder, in the order of their names."""
    from dymu.media.videos import IN_FOLDERS

    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in IN_FOLDERS)
    if not files:
        raise dymu.BadImage(f"{path} holds no images: name a folder that does, or image files.")
    return files


@app.command("calibrate-videos")
def calibrate_videos(
    model: Model,
    videos: Annotated[list[Path], typer.Argument(metavar="VIDEOS", help="Sample videos, or folders of frames.")],
    thresholds: Annotated[Path, typer.Option(metavar="FILE", help="The model's thresholds for images.")],
    per_second: Annotated[
        list[float],
        typer.Option("--per-second", metavar="N", help="Tokens per second of video to keep on average. Give several."),
    ],
    output: NewThresholds,
    budget: Annotated[
        float | None,
        typer.Option("--budget", "-b", metavar="N|0.15", parser=parse_budget,
                     show_default="the only one in the thresholds file", help="Tokens of an image, or a fraction; "
                     "every frame keeps the same fraction. Give `dymu run` the same."),
    ] = None,
    frames: Annotated[
        int, typer.Option(metavar="N", min=2, help="Of each video, spread over its length; as many as on use.")
    ] = 32,
    fps: Annotated[
        float | None,
        typer.Option(metavar="N", min=0.001, show_default=False,
                     help="Frames per second of folders, which do not say it."),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Find the similarities at which videos keep so many tokens per second on average, on sample videos."""
    out = Output(as_json)
    check_writable(output, "thresholds", (".json",))
    calibrated = Thresholds.load(thresholds)
    calibrated.tokens_for(budget)
    for video in videos:
        if not video.expanduser().exists():
            raise dymu.BadVideo(f"{video} does not exist: check the path.")

    def find(loaded: Any) -> Thresholds:
        return dymu.calibrate_videos(
            loaded.model, loaded.processor, videos, calibrated, per_second, budget=budget, frames=frames, fps=fps
        )

    over_time, data = _save(out, model, output, find)
    data["over_time"] = msgspec.to_builtins(over_time.over_time)
    out.result(data, lambda: over_time_for_people(data["over_time"]))
