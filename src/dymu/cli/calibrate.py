"""`dymu calibrate` and `dymu calibrate-videos`: find thresholds on sample images and videos."""

import functools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import msgspec
import typer

import dymu
from dymu.choices import SCHEDULES, Schedule
from dymu.cli import models
from dymu.cli.app import (
    FIND,
    Debug,
    Device,
    Dtype,
    Json,
    Model,
    NewThresholds,
    Ray,
    Revision,
    Workers,
    app_command,
    check_workers,
    parse_budget,
    parse_layers,
    quieten_transformers,
)
from dymu.cli.output import Output, check_writable, over_time_for_people, thresholds_data, thresholds_for_people
from dymu.errors import DymuError
from dymu.files import expanded
from dymu.schedule import layers_to_merge_in
from dymu.thresholds import Thresholds

FEW = 32
"""Calibration images, below which a note says so: draws of 50 missed budgets by up to 12 % (docs/evidence.md)."""


@app_command(FIND, "dymu calibrate models/demo photos/ -b 48 -b 96 -o thresholds.json")
def calibrate(
    model: Model,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGES", help="Sample images, or folders of them.")],
    output: NewThresholds,
    budget: Annotated[
        list[float] | None,
        typer.Option("--budget", "-b", metavar="N|0.15", parser=parse_budget, show_default="a grid, for any between",
                     help="Image tokens to keep on average: a number, or a fraction of all. Give several."),
    ] = None,
    schedule: Annotated[
        Schedule,
        typer.Option(metavar="NAME", help=f"How merges spread over the encoder's layers: {', '.join(SCHEDULES)}."),
    ] = "reverse_linear",
    merge_layers: Annotated[
        str | None,
        typer.Option(metavar="1,3,5", help="Encoder layers that merge, counted from 0. All, if left out."),
    ] = None,
    ray: Ray = None,
    workers: Workers = None,
    device: Device = None,
    dtype: Dtype = None,
    revision: Revision = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Find the thresholds at which a model keeps so many tokens of sample images on average."""
    out = Output(as_json)
    check_workers(ray, workers)
    layers = None if merge_layers is None else parse_layers(merge_layers)
    check_writable(output, "thresholds", (".json",))
    paths = [path for named in existing(images, "image", dymu.BadImage) for path in image_files(out, named)]
    named = models.named(model, revision)
    if layers is not None and named.depth is not None:
        layers_to_merge_in(layers, named.depth)
    named.check_budgets(budget or (), len(set(layers)) if layers else named.depth or 0)

    how: dict[str, Any] = {"schedule": schedule, "merge_layers": layers}

    if ray is not None:
        load = functools.partial(_model_and_processor, named, device, dtype)
        thresholds, data = _save(
            out, output, lambda: _over_workers(out, ray, workers, load, paths, budget or None, how)
        )
    else:
        loaded, processor = _loaded(out, named, device, dtype)
        thresholds, data = _save(out, output, lambda: dymu.calibrate(loaded, processor, paths, budget or None, **how))
    data |= thresholds_data(thresholds)
    if thresholds.images is not None and thresholds.images < FEW:
        few = f"calibrated on fewer than {FEW} images ({thresholds.images}): others may miss the budget by far; "
        data["notes"].append(f"{few}give a few hundred.")
        out.note(data["notes"][-1])
    out.result(data, lambda: thresholds_for_people(data))
    out.wrote(output)


def _model_and_processor(named: models.Named, device: str | None, dtype: str | None) -> tuple[Any, Any]:
    quieten_transformers()
    loaded = models.load(named, device, dtype)
    return loaded.model, loaded.processor


def _loaded(out: Output, named: models.Named, device: str | None, dtype: str | None) -> tuple[Any, Any]:
    with out.during("loading torch and transformers"):
        quieten_transformers()
    with out.during(f"loading {named.name}"):
        return _model_and_processor(named, device, dtype)


def _over_workers(
    out: Output,
    address: str,
    workers: int | None,
    load: Callable[[], tuple[Any, Any]],
    paths: Sequence[Path],
    budgets: Sequence[float] | None,
    how: dict[str, Any],
) -> Thresholds:
    """Calibrated by the workers of a Ray cluster."""
    with out.during("loading torch and Ray"):
        from dymu.calibration.images import warn
        from dymu.integrations import on_ray
    with on_ray.started(address), out.during("calibrating over the workers of Ray"):
        thresholds, _ = on_ray.calibrate(load, paths, budgets, workers, **how)
    warn(thresholds, ())
    return thresholds


def _save(out: Output, output: Path, find: Callable[[], Thresholds]) -> tuple[Thresholds, dict[str, Any]]:
    """Thresholds that are found and written, and the file and the seconds as JSON."""
    began = perf_counter()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        thresholds = find()
    seconds = perf_counter() - began
    thresholds.save(output)
    # What calibrate says to its caller; libraries' talk is left out.
    notes = [str(warning.message) for warning in warned if warning.filename == __file__]
    for note in notes:
        out.note(note)
    return thresholds, {"file": str(output), "seconds": round(seconds, 3), "notes": notes}


def existing(paths: Sequence[Path], what: str, error: type[DymuError]) -> list[Path]:
    """The paths with the home folder for `~`.

    Raises:
        DymuError: of the kind `error`, for the first that does not exist, or is neither a file nor a folder.
    """
    for path in paths:
        if not expanded(path).exists():
            raise error(f"the {what} {path} does not exist: check the path.")
        if not (expanded(path).is_file() or expanded(path).is_dir()):
            raise error(f"the {what} {path} is a device or a pipe: name a file or a folder.")
    return [expanded(path) for path in paths]


def image_files(out: Output, path: Path) -> list[Path]:
    """A path as it is, or the images directly in a folder; a note says what else is there."""
    from dymu.media.images import in_folder

    files, left_out = in_folder(path) if path.is_dir() else ([path], "")
    if left_out:
        out.note(left_out)
    return files


@app_command(
    FIND,
    "dymu calibrate-videos MODEL clips/*.mp4 --thresholds MODEL -b 0.3 --per-second 60 -o videos.json",
    "calibrate-videos",
)
def calibrate_videos(
    model: Model,
    videos: Annotated[list[Path], typer.Argument(metavar="VIDEOS", help="Sample videos, or folders of frames.")],
    thresholds: Annotated[str, typer.Option(metavar="FILE|PATH|ID", help="The model's thresholds for images.")],
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
    device: Device = None,
    dtype: Dtype = None,
    revision: Revision = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Find the similarities at which videos keep so many tokens per second on average, on sample videos."""
    out = Output(as_json)
    check_writable(output, "thresholds", (".json",))
    sources = existing(videos, "video", dymu.BadVideo)
    named = models.named(model, revision)
    named.check_videos()
    calibrated = named.thresholds(thresholds)
    calibrated.tokens_for(budget)

    loaded, processor = _loaded(out, named, device, dtype)

    def find() -> Thresholds:
        return dymu.calibrate_videos(
            loaded, processor, sources, calibrated, per_second, budget=budget, frames=frames, fps=fps
        )

    over_time, data = _save(out, output, find)
    data["over_time"] = msgspec.to_builtins(over_time.over_time)
    out.result(data, lambda: over_time_for_people(data["over_time"]))
    out.wrote(output)
