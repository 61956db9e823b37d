"""`dymu evaluate` and `dymu report`: accuracy against image tokens, with tables and charts."""

from __future__ import annotations

import contextlib
import inspect
import runpy
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from dymu.choices import UNMERGE
from dymu.cli import errors
from dymu.cli.app import (
    CHARTS,
    MEASURE,
    Debug,
    DemoOrModel,
    Device,
    Dtype,
    Json,
    Ray,
    Revision,
    Workers,
    app_command,
    check_workers,
    parse_budget,
    quieten_transformers,
)
from dymu.cli.output import Output, check_writable, write_text, write_whole
from dymu.errors import DymuError
from dymu.evaluation.methods import COMPARED, METHODS, Row, rows_for
from dymu.files import expanded

UnmergeName = StrEnum("UnmergeName", [(name.upper(), name) for name in UNMERGE])  # type: ignore[misc]

BUDGETS = ["0.3", "0.15"]
ATTENDED = [UnmergeName("exact")]
USUAL = ["dtome", "tome", "random"]


def _method(text: str) -> str:
    """The name of a method, and its further arguments."""
    name, _, options = text.partition(":")
    if name not in COMPARED:
        raise typer.BadParameter(f"{name!r} is no method to compare; choose some of {', '.join(COMPARED)}.")
    try:
        METHODS[name].check_options(options)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    return text


def _check_arguments(text: str) -> None:
    name, _, options = text.partition(":")
    method = METHODS[name]
    row = Row(name, 1, "none", (method.schedules or ("",))[0], options)
    try:
        rows_for([1], [text])
        if not method.takes_number:
            return
        if method.pruning:
            method.make_pruning(row, 1.0, 0, 64)
        else:
            method.make(row, 0.5, 0)
    except ValueError as error:
        raise typer.BadParameter(f"--method {text}: {error}") from error


