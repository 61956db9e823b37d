"""The tables of a result file, in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from dymu.evaluation.methods import FORMER, METHODS, UNTOUCHED, Row
from dymu.evaluation.results import Results
from dymu.evaluation.summary import ALL, Part, RowSummary, Share
from dymu.measure.markdown import markdown

_UNMERGE = {
    "exact": " + VTU",
    "representative": " + VTU by representatives",
    "compact": ", compact",
    "original": ", original",
    FORMER: ", original",
    "restore": ", RESTORE",
    "none": "",
}
LIKENESS = ["same answer, %", "KL per token, nats"]
"""Headings of the cells of `likeness`."""


def series(row: Row) -> str:
    """A row's name without its budget; rows of the same name form one curve."""
    single = row.unmerge == "exact" and METHODS[row.method].unmerges("compact", row.options) == "exact"
    unmerge = " in place" if single else _UNMERGE[row.unmerge]
    schedule = f" ({row.schedule.replace('_', '-')})" if row.method == "dtome" else ""
    return labelled(row.method, row.options) + unmerge + schedule


def labelled(method: str, options: str) -> str:
    """How tables call a method with some arguments."""
    return METHODS[method].label + (f" {options}" if options else "")


def accuracy_table(summaries: Sequence[RowSummary], against: str = "untouched") -> str:
    """Mean tokens, right answers over all kinds and for each, paired differences from `against`'s rows, `likeness`."""
    of_kind = {kind: share.n for kind, share in summaries[0].accuracy.items() if kind != ALL}
    header = ["", "tokens", f"all (n = {summaries[0].accuracy[ALL].n})", _against(against)]
    header += [*LIKENESS, *(f"{kind} ({count})" for kind, count in of_kind.items())]
    lines = []
    for row in summaries:
        cells = [series(row.row), f"{row.tokens_mean:.0f} ± {row.tokens_sd:.0f}", _percent(row.accuracy[ALL])]
        cells += [difference(row), *likeness(row)]
        for kind in of_kind:
            f1 = row.f1.get(kind)
            of_yes = f", F1 of yes {'–' if f1 is None else f'{100 * f1:.0f}'}" if kind in row.f1 else ""
            cells.append(f"{100 * row.accuracy[kind].mean:.1f}{of_yes}")
        lines.append(cells)
    return markdown(header, lines)


def part_table(parts: Sequence[tuple[Part, Sequence[RowSummary]]], against: str = "untouched") -> str:
    """For each part of the examples: mean tokens, right answers, and the paired difference from `against`'s rows."""
    header = [""]
    for part, summaries in parts:
        span = " to ".join(dict.fromkeys((_short(part.low), _short(part.high))))
        header += [f"{part.measure} {span} (n = {summaries[0].accuracy[ALL].n})", _against(against)]
    lines = []
    for rows in zip(*(summaries for _, summaries in parts), strict=True):
        line = [f"{series(rows[0].row)}{f', {rows[0].row.budget}' if rows[0].row.budget else ''}"]
        for row in rows:
            line += [f"{100 * row.accuracy[ALL].mean:.1f} at {row.tokens_mean:.0f} tokens", difference(row)]
        lines.append(line)
    return markdown(header, lines)


def cost_table(summaries: Sequence[RowSummary]) -> str:
    """Costs of a prompt; empty where nothing was timed."""
    timed = [(summary.row, summary.costs) for summary in summaries if summary.costs is not None]
    if not timed:
        return ""
    header = ["", "tokens", "encoder ms", "prefill ms", "ms per token after", "TFLOPs", "KV cache MB"]
    return markdown(
        header,
        [
            [series(row), f"{costs.tokens:.0f}", f"{costs.encoder_ms:.0f}", f"{costs.prefill_ms:.0f}",
             f"{costs.decode_ms_per_token:.1f}", f"{costs.tflops:.3f}", f"{costs.cache_bytes / 1e6:.2f}"]
            for row, costs in timed
        ],
    )  # fmt: skip


def provenance(results: Results) -> str:
    """One line: model, tasks, seed, device, versions and date."""
    header, model = results.header, results.header.model
    revision = f" at {model.revision[:12]}" if model.revision else ""
    tasks = ", ".join(f"{name} ({task['length']})" for name, task in header.tasks.items())
    versions = ", ".join(f"{name} {number}" for name, number in header.versions.items())
    line = (
        f"{model.name}{revision} (weights {model.weights}, {model.dtype}); {tasks}; seed {header.seed}; "
        f"{header.device}; {versions}; {header.date[:10]}"
    )
    return " ".join(line.split())


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _percent(share: Share) -> str:
    return f"{100 * share.mean:.1f} [{100 * share.low:.1f}, {100 * share.high:.1f}]"


def likeness(summary: RowSummary, kind: str = ALL) -> list[str]:
    """How many answers are the untouched model's, and KL(untouched ‖ row), with their intervals; – where unknown."""
    same, divergence = summary.same.get(kind), summary.divergence.get(kind)
    if same is None:
        cells = ["–"]
    else:
        cells = [f"{100 * same.mean:.1f}" if same.low == same.high else _percent(same)]
    if divergence is None:
        return [*cells, "–"]
    of = f" (n = {divergence.n})" if divergence.n < summary.accuracy[kind].n else ""
    span = "" if divergence.low == divergence.high else f" [{divergence.low:.3g}, {divergence.high:.3g}]"
    return [*cells, f"{divergence.mean:.3g}{span}{of}"]


def _against(method: str) -> str:
    name, _, options = method.partition(":")
    return f"against {labelled(name, options)}"


def difference(summary: RowSummary) -> str:
    """Points over all kinds against the row it is compared with, and that row's tokens unless it is untouched."""
    if summary.against is None:
        return ""
    tokens = "" if summary.against == UNTOUCHED else f" ({summary.against_tokens:.0f} tokens)"
    return points(summary.difference[ALL]) + tokens


def points(share: Share) -> str:
    """A difference with its interval, in points of percent."""
    return f"{100 * share.mean:+.1f} [{100 * share.low:+.1f}, {100 * share.high:+.1f}]"
