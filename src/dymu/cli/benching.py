"""`dymu bench`: how long and how much memory, with DyMU and without."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from dymu.cli.commands import Debug, Json, app, parse_budget, quieten_transformers
from dymu.cli.evaluating import CHARTS
from dymu.cli.output import Output, check_writable, table, write_whole

BUDGETS = ["0.15", "0.3"]
BATCHES = [1]
LAYOUT = ["image-text"]
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
    layout: Annotated[
        list[str],
        typer.Option(help="image-text, text-image-text (long text first) or two-images. Give several."),
    ] = LAYOUT,
    backend: Annotated[list[str], typer.Option(help="Of DyMU's attention. Give several.")] = BACKEND,
    answer: Annotated[int, typer.Option(min=1, help="Tokens of the answer in the time from end to end.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds, each timing every variant once.")] = 7,
    limit: Annotated[float, typer.Option(min=1, help="Seconds for one budget, batch and layout.")] = 300,
    thresholds: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="When a model with weights of its own merges.",
                     show_default="thresholds.json beside the model"),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE.json", help="The result file; one there is continued.",
                     show_default="bench-MODEL.json"),
    ] = None,
    report: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE.json", help="Measure nothing; tell what this result file holds. Give several."),
    ] = None,
    tables: Annotated[Path | None, typer.Option(metavar="FILE.md", help="Write the tables into this file.")] = None,
    chart: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw time against tokens (one result file only).")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Time the model as it is and with DyMU, at every budget, batch and layout."""
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
        with out.step("loading torch and transformers"):
            quieten_transformers()
            from dymu.bench.layouts import LAYOUTS
            from dymu.bench.run import bench as run_all
            from dymu.bench.variants import timed_backends
        _refuse_unknown("layout", layout, LAYOUTS)
        _refuse_unknown("backend", backend, timed_backends())
        subject = _subject(out, name, thresholds)
        command = shlex.join(["dymu", *sys.argv[1:]])
        run_all(
            subject, file, budgets=budgets, batches=batch, layouts=layout, backends=backend, answer_tokens=answer,
            repeats=repeats, limit_s=limit, command=command,
        )  # fmt: skip
        files = [file]
    _say(out, files, tables, chart)


def _refuse_unknown(what: str, given: Sequence[str], known: Iterable[str]) -> None:
    """Raises: typer.BadParameter, for the first that is not known."""
    for name in given:
        if name not in known:
            raise typer.BadParameter(f"there is no {what} {name!r} to time; choose some of {', '.join(known)}.")


def _subject(out: Output, name: str, thresholds: Path | None) -> Any:
    """What is measured, on the accelerator if there is one."""
    import torch

    from dymu.bench import shapes
    from dymu.bench.subject import Pretrained, Shape
    from dymu.cli import models
    from dymu.thresholds import Thresholds

    if name in shapes.names():
        if thresholds is not None:
            raise typer.BadParameter(f"{name} has random weights and merges as was recorded: leave --thresholds out.")
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        with out.step(f"drawing the weights of {name}"):
            if accelerator is None:  # CPUs are slow in bfloat16
                return Shape(name, torch.device("cpu"), torch.float32)
            return Shape(name, accelerator, torch.bfloat16)
    if "/" not in name and not Path(name).exists():
        raise typer.BadParameter(f"{name!r} is neither a shape ({', '.join(shapes.names())}) nor a model's folder.")
    read = Thresholds.load(thresholds or models.thresholds_beside(name))
    with out.step(f"loading {name}"):
        loaded = models.load(name)
    return Pretrained(loaded.model, loaded.processor, read)


def _say(out: Output, files: Sequence[Path], tables: Path | None, chart: Path | None) -> None:
    """Print what result files hold, and write the tables and the chart."""
    from dymu.bench import tables as made
    from dymu.bench.results import load
    from dymu.bench.summary import summarise

    read = [(file, load(file)) for file in files]
    found = [(file, results, summarise(results)) for file, results in read]
    data = {
        "results": [
            {
                "file": str(file),
                "provenance": made.provenance(results),
                "checks": results["checks"],
                "cells": [asdict(cell) for cell in cells],
            }
            for file, results, cells in found
        ]
    }

    def for_people() -> Any:
        for _, results, cells in found:
            for cell in cells:
                filled = table(*made.header(results["answer_tokens"]), title=made.title(cell, results["full_tokens"]))
                for line in made.lines(cell, brief=True):
                    filled.add_row(*line)
                yield filled
                yield from made.left_out(cell) + made.slower(cell)
                yield ""
            yield made.provenance(results)

    out.result(data, for_people)
    if tables is not None:
        pages = "\n\n".join(made.page(results) for _, results in read)
        write_whole(tables, lambda path: _write(path, pages + "\n"))
    if chart is not None:
        from dymu.bench.chart import draw_chart

        write_whole(chart, lambda path: draw_chart(found[0][2], path))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
