"""`dymu evaluate` and `dymu report`: accuracy against image tokens, and the tables and pictures of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dymu.cli import errors
from dymu.cli.commands import PICTURES, Debug, Json, app, parse_budget, quieten_transformers
from dymu.cli.output import Output, check_writable, write_whole
from dymu.errors import DymuError

if TYPE_CHECKING:
    from dymu.evaluate import Method

CHARTS = (*PICTURES[:1], ".svg", ".pdf")


class MethodName(StrEnum):
    """See `dymu.evaluate.Row`."""

    DTOME = "dtome"
    TOME = "tome"
    POOL = "pool"
    RANDOM = "random"
    DOWNSCALE = "downscale"


class UnmergeName(StrEnum):
    """See `dymu.unmerging.Unmerge`."""

    EXACT = "exact"
    COMPACT = "compact"
    COMPACT_UNSIZED = "compact-unsized"
    NONE = "none"


BUDGETS = ["0.3", "0.15"]
ATTENDED = [UnmergeName.EXACT]
COMPARED = [MethodName.DTOME, MethodName.TOME, MethodName.RANDOM]


@app.command()
def evaluate(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE.jsonl", help="The result file; one there is continued.")
    ],
    task: Annotated[
        list[str],
        typer.Option("--task", "-t", metavar="NAME|FOLDER", help="What to ask: composed, photos, or a folder of one's "
                     "own with questions.jsonl. Give several."),
    ],
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="A model's folder or hub name.", show_default="the demo model"),
    ] = None,
    thresholds: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="When DToMe merges; one file for each schedule.",
                     show_default="thresholds.json beside the model"),
    ] = None,
    budget: Annotated[
        list[str],
        typer.Option("--budget", "-b", metavar="N|0.15", help="Image tokens to keep on average. Give several."),
    ] = BUDGETS,
    method: Annotated[
        list[MethodName],
        typer.Option("--method", "-m", help="How to have fewer tokens. Give several."),
    ] = COMPARED,
    unmerge: Annotated[
        list[UnmergeName],
        typer.Option("--unmerge", "-u", help="How the language model attends to them. Give several."),
    ] = ATTENDED,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions per task.", show_default="all")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered together.")] = 8,
    timed: Annotated[int, typer.Option(min=0, help="Questions per task of which every row is timed.")] = 8,
    seed: Annotated[int, typer.Option(help="Of what is drawn at random.")] = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Compare ways of having fewer image tokens: accuracy, tokens, time, memory."""
    from dymu.cli import models
    from dymu.thresholds import Thresholds

    out = Output(as_json)
    budgets = [parse_budget(text) for text in budget]
    check_writable(output, "results", (".jsonl",))
    name = model or models.demo_model()
    files = thresholds or ([models.thresholds_beside(name)] if "dtome" in method else [])
    read = [Thresholds.load(file) for file in files]
    schedules = [found.schedule or "" for found in read]
    if len(set(schedules)) < len(schedules):
        raise typer.BadParameter("two of the --thresholds files are of one schedule; give one for each.")
    with out.step("loading torch and transformers"):
        quieten_transformers()
        from dymu.evaluate import evaluate as run_all
        from dymu.evaluate import rows_for
        from dymu.evaluate.run import full_tokens
    tasks = [_task(text) for text in task]
    with out.step(f"loading {name}"):
        loaded = models.load(name)
    full = full_tokens(loaded.model, loaded.processor, read)
    rows = rows_for(
        [max(round(wanted * full if isinstance(wanted, float) and wanted <= 1 else wanted), 1) for wanted in budgets],
        [item.value for item in method], [item.value for item in unmerge], schedules or ["constant"],  # type: ignore[arg-type]
    )  # fmt: skip
    results = run_all(
        loaded.model, loaded.processor, tasks, rows, output,
        thresholds=read, limit=limit, batch_size=batch_size, timed=timed, seed=seed,
    )  # fmt: skip
    _say(out, [(output, results)])


