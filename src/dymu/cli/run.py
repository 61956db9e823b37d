"""`dymu run`: ask a model about an image or a video."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

import dymu
from dymu.cli import errors
from dymu.cli.app import PICTURES, Debug, Json, app, parse_budget, quieten_transformers
from dymu.cli.output import Output, check_writable, run_for_people, write_whole
from dymu.thresholds import Thresholds

MAX_NEW_TOKENS = 64
ANIMATED = (".gif", ".webp")
MOVING = (*PICTURES, ".gif")
FILMS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".ogv", ".wmv")


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
        float | None,
        typer.Option("--budget", "-b", metavar="N|0.15", parser=parse_budget, show_default="0.30 for the demo model",
                     help="Image tokens to keep on average: a number, or a fraction of all."),
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Ask the untouched model as well, and time both.")] = False,
    frames: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, show_default="32", help="Show the model so many frames of a video, spread "
                     "over its length; also of an animated GIF or WebP."),
    ] = None,
    per_second: Annotated[
        float | None,
        typer.Option(metavar="N", show_default="every frame by itself", help="Let what stays alike go on from frame "
                     "to frame, at this average of tokens per second of video."),
    ] = None,
    draw: Annotated[
        Path | None,
        typer.Option(metavar="OUT.png", help="Draw what merged into this picture: of a video all frames, as .gif or "
                     ".webp moving."),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Ask a model about an image, or a video, with merged image tokens."""
    from dymu.cli import models
    from dymu.media import images, videos

    out = Output(as_json)
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
        budget = models.DEMO_BUDGET if budget is None else budget
    calibrated = Thresholds.load(thresholds or models.thresholds_beside(model))
    calibrated.tokens_for(budget)  # a budget that cannot be had is refused before the model is loaded
    if per_second is not None:
        calibrated.over_time_at(budget, per_second)

    with out.during("loading torch and transformers"):
        quieten_transformers()
        from dymu.measure.timing import Times, measure_repeatedly
    with out.during(f"loading {model}"):
        loaded = models.load(model)
    with dymu.apply(loaded.model, calibrated, budget=budget, per_second=per_second) as handle:
        inputs = models.ask(loaded, shown, question)
        with out.during("answering"):
            answer, cache_bytes = models.answer(loaded, inputs, MAX_NEW_TOKENS)
        report = handle.last
        drawing = None if draw is None else _drawing(report, shown, draw, picture.fps if moves else None)
        full_answer, full_cache_bytes = "", 0
        if compare:
            with out.during("answering with all image tokens"), handle.disabled():
                full_answer, full_cache_bytes = models.answer(loaded, inputs, MAX_NEW_TOKENS)
        with out.during("measuring"):
            runs, full_runs = measure_repeatedly(loaded.model, inputs, handle if compare else None)

    times = Times.medians(runs)
    original, kept = sum(report.original), sum(report.kept)
    data: dict[str, Any] = {
        **_side(answer, original, kept, times, cache_bytes),
        "budget": budget,
        "model": model,
        "thresholds": calibrated.source,
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
    from dymu.media.contact_sheet import save_animation

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
