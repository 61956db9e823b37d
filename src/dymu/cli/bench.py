"""`dymu bench`: time and memory, with DyMU and without."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from dymu.cli.app import CHARTS, Debug, Json, app, parse_budget, quieten_transformers
from dymu.cli.output import Output, check_writable, table, write_text, write_whole

BUDGETS = ["0.15", "0.3"]
BATCHES = [1]
PROMPTS_TIMED = ["image-text"]
BACKEND = ["auto"]


@app.command()
def bench(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[SHAPE|PATH|ID]",
            help="A shape with random weights (llava-1.5-7b, llava-1.5-shape-0.5b, llava-onevision-0.5b), "
            "or a model's folder or hub name.",
            show_default="the demo model",
        ),
    ] = None,
    budget: Annotated[
        list[str],
        typer.Option("--budget", "-b", metavar="N|0.15", help="Image tokens to keep on average. Give several."),
    ] = BUDGETS,
    batch: Annotated[list[int], typer.Option(min=1, help="Prompts that run together. Give several.")] = BATCHES,
    prompt: Annotated[
        list[str],
        typer.Option(help="image-text, text-image-text (long text first) or two-images. Give several."),
    ] = PROMPTS_TIMED,
    images: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE|FOLDER", help="Photos for a model that is no shape. Give several.",
            show_default="32 photos that come with dymu",
        ),
    ] = None,
    backend: Annotated[list[str], typer.Option(help="Of DyMU's attention. Give several.")] = BACKEND,
    answer: Annotated[int, typer.Option(min=1, help="Tokens of the answer in the time from end to end.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds, each timing every variant once.")] = 7,
    limit: Annotated[float, typer.Option(min=1, help="Seconds for one budget, batch and prompt.")] = 300,
    thresholds: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="When a model that is no shape merges.",
                     show_default="thresholds.json beside the model"),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE.json", help="The result file; one there is continued.",
                     show_default="bench-MODEL.json"),
    ] = None,
    report: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE.json", help="Measure nothing; show this result file. Give several."),
    ] = None,
    tables: Annotated[Path | None, typer.Option(metavar="FILE.md", help="Write the tables into this file.")] = None,
    chart: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw time against tokens (one result file only).")
    ] = None,
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
    if report:
        if model is not None:
            raise typer.BadParameter("--report measures nothing: leave the model out, or --report.")
        files = report
    else:
        from dymu.cli import models

        name = model or models.demo_model()
        file = output or Path(f"bench-{Path(name).name}.json")
        check_writable(file, "results", (".json",))
        with out.during("loading torch and transformers"):
            quieten_transformers()
            from dymu.bench.prompts import PROMPTS
            from dymu.bench.run import bench as run_all
            from dymu.bench.variants import timed_backends
        _refuse_unknown("prompt", prompt, PROMPTS)
        _refuse_unknown("backend", backend, timed_backends())
        workload = _workload(out, name, thresholds, images)
        command = shlex.join(["dymu", *sys.argv[1:]])
        run_all(
            workload, file, budgets=budgets, batches=batch, prompts=prompt, backends=backend, answer_tokens=answer,
            repeats=repeats, limit_s=limit, command=command,
        )  # fmt: skip
        files = [file]
    _say(out, files, tables, chart)


def _refuse_unknown(what: str, names: Sequence[str], known: Iterable[str]) -> None:
    """Raises: typer.BadParameter, for the first name that is not known."""
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"there is no {what} {name!r} to time; choose some of {', '.join(known)}.")


def _workload(out: Output, name: str, thresholds: Path | None, images: list[Path] | None) -> Any:
    """The model and images to measure, on the accelerator if there is one."""
    import torch

    from dymu.bench import shapes
    from dymu.bench.workload import Pretrained, Shape
    from dymu.cli import models
    from dymu.cli.calibrate import image_files
    from dymu.thresholds import Thresholds

    if name in shapes.names():
        if thresholds is not None:
            raise typer.BadParameter(f"{name} has random weights and merges as was recorded: leave --thresholds out.")
        if images:
            raise typer.BadParameter(f"{name} has random weights and is shown noise: leave --images out.")
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        with out.during(f"drawing the weights of {name}"):
            if accelerator is None:  # CPUs are slow in bfloat16
                return Shape(name, torch.device("cpu"), torch.float32)
            return Shape(name, accelerator, torch.bfloat16)
    if "/" not in name and not Path(name).exists():
        raise typer.BadParameter(f"{name!r} is neither a shape ({', '.join(shapes.names())}) nor a model's folder.")
    calibrated = Thresholds.load(thresholds or models.thresholds_beside(name))
    files = [file for path in images or [] for file in image_files(path)]
    with out.during(f"loading {name}"):
        loaded = models.load(name)
    return Pretrained(loaded.model, loaded.processor, calibrated, files or None)


def _say(out: Output, files: Sequence[Path], tables: Path | None, chart: Path | None) -> None:
    """Print what result files hold, and write the tables and the chart."""
    from dymu.bench import tables as tabulated
    from dymu.bench.results import load
    from dymu.bench.summary import summarise

    summarised = [(file, bench, summarise(bench)) for file, bench in zip(files, map(load, files), strict=True)]
    data = [
        {"file": str(file), "provenance": tabulated.provenance(bench), "checks": bench.checks, "cells": cells}
        for file, bench, cells in summarised
    ]

    def for_people() -> Any:
        for _, bench, cells in summarised:
            for cell in cells:
                columns = tabulated.header(bench.answer_tokens)
                filled = table(*columns, title=tabulated.title(cell, bench.full_tokens))
                for line in tabulated.lines(cell, brief=True):
                    filled.add_row(*line)
                yield filled
                yield from tabulated.left_out(cell) + tabulated.slower(cell)
                yield ""
            yield tabulated.provenance(bench)

    out.result({"results": msgspec.to_builtins(data)}, for_people)
    if tables is not None:
        write_text(tables, "\n\n".join(tabulated.page(bench) for _, bench, _ in summarised) + "\n")
    if chart is not None:
        from dymu.bench.chart import draw_chart

        write_whole(chart, lambda path: draw_chart(summarised[0][2], path))