@app_command(MEASURE, "dymu evaluate models/demo --task my-questions/ -b 0.3 -b 0.15 -o results.jsonl")
def evaluate(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE.jsonl", help="The result file; one there is continued.")
    ],
    task: Annotated[
        list[Path],
        typer.Option("--task", "-t", metavar="FOLDER|FILE.py", help="What to ask: a folder with questions.jsonl, or a "
                     "Python file whose task() gives a task. Give several."),
    ],
    model: DemoOrModel = None,
    thresholds: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE|PATH|ID", help="When DToMe merges; one file for each schedule.",
                     show_default="thresholds.json beside the model"),
    ] = None,
    budget: Annotated[
        list[str],
        typer.Option("--budget", "-b", metavar="N|0.15", help="Image tokens to keep on average. Give several."),
    ] = BUDGETS,
    method: Annotated[
        list[str],
        typer.Option("--method", "-m", metavar="NAME[:ARG=…]", parser=_method,
                     help="How to reduce image tokens, see dymu methods; holo-v:stretches=8. Give several."),
    ] = USUAL,
    unmerge: Annotated[
        list[UnmergeName],
        typer.Option("--unmerge", "-u", metavar="NAME",
                     help=f"How the language model attends to them: {', '.join(UNMERGE)}. Give several."),
    ] = ATTENDED,
    limit: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Questions per task.", show_default="all")
    ] = None,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Questions answered together.")] = 8,
    timed: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, help="Questions per task of which every row is timed.",
                     show_default="8; with --ray 0"),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of all random numbers.")] = 0,
    ray: Ray = None,
    workers: Workers = None,
    device: Device = None,
    dtype: Dtype = None,
    revision: Revision = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Compare methods that reduce image tokens: accuracy, tokens, time, memory."""
    from dymu.cli import models
    from dymu.evaluation.results import Results
    from dymu.evaluation.tasks import check_tasks

    out = Output(as_json)
    check_workers(ray, workers)
    budgets = [parse_budget(text) for text in budget]
    check_writable(output, "results", (".jsonl",))
    before = list[Row]()
    if expanded(output).is_file() and expanded(output).stat().st_size:
        before = Results.load(output).header.rows
    tasks = [_task(expanded(path)) for path in task]  # before anything heavy is loaded
    check_tasks(tasks)
    named = models.named(model or models.demo_model(), revision)
    named.check_budgets(budgets)
    by_thresholds = any(text.partition(":")[0] == "dtome" for text in method)
    files: list[Any] = thresholds or ([None] if by_thresholds else [])
    calibrated = [named.thresholds(file) for file in files]
    for each in calibrated:
        for tokens in budgets:
            each.tokens_for(tokens)
    if calibrated and not by_thresholds:
        out.note("only dtome merges by --thresholds, and it is not compared: add -m dtome.")
    schedules = [each.schedule or "" for each in calibrated]
    if len(set(schedules)) < len(schedules):
        raise typer.BadParameter("two of the --thresholds files are of one schedule; give one for each.")
    with out.during("loading torch and transformers"):
        quieten_transformers()
        from dymu.evaluation.rows import check_budget, check_from
        from dymu.evaluation.run import evaluate as run_all
        from dymu.evaluation.run import full_tokens
        from dymu.evaluation.solve import solved
    for text in method:
        if ":" in text:
            _check_arguments(text)
    with out.during(f"loading {named.name}"):
        loaded = models.load(named, device, dtype)
    full = full_tokens(loaded.model, loaded.processor, calibrated, tasks)
    rows = rows_for(
        [max(round(each * full if isinstance(each, float) and each <= 1 else each), 1) for each in budgets],
        method, [item.value for item in unmerge], schedules or ["constant"],
    )  # fmt: skip
    for row in rows:  # before any is solved
        check_budget(row, full)
        check_from(row, loaded.model)
    rows = solved(
        rows, loaded.model, loaded.processor, tasks, limit=limit, batch_size=batch_size, before=before, say=out.note
    )
    if timed is None:
        timed = 0 if ray else 8
    elif timed and ray:
        raise typer.BadParameter("--timed is for one process: workers beside each other slow each other down.")

    def build() -> dict[str, Any]:
        """What a worker needs."""
        quieten_transformers()
        own = models.load(named, device, dtype)
        own_tasks = [_task(expanded(path)) for path in task]
        return {"model": own.model, "processor": own.processor, "tasks": own_tasks, "thresholds": calibrated}

    with contextlib.ExitStack() as opened:
        over_ray = None
        if ray is not None:
            from dymu.integrations import on_ray

            with out.during("starting Ray"):
                opened.enter_context(on_ray.started(ray))
            over_ray = on_ray.evaluating(build, workers)
        results = run_all(
            loaded.model, loaded.processor, tasks, rows, output, thresholds=calibrated, limit=limit,
            batch_size=batch_size, timed=timed, seed=seed, workers=over_ray,
        )  # fmt: skip
    _say(out, [(output, results)])
    out.wrote(output)


@app_command(MEASURE, "dymu report results.jsonl --chart results.png")
def report(
    results: Annotated[list[Path], typer.Argument(metavar="RESULTS", help="Files that `dymu evaluate` wrote.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE.md", help="Write the tables into this file.")
    ] = None,
    chart: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw accuracy against tokens and time (one file only).")
    ] = None,
    unmerge: Annotated[
        list[UnmergeName] | None,
        typer.Option("--unmerge", "-u", metavar="NAME", show_default="all",
                     help="Only rows that unmerge so, and those with nothing to unmerge. Give several."),
    ] = None,
    against: Annotated[
        str,
        typer.Option(metavar="METHOD",
                     help="Tell differences from this method's rows at the nearest budget; "
                     "with arguments (holo-v:stretches=8), from rows with these."),
    ] = "untouched",
    by: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MEASURE",
            help="Tell thirds of the questions apart by how complex their images are: "
            "bytes, pixels, objects, … as the task knows. Give several.",
        ),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Make the tables and the picture of result files, finished or not."""
    from dymu.evaluation.results import Results

    out = Output(as_json)
    if output is not None:
        check_writable(output, "the tables", (".md",))
    if chart is not None:
        check_writable(chart, "the chart", CHARTS)
        if len(results) > 1:
            raise typer.BadParameter("--chart draws one result file; give one.")
    read = [(path, Results.load(path)) for path in results]
    if unmerge:
        read = [(path, _only(path, loaded, [way.value for way in unmerge])) for path, loaded in read]
    pages = _say(out, read, against, by or [], quiet=output is not None)
    if output is not None:
        write_text(output, "\n\n".join(pages) + "\n")
        out.wrote(output)
    if chart is not None:
        from dymu.evaluation.chart import draw_chart
        from dymu.evaluation.summary import summarise

        summaries = summarise(read[0][1])
        write_whole(chart, lambda path: draw_chart(summaries, path))
        out.wrote(chart)


