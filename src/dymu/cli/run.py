"""`dymu run`: ask a model about an image or a video."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

import dymu
from dymu.choices import COUNTINGS
from dymu.cli import errors
from dymu.cli.app import (
    PICTURES,
    RUN,
    Cache,
    CountingBy,
    Debug,
    Device,
    Dtype,
    FocusOn,
    GuardOf,
    Json,
    ModelOrDemo,
    Revision,
    ThresholdsName,
    UnmergeBy,
    app_command,
    check_cache,
    parse_budget,
    quieten_transformers,
)
from dymu.cli.output import Output, check_writable, run_for_people, write_whole
from dymu.files import escaped, expanded

ANIMATED = (".gif", ".webp")
MOVING = (*PICTURES, ".gif")


@app_command(RUN, "dymu run examples/photo.jpg 'what is in the picture?' --compare --draw merged.png")
def run(
    image: Annotated[
        str,
        typer.Argument(
            metavar="IMAGE|VIDEO", help="A photo or drawing; a video or a folder of frames, if the model takes videos."
        ),
    ],
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What to ask about it.")],
    model: ModelOrDemo = None,
    thresholds: ThresholdsName = None,
    budget: Annotated[
        float | None,
        typer.Option("--budget", "-b", metavar="N|0.15", parser=parse_budget, show_default="0.30 for the demo model",
                     help="Image tokens to keep on average: a number, or a fraction of all."),
    ] = None,
    counting: CountingBy = "mean",
    focus: FocusOn = None,
    guard: GuardOf = None,
    unmerge: UnmergeBy = "exact",
    cache: Cache = "merged",
    compare: Annotated[bool, typer.Option("--compare", help="Ask the untouched model as well, and time both.")] = False,
    time: Annotated[bool, typer.Option("--time", help="Time the model, a few times over.")] = False,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Length of the answer at most.")] = 64,
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
    device: Device = None,
    dtype: Dtype = None,
    revision: Revision = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Ask a model about an image, or a video, with merged image tokens."""
    from dymu.cli import models
    from dymu.media import images, videos

    out, path = Output(as_json), expanded(image)
    check_cache(cache, unmerge)
    moves = frames is not None or path.is_dir() or videos.is_film(path)
    if draw is not None:
        check_writable(draw, "the picture", MOVING if moves else PICTURES)
    if per_second is not None and not moves:
        raise typer.BadParameter("--per-second is for videos: leave it out for an image.")
    if escaped(question) != question:
        raise dymu.BadPrompt("the question holds half of a character, which no tokenizer takes: mend it.")
    named = models.named(model or models.demo_model(), revision) if moves and path.exists() else None
    if named is not None:
        named.check_videos()
    picture: Any = videos.load(image, frames=frames or 32) if moves else images.load(image)
    shown = picture.frames if moves else picture.image
    if draw is not None and expanded(draw).exists() and expanded(draw).samefile(path):
        raise errors.BadOutput(f"{draw} is the image itself: name another file for the picture.")
    for note in picture.notes:
        out.note(f"{image}: {note}")

    named = named or models.named(model or models.demo_model(), revision)
    calibrated = named.thresholds(thresholds)
    if model is None:
        budget = models.demo_budget(budget, calibrated)
    if counting == "mean":
        calibrated.tokens_for(budget)  # a budget that cannot be had is refused before the model is loaded
    elif budget is None:
        budget = calibrated.tokens_for(budget)
    if per_second is not None:
        calibrated.over_time_at(budget, per_second)
    if models.beyond_the_demo(named, path):
        out.note(models.TOY)

    with out.during("loading torch and transformers"):
        quieten_transformers()
        from dymu.counts import Count
        from dymu.measure.times import Times
        from dymu.measure.timing import measure_repeatedly
    how: dict[str, Any] = {COUNTINGS[counting]: budget, "per_second": per_second}
    Count(**how).rule(calibrated)
    how |= {"focus": focus, "guard": guard, "unmerge": unmerge, "cache": cache}
    with out.during(f"loading {named.name}"):
        loaded = models.load(named, device, dtype)
    with dymu.apply(loaded.model, calibrated, **how) as handle:
        inputs = models.ask(loaded, shown, question, picture.fps if moves else None)
        with out.during("answering"):
            answer, cache_bytes = models.answer(loaded, inputs, max_new_tokens)
        report = handle.last
        drawing = None if draw is None else _drawing(report, shown, draw, picture.fps if moves else None)
        original, kept = sum(report.original), sum(report.kept)
        data: dict[str, Any] = _side(answer, original, kept, cache_bytes)
        if compare:
            with out.during("answering with all image tokens"), handle.disabled():
                full_answer, full_cache_bytes = models.answer(loaded, inputs, max_new_tokens)
            data["untouched"] = _side(full_answer, original, original, full_cache_bytes)
        if compare or time:
            with out.during("measuring"):
                runs, full_runs = measure_repeatedly(loaded.model, inputs, handle if compare else None)
            times = Times.medians(runs)
            data |= {**_rounded(times), "repeats": len(runs)}
            if compare:
                full_times = Times.medians(full_runs)
                data["untouched"] |= _rounded(full_times)
                data["time_to_first_token_ratio"] = times.first_token_ms / full_times.first_token_ms

    data |= {
        "budget": budget,
        "count": counting,
        "focus": focus,
        "guard": guard,
        "unmerge": unmerge,
        "cache": cache,
        "model": named.name,
        "thresholds": calibrated.source,
        "notes": list(picture.notes),
    }
    if moves:
        data |= {"frames": len(shown), "seconds": picture.seconds, "per_second": per_second}
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
            rate = (fps or 2.0) * len(frames) / len(shown)
            return lambda target: save_animation(frames, target, rate)
        drawn = report.draw(shown, slice(None))
        return lambda target: drawn.save(target)
    except ValueError as error:  # it finds each patch in the image by its colours, and there may be none
        raise errors.BadOutput(f"what merged cannot be drawn: {errors.one_line(error)}.") from error


def _side(answer: str, original: int, kept: int, cache_bytes: int | None) -> dict[str, Any]:
    return {"answer": answer, "original_tokens": original, "kept_tokens": kept, "cache_bytes": cache_bytes}


def _rounded(times: Any) -> dict[str, float]:
    return {name: round(milliseconds, 3) for name, milliseconds in msgspec.structs.asdict(times).items()}
