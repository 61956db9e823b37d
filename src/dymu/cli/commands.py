"""The commands. Each checks what it was given, quick checks first, then does its work."""

import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any, Literal

import typer

import dymu
from dymu.cli import errors
from dymu.cli.output import Output, check_writable, facts, run_for_people, table, thresholds_for_people, write_whole

MAX_NEW_TOKENS = 64
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
ANIMATED = (".gif", ".webp")
MOVING = (*PICTURES, ".gif")
FILMS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".ogv", ".wmv")
IN_FOLDERS = (*PICTURES, ".gif", ".avif", ".bmp", ".tif", ".tiff", ".jp2", ".ppm")

app = typer.Typer(
    name="dymu",
    help="Fewer image tokens for simple images, in a vision-language model as it was trained.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """The `dymu` command: exit code 0, 1 (it failed) or 2 (it was called wrongly)."""
    import dymu.cli.benching
    import dymu.cli.evaluating
    import dymu.cli.videos  # noqa: F401, they add their commands to the app

    errors.Traceback.reset()
    try:
        app(prog_name="dymu")
    except Exception as error:
        if errors.Traceback.wanted:
            raise
        sys.exit(errors.report(error))


def parse_budget(text: str) -> int | float:
    """'96' tokens, or '0.15' or '15%' of them."""
    try:
        if text.endswith("%"):
            part = _finite(text[:-1]) / 100
            if not 0 < part <= 1:
                raise ValueError(text)
            return part
        return int(text) if text.lstrip("+-").isdecimal() else _finite(text)
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is neither a number of tokens (96) nor a fraction of them (0.15 or 15%)."
        ) from None


def parse_layers(text: str) -> list[int]:
    """'1,3,5', indices of layers."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no list of layers such as 1,3,5.") from None


