"""The tables of a result file, in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from dymu.evaluate.results import Results
from dymu.evaluate.rows import UNTOUCHED, Method, Row
from dymu.evaluate.summary import ALL, Part, RowSummary, Share

_METHODS = {
    "untouched": "untouched",
    "dtome": "DToMe",
    "tome": "ToMe",
    "pool": "average pooling",
    "random": "random keep",
    "downscale": "smaller image",
}
_UNMERGE = {
    "exact": " + VTU",
    "compact": ", compact",
    "compact-unsized": ", compact without sizes",
    "none": "",
}


def series(row: Row) -> str:
    """A row's name without its budget: rows of one name are one curve."""
    unmerge = " in place" if (row.method, row.unmerge) == ("random", "exact") else _UNMERGE[row.unmerge]
    schedule = f" ({row.schedule.replace('_', '-')})" if row.method == "dtome" else ""
    return _METHODS[row.method] + unmerge + schedule


def accuracy_table(summaries: Sequence[RowSummary], against: Method = "untouched") -> str:
    """Mean tokens, right answers over all kinds and for each, and the paired difference from `against`'s rows."""
    kinds = [kind for kind in summaries[0].accuracy if kind != ALL]
    of = summaries[0].accuracy
    header = ["", "tokens", f"all (n = {of[ALL].n})", f"against {_METHODS[against]}"]
    header += [f"{kind} ({of[kind].n})" for kind in kinds]
    lines = []
    for found in summaries:
        cells = [series(found.row), f"{found.tokens_mean:.0f} ± {found.tokens_sd:.0f}", _percent(found.accuracy[ALL])]
        cells.append(difference(found))
        for kind in kinds:
            said = f", F1 of yes {100 * found.f1[kind]:.0f}" if kind in found.f1 else ""
            cells.append(f"{100 * found.accuracy[kind].mean:.1f}{said}")
        lines.append(cells)
    return markdown(header, lines)


def kind_table(summaries: Sequence[RowSummary]) -> str:
    """Accuracy of every kind with its interval."""
    kinds = list(summaries[0].accuracy)
    header = ["", "tokens", *(f"{kind} ({summaries[0].accuracy[kind].n})" for kind in kinds)]
    return markdown(
        header,
        [
            [series(found.row), f"{found.tokens_mean:.0f}", *(_percent(found.accuracy[kind]) for kind in kinds)]
            for found in summaries
        ],
    )


def part_table(parts: Sequence[tuple[Part, Sequence[RowSummary]]], against: Method = "untouched") -> str:
    """For each part of the examples: mean tokens, right answers, and the paired difference from `against`'s rows."""
    header = [""]
    for part, summaries in parts:
        span = " to ".join(dict.fromkeys((_short(part.low), _short(part.high))))
        header += [f"{part.measure} {span} (n = {summaries[0].accuracy[ALL].n})", f"against {_METHODS[against]}"]
    lines = []
    for rows in zip(*(summaries for _, summaries in parts), strict=True):
        line = [f"{series(rows[0].row)}{f', {rows[0].row.budget}' if rows[0].row.budget else ''}"]
        for found in rows:
            right = f"{100 * found.accuracy[ALL].mean:.1f} at {found.tokens_mean:.0f} tokens"
            line += [right, difference(found)]
        lines.append(line)
    return markdown(header, lines)


def cost_table(summaries: Sequence[RowSummary]) -> str:
    """What a prompt costs; empty where nothing was timed."""
    timed = [(found, found.costs) for found in summaries if found.costs is not None]
    if not timed:
        return ""
    header = ["", "tokens", "encoder ms", "prefill ms", "ms per token after", "TFLOPs", "KV cache MB"]
    return markdown(
        header,
        [
            [series(found.row), f"{costs.tokens:.0f}", f"{costs.encoder_ms:.0f}", f"{costs.prefill_ms:.0f}",
             f"{costs.decode_ms_per_token:.1f}", f"{costs.tflops:.3f}", f"{costs.cache_bytes / 1e6:.2f}"]
            for found, costs in timed
        ],
    )  # fmt: skip


def provenance(results: Results) -> str:
    """One line: what the numbers were measured with."""
    header = results.header
    model, versions = header["model"], header["versions"]
    revision = f" at {model['revision'][:12]}" if model["revision"] else ""
    tasks = ", ".join(f"{name} ({task['length']})" for name, task in header["tasks"].items())
    tools = ", ".join(f"{name} {number}" for name, number in versions.items())
    return (
        f"{model['name']}{revision} (weights {model['weights']}, {model['dtype']}); {tasks}; seed {header['seed']}; "
        f"{header['device']}; {tools}; {header['date'][:10]}"
    )


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    rows: Iterator[Sequence[Any]] = iter([header, ["---"] * len(header), *lines])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _percent(found: Share) -> str:
    return f"{100 * found.mean:.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def difference(found: RowSummary) -> str:
    """Points over all kinds against the row it is compared with, and that one's tokens unless it is untouched."""
    if found.against is None:
        return ""
    tokens = "" if found.against == UNTOUCHED else f" ({found.against_tokens:.0f} tokens)"
    return points(found.difference[ALL]) + tokens


def points(found: Share) -> str:
    """A difference with its interval, in points of percent."""
    return f"{100 * found.mean:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