@app.command()
def report(
    results: Annotated[list[Path], typer.Argument(metavar="RESULTS...", help="Files that `dymu evaluate` wrote.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE.md", help="Write the tables into this file.")
    ] = None,
    chart: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw accuracy against tokens and time (one file only).")
    ] = None,
    against: Annotated[
        MethodName | None,
        typer.Option(help="Tell differences from this method's rows at the nearest budget.", show_default="untouched"),
    ] = None,
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
) -> None:
    """Make the tables and the picture of result files, finished or not."""
    from dymu.evaluate.results import Results

    out = Output(as_json)
    if output is not None:
        check_writable(output, "the tables", (".md",))
    if chart is not None:
        check_writable(chart, "the chart", CHARTS)
        if len(results) > 1:
            raise typer.BadParameter("--chart draws one result file; give one.")
    read = [(path, Results.load(path)) for path in results]
    pages = _say(out, read, against.value if against else "untouched", by or [], quiet=output is not None)
    if output is not None:
        write_whole(output, lambda path: _write(path, "\n\n".join(pages) + "\n"))
    if chart is not None:
        from dymu.evaluate.chart import draw_chart
        from dymu.evaluate.summary import summarise

        found = summarise(read[0][1])
        write_whole(chart, lambda path: draw_chart(found, path))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _task(text: str) -> Any:
    from dymu.tasks import TASKS
    from dymu.tasks.folder import Folder

    if text in TASKS:
        return TASKS[text]()
    folder = Path(text).expanduser()
    if not folder.is_dir():
        raise errors.BadInput(
            f"{text} is neither a task ({', '.join(TASKS)}) nor a folder: name one, or a folder with questions.jsonl."
        )
    return Folder(folder)


def _say(
    out: Output,
    read: list[tuple[Path, Any]],
    against: Method = "untouched",
    by: Sequence[str] = (),
    quiet: bool = False,
) -> list[str]:
    """Print what the files say, and return the Markdown of each."""
    from dymu.evaluate import tables
    from dymu.evaluate.summary import parts_by, rows_of, skipped, summarise

    for path, results in read:
        methods = {row.method: None for row in rows_of(results)}
        if against != "untouched" and against not in methods:
            raise errors.BadInput(f"{path} has no rows of {against}; compare with one of: {', '.join(methods)}.")
    found = [(path, results, summarise(results, against=against)) for path, results in read]
    for path, results, summaries in found:
        left_out = skipped(results)
        if left_out:
            out.note(f"{path}: {len(left_out)} questions were left out: {'; '.join(left_out)}")
        if not summaries or not summaries[0].accuracy:
            raise errors.BadInput(
                f"{path} holds no question that every row has answered: let it run on, or mend images."
            )
    pages, told = [], []
    for path, results, summaries in found:
        try:
            split = {
                measure: [(part, summarise(results, part, against)) for part in parts_by(results, measure)]
                for measure in by
            }
        except DymuError as error:
            raise errors.BadInput(f"{path}: {error}") from error
        page = [
            f"**{path}**" if len(found) > 1 else "",
            tables.accuracy_table(summaries, against),
            *(tables.part_table(parts, against) for parts in split.values()),
            tables.cost_table(summaries),
            f"<sub>{tables.provenance(results)}</sub>",
        ]
        pages.append("\n\n".join(part for part in page if part))
        told.append(
            {
                "file": str(path),
                "rows": _rows(summaries),
                "by": {
                    measure: [{"low": part.low, "high": part.high, "rows": _rows(rows)} for part, rows in parts]
                    for measure, parts in split.items()
                },
                "skipped": skipped(results),
            }
        )
    data = {"against": against, "results": told}
    if out.as_json or not quiet:
        out.result(data, lambda: pages)
    return pages


def _rows(summaries: Sequence[Any]) -> list[dict[str, Any]]:
    from dymu.evaluate.tables import series

    return [{"name": series(found.row), **asdict(found)} for found in summaries]