def _finite(text: str) -> float:
    number = float(text)
    if number != number or abs(number) == float("inf"):
        raise ValueError(text)
    return number


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, on the last line of stdout.")]
Debug = Annotated[
    bool,
    typer.Option(
        "--debug",
        help="Show the full traceback of an error (so does DYMU_DEBUG=1).",
        callback=errors.Traceback.ask,
    ),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(dymu.__version__)
        raise typer.Exit


@app.callback()
def _dymu(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    pass


@app.command()
def run(
    image: Annotated[
        str,
        typer.Argument(
            metavar="IMAGE|VIDEO", help="A photo or drawing; a video or a folder of frames, if the model takes videos."
        ),
    ],
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What to ask about it.")],
    model: Annotated[
        str | None,
        typer.Option(metavar="PATH|ID", help="A model's folder or hub name.", show_default="the demo model"),
    ] = None,
    thresholds: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="When to merge.", show_default="thresholds.json beside the model"),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            "-b",
            metavar="N|0.15",
            help="Image tokens to keep on average: a number, or a fraction of all.",
            show_default="0.30 for the demo model",
        ),
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Ask the untouched model as well, and time both.")] = False,
    frames: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Show the model so many frames of a video, spread over its length; also of an animated GIF or WebP.",
            show_default="32",
        ),
    ] = None,
    per_second: Annotated[
        float | None,
        typer.Option(
            metavar="N",
            help="Let what stays alike go on from frame to frame, at this average of tokens per second of video.",
            show_default="every frame by itself",
        ),
    ] = None,
    draw: Annotated[
        Path | None,
        typer.Option(
            metavar="OUT.png",
            help="Draw what merged into this picture: of a video all frames, as .gif or .webp moving.",
        ),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Ask a model about an image, or a video, with merged image tokens."""
    from dymu import images, videos
    from dymu.cli import models
    from dymu.thresholds import Thresholds

    out = Output(as_json)
    wanted = None if budget is None else parse_budget(budget)
    moves = frames is not None or Path(image).expanduser().is_dir() or Path(image).suffix.lower() in FILMS
    if draw is not None:
        check_writable(draw, "the picture", MOVING if moves else PICTURES)
    if per_second is not None and not moves:
        raise typer.BadParameter("--per-second is for videos: leave it out for an image.")
    picture: Any = videos.load(image, frames=frames or 32) if moves else images.load(image)
    shown = picture.frames if moves else picture.image
    if draw is not None and draw.exists() and draw.samefile(Path(image).expanduser()):
        raise errors.BadOutput(f"{draw} is the image itself: name another file for the picture.")
    for note in picture.notes:
        out.note(f"{image}: {note}")

    if model is None:
        model = models.demo_model()
        wanted = models.DEMO_BUDGET if wanted is None else wanted
    thresholds_file = thresholds or models.thresholds_beside(model)
    read = Thresholds.load(thresholds_file)
    read.tokens_for(wanted)  # a budget that cannot be had is refused before the model is loaded
    if per_second is not None:
        read.over_time_at(wanted, per_second)

    with out.step("loading torch and transformers"):
        quieten_transformers()
        from dymu.timing import Times, measure_repeatedly
    with out.step(f"loading {model}"):
        loaded = models.load(model)
    with dymu.apply(loaded.model, read, budget=wanted, per_second=per_second) as handle:
        inputs = models.ask(loaded, shown, question)
        with out.step("answering"):
            answer, cache_bytes = models.answer(loaded, inputs, MAX_NEW_TOKENS)
        report = handle.last
        drawing = None if draw is None else _drawing(report, shown, draw, picture.fps if moves else None)
        full_answer, full_cache_bytes = "", 0
        if compare:
            with out.step("answering with all image tokens"), handle.disabled():
                full_answer, full_cache_bytes = models.answer(loaded, inputs, MAX_NEW_TOKENS)
        with out.step("measuring"):
            runs, full_runs = measure_repeatedly(loaded.model, inputs, handle if compare else None)

    times = Times.medians(runs)
    original, kept = sum(report.original), sum(report.kept)
    data: dict[str, Any] = {
        **_side(answer, original, kept, times, cache_bytes),
        "budget": wanted,
        "model": model,
        "thresholds": str(thresholds_file),
        "repeats": len(runs),
        "notes": list(picture.notes),
    }
    if moves:
        data |= {"frames": len(shown), "seconds": picture.seconds, "per_second": per_second}
    if compare:
        full_times = Times.medians(full_runs)
        data["untouched"] = _side(full_answer, original, original, full_times, full_cache_bytes)
        data["speedup_encoder_prefill"] = full_times.first_token_ms / times.first_token_ms
    if draw is not None and drawing is not None:
        write_whole(draw, drawing)
        data["picture"] = str(draw)
    out.result(data, lambda: run_for_people(data))


def _drawing(report: Any, shown: Any, path: Path, fps: float | None) -> Callable[[Path], None]:
    """What writes the picture, or the animation, that `path` asks for."""
    from dymu.sheets import save_animation

    try:
        if isinstance(shown, list) and path.suffix.lower() in ANIMATED:
            frames = report.draw_frames(shown)
            return lambda target: save_animation(frames, target, fps or 2.0)
        drawn = report.draw(shown)
        return lambda target: drawn.save(target)
    except ValueError as error:  # it finds each patch in the image by its colours, and there may be none
        raise errors.BadOutput(f"what merged cannot be drawn: {errors.one_line(error)}.") from error


def _side(answer: str, original: int, kept: int, times: Any, cache_bytes: int) -> dict[str, Any]:
    return {
        "answer": answer,
        "original_tokens": original,
        "kept_tokens": kept,
        "encoder_ms": round(times.encoder_ms, 3),
        "prefill_ms": round(times.prefill_ms, 3),
        "decode_ms_per_token": round(times.decode_ms_per_token, 3),
        "cache_bytes": cache_bytes,
    }


@app.command()
def calibrate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model's folder or hub name.")],
    images: Annotated[
        list[Path],
        typer.Argument(metavar="IMAGES", help="Sample images, or folders of them."),
    ],
    budget: Annotated[
        list[str],
        typer.Option(
            "--budget",
            "-b",
            metavar="N|0.15",
            help="Image tokens to keep on average: a number, or a fraction of all. Give several.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The thresholds file to write.")],
    schedule: Annotated[
        Literal["constant", "linear", "reverse_linear"],
        typer.Option(help="How merges spread over the encoder's layers."),
    ] = "reverse_linear",
    merge_layers: Annotated[
        str | None,
        typer.Option(metavar="1,3,5", help="Encoder layers that merge, counted from 0. All, if left out."),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Find the thresholds at which a model keeps the wanted number of tokens on sample images."""
    from dymu.cli import models

    out = Output(as_json)
    budgets = [parse_budget(text) for text in budget]
    layers = None if merge_layers is None else parse_layers(merge_layers)
    check_writable(output, "thresholds", (".json",))
    paths = [path for named in images for path in _image_files(named)]
    with out.step("loading torch and transformers"):
        quieten_transformers()
    with out.step(f"loading {model}"):
        loaded = models.load(model)
    began = perf_counter()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        found = dymu.calibrate(loaded.model, loaded.processor, paths, budgets, schedule=schedule, merge_layers=layers)
    seconds = perf_counter() - began
    found.save(output)
    for warning in warned:
        if warning.filename == __file__:  # what calibrate says to its caller; libraries' talk is left out
            out.note(str(warning.message))
    data = {"file": str(output), "seconds": round(seconds, 3), **_thresholds_data(found)}
    out.result(data, lambda: thresholds_for_people(data))


def _image_files(path: Path) -> list[Path]:
    """A path as it is, or the images directly in a folder, in the order of their names."""
    if not path.is_dir():
        return [path]
    found = sorted(p for p in path.iterdir() if p.suffix.lower() in IN_FOLDERS)
    if not found:
        raise dymu.BadImage(f"{path} holds no images: name a folder that does, or image files.")
    return found


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A thresholds file.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what a thresholds file holds and what it belongs to."""
    from dymu.thresholds import Thresholds

    data = {"file": str(file), **_thresholds_data(Thresholds.load(file))}
    Output(as_json).result(data, lambda: thresholds_for_people(data))


def _thresholds_data(found: Any) -> dict[str, Any]:
    encoder = found.encoder
    return {
        "model": found.model,
        "encoder": None if encoder is None else asdict(encoder),
        "schedule": found.schedule,
        "merge_layers": found.merge_layers,
        "images": found.images,
        "skipped": [dict(skipped) for skipped in found.skipped],
        "created": found.created,
        "dymu": found.dymu,
        "image_tokens": found.image_tokens,
        "budgets": [asdict(entry) for entry in found.calibrated],
        "over_time": [asdict(entry) for entry in found.over_time],
    }


@app.command()
def families(as_json: Json = False, debug: Debug = False) -> None:
    """List the model families that dymu knows."""
    from dymu.families import FAMILIES

    known: list[dict[str, Any]] = [
        {
            "model_type": model_type,
            "videos": family.video_token is not None,
            "towers": [name for tower in family.towers for name in tower.model_types],
            "decoders": [name for decoder in family.decoders for name in decoder.model_types],
        }
        for model_type, family in sorted(FAMILIES.items())
    ]

    def for_people() -> Iterator[Any]:
        made = table("model type", "videos", "vision towers", "language models", numbers=False)
        for family in known:
            made.add_row(
                str(family["model_type"]),
                "yes" if family["videos"] else "–",
                ", ".join(family["towers"]),
                ", ".join(family["decoders"]),
            )
        yield made

    Output(as_json).result({"families": known}, for_people)


@app.command()
def env(as_json: Json = False, debug: Debug = False) -> None:
    """Show the versions and the device, for a bug report."""
    import torch

    device = torch.accelerator.current_accelerator()
    data: dict[str, Any] = {
        "dymu": dymu.__version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "transformers", "numpy", "pillow")},
        "platform": platform.platform(),
        "cpu_cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "accelerator": None if device is None else _accelerator(device.type),
    }
    Output(as_json).result(
        data,
        lambda: facts({k.replace("_", " "): str(v or "none") for k, v in data.items()}),
    )


def _accelerator(kind: str) -> str:
    import torch

    return f"cuda: {torch.cuda.get_device_name()}" if kind == "cuda" else kind


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def quieten_transformers() -> None:
    """Its progress bars and advice are about its own loading; errors still come as exceptions."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
