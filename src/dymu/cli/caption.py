"""`dymu caption`: one prompt over many images."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

import dymu
from dymu.choices import COUNTINGS
from dymu.cli import errors
from dymu.cli.app import (
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
    Ray,
    Revision,
    ThresholdsName,
    UnmergeBy,
    Workers,
    app_command,
    check_cache,
    check_workers,
    parse_budget,
    quieten_transformers,
)
from dymu.cli.output import Output, check_writable, facts
from dymu.files import expanded

FAILURES = 5
"""Of images that have no caption, so many are named; the file names all."""


@app_command(RUN, "dymu caption photos/ -o captions.jsonl --model llava-hf/llava-1.5-7b-hf -b 96")
def caption(
    images: Annotated[
        Path,
        typer.Argument(metavar="FOLDER|LIST", help="A folder of images, or a .jsonl or .parquet file whose field "
                       "`image` has their paths."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE.jsonl", help="The captions, one a line.")],
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="What is asked about each.")] = "What is in the picture?",
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
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Length of a caption at most.")] = 64,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Images at a time.")] = 8,
    ray: Ray = None,
    workers: Workers = None,
    device: Device = None,
    dtype: Dtype = None,
    revision: Revision = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Ask a model one thing about every image of a folder or a list.

    A run that was stopped goes on where it was. An image that cannot be read gets a line that says why; the next run
    asks for it again, and of an image with several lines the last counts.
    """
    from dymu.captioning.sources import sources_in
    from dymu.cli import models

    out = Output(as_json)
    check_workers(ray, workers)
    check_cache(cache, unmerge)
    check_writable(output, "captions", (".jsonl",))
    sources, left_out = sources_in(images)
    if left_out:
        out.note(left_out)
    named = models.named(model or models.demo_model(), revision)
    calibrated = named.thresholds(thresholds)
    if model is None:
        budget = models.demo_budget(budget, calibrated)
    if counting == "mean" or budget is None:
        budget = calibrated.tokens_for(budget)
    if model is None:
        out.note(models.TOY)
    with out.during("loading torch and transformers"):
        quieten_transformers()
        from dymu import captioning
        from dymu.counts import Count

    Count.of(counting, budget).rule(calibrated)
    number: dict[str, Any] = {COUNTINGS[counting]: budget}
    how: dict[str, Any] = {"focus": focus, "guard": guard, "unmerge": unmerge, "cache": cache}
    where = str(expanded(images).resolve())

    def build(device: str | None = device) -> tuple[Any, Any]:
        """The captioner, and what its captions depend on."""
        quieten_transformers()
        loaded = models.load(named, device, dtype)
        handle = dymu.apply(loaded.model, calibrated, **number, **how)
        captioner = captioning.Captioner(loaded.model, loaded.processor, handle, prompt, max_new_tokens)
        return captioner, captioner.header(where, calibrated, **how)

    with out.during(f"loading {named.name}"):
        captioner, header = build(device if ray is None else "cpu")
    captioned: Any = functools.partial(map, captioner)
    with contextlib.ExitStack() as opened:
        if ray is not None:
            from dymu.integrations import on_ray

            with out.during("starting Ray"):
                opened.enter_context(on_ray.started(ray))
            del captioner  # which was loaded to say what the captions depend on
            captioned = on_ray.captioned(functools.partial(_like, build, header), workers)
        rows = captioning.caption(captioned, header, sources, output, batch_size=batch_size)
    failed = [row for row in rows.values() if row.error is not None]
    for row in failed[:FAILURES]:
        printed = "".join(letter if letter.isprintable() else f"\\x{ord(letter):02x}" for letter in row.error or "")
        out.note(f"no caption: {printed}")
    kept, original = (sum(getattr(row, name) or 0 for row in rows.values()) for name in ("kept", "original"))
    data = {"file": str(output), "images": len(rows), "failed": len(failed), "original": original, "kept": kept}
    out.result(data, lambda: _for_people(data))
    out.wrote(output)
    if len(failed) == len(rows):
        raise errors.BadInput(f"none of the {len(rows)} images could be captioned: {output} says why.")


def _like(build: Callable[[], tuple[Any, Any]], header: Any) -> Any:
    """A worker's captioner.

    Raises:
        BadModel: its captions would not be those that the file's header describes.
    """
    captioner, own = build()
    if differing := [
        name for name in ("weights", "processor", "versions") if getattr(own, name) != getattr(header, name)
    ]:
        raise errors.BadModel(f"a worker has other {' and '.join(differing)} than this machine: make them the same.")
    return captioner


def _for_people(data: dict[str, Any]) -> Iterator[Any]:
    tokens = f"{data['kept']:,} of {data['original']:,}" if data["original"] else "none"
    captions = f"{data['images'] - data['failed']:,} of {data['images']:,} images"
    captions += f"; {data['failed']:,} could not be read" if data["failed"] else ""
    yield from facts({"captions": captions, "image tokens": tokens})
