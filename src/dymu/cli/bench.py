"""`dymu bench`: time and memory, with DyMU and without."""

from __future__ import annotations

import shlex
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from dymu.bench import shapes
from dymu.bench.prompts import PROMPTS
from dymu.bench.results import load as saved
from dymu.bench.variants import timed_backends
from dymu.cli import models
from dymu.cli.app import (
    CHARTS,
    MEASURE,
    Debug,
    Device,
    Dtype,
    Json,
    Revision,
    ThresholdsName,
    app_command,
    parse_budget,
    quieten_transformers,
)
from dymu.cli.calibrate import existing, image_files
from dymu.cli.errors import BadInput
from dymu.cli.output import Output, check_writable, table, write_text, write_whole
from dymu.errors import BadImage
from dymu.evaluation.results import Results
from dymu.files import expanded

SHAPES = [name for name in shapes.names() if not name.startswith("tiny")]  # those are for tests
BUDGETS = ["0.15", "0.3"]
BATCHES = [1]
PROMPTS_TIMED = ["image-text"]
BACKEND = ["auto"]
NAME_WIDTH = 16
"""Columns for a variant's name, which is longer and would break within words in a narrow terminal."""
SHOWN = ("report", "evaluated", "loss", "divergence", "tables", "chart", "as_json", "debug")
"""Parameters of a call that measures nothing."""


@app_command(MEASURE, "dymu bench llava-1.5-shape-0.5b -b 89 -b 173 --batch 1 --batch 4")
def bench(
    ctx: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="SHAPE|PATH|ID",
            help=f"A shape with random weights ({', '.join(SHAPES)}), "
            "or a model's folder or hub name.",
            show_default="the demo model",
        ),
    ] = None,
    budget: Annotated[
        list[str],
        typer.Option("--budget", "-b", metavar="N|0.15", help="Image tokens to keep on average. Give several."),
    ] = BUDGETS,
    batch: Annotated[
        list[int], typer.Option(metavar="N", min=1, help="Prompts that run together. Give several.")
    ] = BATCHES,
    prompt: Annotated[
        list[str],
        typer.Option(metavar="NAME", help=f"{', '.join(PROMPTS)} (text-image-text: long text first). Give several."),
    ] = PROMPTS_TIMED,
    images: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE|FOLDER", help="Photos for a model that is no shape. Give several.",
            show_default="32 photos that come with dymu",
        ),
    ] = None,
    backend: Annotated[
        list[str],
        typer.Option(metavar="NAME", help=f"Of DyMU's attention: {', '.join(timed_backends())}. Give several."),
    ] = BACKEND,
    answer: Annotated[
        int, typer.Option(metavar="N", min=1, help="Tokens of the answer in the time from end to end.")
    ] = 32,
    repeats: Annotated[int, typer.Option(metavar="N", min=1, help="Rounds, each timing every variant once.")] = 7,
    limit: Annotated[float, typer.Option(metavar="N", min=1, help="Seconds for one budget, batch and prompt.")] = 300,
    thresholds: ThresholdsName = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE.json", help="The result file; one there is continued.",
                     show_default="bench-MODEL.json"),
    ] = None,
    report: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE.json", help="Measure nothing; show this result file. Give several."),
    ] = None,
    evaluated: Annotated[
        Path | None,
        typer.Option("--with", metavar="FILE.jsonl", help="An evaluation of the same model, to stand beside."),
    ] = None,
    loss: Annotated[
        float, typer.Option(metavar="POINTS", min=0, help="With --with: accuracy that a recommended budget may lose.")
    ] = 2.0,
    divergence: Annotated[
        float, typer.Option(metavar="NATS", min=0, help="With --with: its largest KL divergence per token.")
    ] = 0.05,
    tables: Annotated[Path | None, typer.Option(metavar="FILE.md", help="Write the tables into this file.")] = None,
    chart: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw time against tokens (one result file only).")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    revision: Revision = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Time the model as it is and with DyMU, at every budget, batch and prompt."""
    out = Output(as_json)
    budgets = [parse_budget(text) for text in budget]
    if tables is not None:
        check_writable(tables, "the tables", (".md",))
    if chart is not None:
        check_writable(chart, "the chart", CHARTS)
        if report is not None and len(report) > 1:
            raise typer.BadParameter("--chart draws one result file; give one.")
    if evaluated is None:
        for name in ("loss", "divergence"):
            if _named(ctx, name):
                raise typer.BadParameter(f"--{name} says which budget to recommend, by an evaluation: give --with too.")
    else:
        Results.load(evaluated)  # before anything is measured
    if report:
        given = [param.opts[0] for param in ctx.command.params if _is_idle(ctx, param.name)]
        if given:
            names = ", ".join("the model" if name == "model" else name for name in given)
            raise typer.BadParameter(f"--report measures nothing: leave {names} out, or --report.")
        files = report
    else:
        name = model or models.demo_model()
        file = expanded(output or f"bench-{Path(name).name}.json")
        check_writable(file, "results", (".json",))
        if file.exists():
            saved(file)
        _refuse_unknown("prompt", prompt, PROMPTS)
        _refuse_unknown("backend", backend, timed_backends())
        load = _workload(out, name, budgets, thresholds, images, device, dtype, revision)
        with out.during("loading torch and transformers"):
            quieten_transformers()
            from dymu.bench.run import bench as run_all
        run_all(
            load(), file, budgets=budgets, batches=batch, prompts=prompt, backends=backend, answer_tokens=answer,
            repeats=repeats, limit_s=limit, command=shlex.join(["dymu", *sys.argv[1:]]),
        )  # fmt: skip
        files = [file]
    _say(out, files, tables, chart, evaluated, loss / 100, divergence)
    if not report:
        out.wrote(file)
        _refuse_untimed(file)