def _task(path: Path) -> Any:
    """The task of a folder or of a Python file, which is run.

    Raises:
        BadInput: the path holds no task.
    """
    from dymu.evaluation.tasks import Task
    from dymu.evaluation.tasks.folder import QUESTIONS, Folder

    known = f"name a folder with {QUESTIONS}, or a Python file whose task() gives a task."
    if path.is_dir():
        if not (path / QUESTIONS).is_file():
            raise errors.BadInput(f"{path} is a folder without {QUESTIONS}: {known}")
        return Folder(path)
    if not path.exists():
        raise errors.BadInput(f"{path} does not exist: {known}")
    if path.suffix != ".py":
        raise errors.BadInput(f"{path} is neither a folder nor a Python file: {known}")
    _add_to_search_path(path)
    try:
        names = runpy.run_path(str(path), run_name=f"dymu_task_{path.stem}")
    except SyntaxError as error:
        raise errors.BadInput(f"{path} cannot be read as Python ({errors.one_line(error)}): mend it.") from error
    except (Exception, SystemExit) as error:
        raise errors.BadInput(f"{path} cannot be run ({_why(error)}): mend it.") from error
    if "task" not in names:
        raise errors.BadInput(f"{path} has no function task(): write one that gives a task, see docs/evaluation.md.")
    try:
        task = names["task"]() if callable(names["task"]) else names["task"]
        is_task = isinstance(task, Task) and not isinstance(task, type)
    except (Exception, SystemExit) as error:
        raise errors.BadInput(f"task() of {path} cannot be run ({_why(error)}): mend it.") from error
    if inspect.iscoroutine(task):
        task.close()  # else Python warns that nobody awaited it
    if not is_task:
        kind = type(task).__name__
        raise errors.BadInput(f"task() of {path} gives a {kind}, which is no task: see docs/evaluation.md.")
    return task


def _why(error: BaseException) -> str:
    return f"{type(error).__name__}: {errors.one_line(error)}".rstrip(".")


def _add_to_search_path(path: Path) -> None:
    """Put the folder of a Python file, or the one that holds its package, at the end of the search path."""
    folder = path.resolve().parent
    while (folder / "__init__.py").is_file():
        folder = folder.parent
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _say(
    out: Output,
    read: list[tuple[Path, Any]],
    against: str = "untouched",
    by: Sequence[str] = (),
    quiet: bool = False,
) -> list[str]:
    """Print the tables of result files, and return the Markdown of each."""
    from dymu.evaluation import tables
    from dymu.evaluation.summary import parts_by, skipped, summarise

    pages, printed = [], []
    for path, results in read:
        methods = dict.fromkeys(
            name
            for row in results.header.rows
            for name in (row.method, *([f"{row.method}:{row.options}"] if row.options else ()))
        )
        if against not in ("untouched", *methods):
            raise errors.BadInput(f"{path} has no rows of {against}; compare with one of: {', '.join(methods)}.")
        left_out = skipped(results)
        if left_out:
            were = "question was" if len(left_out) == 1 else "questions were"
            out.note(f"{path}: {len(left_out)} {were} left out: {'; '.join(left_out)}")
        if unfinished := _unfinished(results):
            out.note(f"{path} is unfinished: {unfinished}; the same dymu evaluate again goes on from there.")
        summaries = summarise(results, against=against)
        if not summaries:
            raise errors.BadInput(
                f"{path} holds no question that every row has answered: let it run on, or mend images or questions."
            )
        try:
            split = {
                measure: [(part, summarise(results, part, against)) for part in parts_by(results, measure)]
                for measure in by
            }
        except DymuError as error:
            raise errors.BadInput(f"{path}: {error}") from error
        page = [
            f"**{path}**" if len(read) > 1 else "",
            tables.accuracy_table(summaries, against),
            *(tables.part_table(parts, against) for parts in split.values()),
            tables.cost_table(summaries),
            f"<sub>{tables.provenance(results)}</sub>",
        ]
        pages.append("\n\n".join(filter(None, page)))
        printed.append(
            {
                "file": str(path),
                "rows": _rows(summaries),
                "by": {
                    measure: [{"low": part.low, "high": part.high, "rows": _rows(rows)} for part, rows in parts]
                    for measure, parts in split.items()
                },
                "skipped": left_out,
            }
        )
    if out.as_json or not quiet:
        out.result({"against": against, "results": printed}, lambda: out.markdown(pages))
    return pages


def _only(path: Path, results: Any, ways: list[str]) -> Any:
    """The results without other ways to unmerge.

    Raises:
        BadInput: that leaves nothing to compare.
    """
    from dymu.evaluation.methods import way_of

    there = dict.fromkeys(way_of(row) for row in results.header.rows if row.budget)
    if not there.keys() & set(ways):
        raise errors.BadInput(
            f"{path} has no rows that unmerge by {' or '.join(ways)}; take some of: {', '.join(there) or '(none)'}."
        )
    return results.only(ways)


def _unfinished(results: Any) -> str:
    """How many of the questions every row has answered; empty where that is all of them."""
    total = sum(task["length"] for task in results.header.tasks.values())
    examples = results.examples
    counts = [
        sum(len(examples[batch].index) + len(examples[batch].skipped) for batch in results.answers.get(row.key, {}))
        for row in results.header.rows
    ]
    return f"{min(counts):,} of {total:,} questions are answered in every way" if min(counts) < total else ""


def _rows(summaries: Sequence[Any]) -> list[dict[str, Any]]:
    from dymu.evaluation.tables import series

    return [{"name": series(summary.row), **msgspec.to_builtins(summary)} for summary in summaries]
