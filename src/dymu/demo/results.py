"""Result files of `dymu evaluate` as a table and a chart: method by tokens, with intervals."""

from __future__ import annotations

from pathlib import Path

from dymu.demo import html, plots
from dymu.errors import DymuError
from dymu.evaluation.methods import METHODS, UNTOUCHED
from dymu.evaluation.results import Results
from dymu.evaluation.summary import ALL, RowSummary, summarise
from dymu.evaluation.tables import difference, likeness, provenance, series
from dymu.measure.results import BadResults

MOST_BYTES = 50 * 2**20
MOST_FILES = 8


def page(files: list[tuple[str, str]]) -> str:
    """All files one after the other, each a section; of one that cannot be read, the sentence that says why.

    Args:
        files: path and name of each.
    """
    if len(files) > MOST_FILES:
        return html.error(f"{len(files)} files are more than the {MOST_FILES} that this page shows: choose fewer.")
    return f'<div class="dymu-result">{"".join(_section(path, name) for path, name in files)}</div>'


def _section(path: str, name: str) -> str:
    try:
        inside = _of_file(Path(path), name)
    except DymuError as error:
        inside = html.error(str(error).replace(path, name))
    return html.section(name, inside)


def _of_file(path: Path, name: str) -> str:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise BadResults(f"{name} is not here any more: choose it again.") from error
    if size > MOST_BYTES:
        raise BadResults(
            f"{name} has more than the {MOST_BYTES // 2**20} MiB that this page reads: show it with dymu report."
        )
    results = Results.load(path)
    summaries = summarise(results)
    if not summaries:
        raise BadResults(f"no question of {name} is answered in every way yet: let dymu evaluate go on.")
    return chart(summaries) + accuracy(summaries) + f'<p class="dymu-fine">{html.text(provenance(results))}</p>'


def accuracy(summaries: list[RowSummary]) -> str:
    """One row for each method and budget."""
    count = summaries[0].accuracy[ALL].n
    header = [
        "method",
        "image tokens",
        f"right, % of {count:,}",
        "against untouched, points",
        "same answer, %",
        "KL, nats",
    ]
    lines = []
    for row in summaries:
        share = row.accuracy[ALL]
        right = f"{100 * share.mean:.1f} [{100 * share.low:.1f}, {100 * share.high:.1f}]"
        tokens = f"{row.tokens_mean:.0f} ± {row.tokens_sd:.0f}"
        lines.append([series(row.row), tokens, right, difference(row) or "–", *likeness(row)])
    return html.table("Right answers by method and image tokens, with 95 % intervals", header, lines)


def chart(summaries: list[RowSummary]) -> str:
    """Right answers against image tokens."""
    curves: dict[str, list[RowSummary]] = {}
    for summary in summaries:
        curves.setdefault(series(summary.row), []).append(summary)
    drawn = []
    for name, rows in curves.items():
        dots = []
        for row in sorted(rows, key=lambda row: row.tokens_mean):
            share = row.accuracy[ALL]
            about = f"{name}: {100 * share.mean:.1f} % at {row.tokens_mean:.0f} tokens"
            dots.append(plots.Dot(row.tokens_mean, 100 * share.mean, about, 100 * share.low, 100 * share.high))
        method = METHODS[rows[0].row.method]
        level = rows[0].row == UNTOUCHED
        colour, plain = "" if level else method.colour, rows[0].row.unmerge == "none"
        drawn.append(plots.Series(name, dots, colour, line=True, hollow=plain and not level, level=level))
    return plots.plot("Right answers against image tokens", "image tokens, mean", "right answers, %", drawn, False)