def _is_idle(ctx: typer.Context, name: str | None) -> bool:
    """Whether an option was named that says nothing to --report."""
    return name not in SHOWN and _named(ctx, name)


def _named(ctx: typer.Context, name: str | None) -> bool:
    """Whether the command line names an option."""
    source = ctx.get_parameter_source(name or "")
    return source is not None and source.name == "COMMANDLINE"


def _refuse_unknown(what: str, names: Sequence[str], known: Iterable[str]) -> None:
    """Raises: typer.BadParameter, for the first name that is not known."""
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"there is no {what} {name!r} to time; choose some of {', '.join(known)}.")


def _workload(
    out: Output,
    name: str,
    budgets: Sequence[int | float],
    thresholds: str | None,
    images: list[Path] | None,
    device: str | None,
    dtype: str | None,
    revision: str | None,
) -> Callable[[], Any]:
    """What loads the model and images to measure; all that can be refused without torch is refused here."""
    if name in shapes.names():
        for option, value in (("--thresholds", thresholds), ("--images", images), ("--revision", revision)):
            if value:
                raise typer.BadParameter(
                    f"{name} has random weights, is shown noise and merges as was recorded: leave {option} out."
                )
        for budget in budgets:
            shapes.check_budget(name, budget)
        return lambda: _shape(out, name, device, dtype)
    if "/" not in name and not expanded(name).exists():
        raise typer.BadParameter(f"{name!r} is neither a shape ({', '.join(SHAPES)}) nor a model's folder.")
    files = [file for path in existing(images or [], "image", BadImage) for file in image_files(out, path)]
    named = models.named(name, revision)
    calibrated = named.thresholds(thresholds)
    for budget in budgets:
        calibrated.tokens_for(budget)

    def load() -> Any:
        from dymu.bench.workload import Pretrained

        with out.during(f"loading {name}"):
            loaded = models.load(named, device, dtype)
        return Pretrained(loaded.model, loaded.processor, calibrated, files or None)

    return load


def _shape(out: Output, name: str, device: str | None, dtype: str | None) -> Any:
    """A model of random weights, in bfloat16 but for CPUs, which are slow in it."""
    import torch

    from dymu.bench.workload import Shape

    where = models.device_named(device)
    kind = getattr(torch, dtype or ("float32" if where.type == "cpu" else "bfloat16"))
    if where.type == "cpu":  # a GPU's allocator says so itself
        shapes.check_room(name, kind)
    with out.during(f"drawing the weights of {name}"):
        return Shape(name, where, kind)


def _refuse_untimed(file: Path) -> None:
    """Raises: BadInput, where a result file holds no time at all."""
    cells = saved(file).cells
    if not any(measured.prefill_ms for cell in cells for measured in cell.variants.values()):
        whys = [cell.left_out or measured.left_out for cell in cells for measured in cell.variants.values() or [cell]]
        why = next(filter(None, whys), "there was nothing to time")
        raise BadInput(f"nothing was timed ({why}): take a smaller --batch, or a longer --limit.")


def _say(
    out: Output,
    files: Sequence[Path],
    tables: Path | None,
    chart: Path | None,
    evaluated: Path | None,
    loss: float,
    divergence: float,
) -> None:
    """Print what result files hold, and write the tables and the chart."""
    from dymu.bench import quality
    from dymu.bench import tables as tabulated
    from dymu.bench.summary import REALISED, summarise
    from dymu.evaluation.summary import summarise as summarise_evaluation

    summarised = [(file, bench, summarise(bench)) for file, bench in zip(files, map(saved, files), strict=True)]
    rows: list[Any] = []
    if evaluated is not None:
        of = Results.load(evaluated)
        for bench in (bench for _, bench, _ in summarised):
            quality.check_same_model(of, bench.model.name, bench.model.weights)
        rows = summarise_evaluation(of)
    advice = quality.recommended(rows, loss, divergence)
    data = [
        {"file": str(file), "provenance": tabulated.provenance(bench), "checks": bench.checks, "cells": cells}
        for file, bench, cells in summarised
    ]
    result: dict[str, Any] = {"results": msgspec.to_builtins(data)}
    if evaluated is not None:
        result["recommended"] = [msgspec.to_builtins(row) for row in advice]

    def for_people() -> Any:
        for _, bench, cells in summarised:
            for cell in cells:
                columns = tabulated.header(bench.answer_tokens)
                filled = table(*columns, title=tabulated.title(cell, bench.full_tokens))
                filled.columns[0].no_wrap = True
                for name, *numbers in tabulated.lines(cell, brief=True):
                    filled.add_row(textwrap.fill(name, NAME_WIDTH), *numbers)
                yield filled
                yield from tabulated.realised(cell, rows) + tabulated.left_out(cell) + tabulated.slower(cell)
                yield ""
            yield f"{REALISED}."
            yield from quality.said(advice, loss, divergence) if evaluated is not None else ()
            yield tabulated.provenance(bench)

    out.result(result, for_people)
    if tables is not None:
        write_text(tables, "\n\n".join(tabulated.page(bench, rows) for _, bench, _ in summarised) + "\n")
        out.wrote(tables)
    if chart is not None:
        from dymu.bench.chart import draw_chart

        write_whole(chart, lambda path: draw_chart(summarised[0][2], path))
        out.wrote(chart)
