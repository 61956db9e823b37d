"""The tables of a result file: for a terminal and in Markdown, from the same cells."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dymu.bench.quality import beside, told
from dymu.bench.results import Bench
from dymu.bench.summary import PARTS, REALISED, CellSummary, Line, summarise
from dymu.evaluation.summary import RowSummary
from dymu.measure.markdown import markdown

MIB = 2**20


def title(cell: CellSummary, full_tokens: int) -> str:
    """The cell's prompt, batch and tokens."""
    spread = f" ({min(cell.kept)} to {max(cell.kept)})" if len(cell.kept) > 1 else ""
    prompts = "1 prompt" if cell.batch == 1 else f"{cell.batch} prompts"
    return f"{cell.prompt}, {prompts}, {cell.tokens:.0f}{spread} of {full_tokens} tokens per image"


def header(answer_tokens: int) -> list[str]:
    """The names of the columns."""
    parts = {**PARTS, "end_to_end": f"{PARTS['end_to_end']}, {answer_tokens} tokens"}
    return ["", *parts.values(), "merging", "peak memory", "KV cache"]


def lines(cell: CellSummary, brief: bool = False) -> list[list[str]]:
    """A line for each variant: the untouched model in milliseconds and MiB, the others as parts of that.

    Medians with their quartiles or, if `brief`, with half of the distance between those. The time for merging is a part
    of the variant's own encoder time.
    """
    if cell.left_out:
        return []
    base = cell.lines[0]
    counted = [f"{cell.flop_ratios[part]:.2f}" if part in cell.flop_ratios else "" for part in PARTS]
    return [
        *(_line(line, base, brief) for line in cell.lines if not line.left_out),
        ["FLOPs, counted", *counted, "", "", ""],
    ]


def realised(cell: CellSummary, evaluated: Sequence[RowSummary] = ()) -> list[str]:
    """How much of what the counts of tokens promise each variant realises, and what its answers lose, in words.

    Args:
        evaluated: rows of an evaluation of the same model, of which those of the same budget count.
    """
    remarks = []
    for line in cell.lines:
        parts = ", ".join(f"{PARTS[part]} {fraction:.0%}" for part, fraction in line.realised.items())
        row = beside(line.variant, cell.budget, evaluated) if line.variant.backend else None
        said = [f"realised {parts}"] * bool(parts) + ([] if row is None else [told(row)])
        if said:
            remarks.append(f"{line.variant.name}: {'; '.join(said)}")
    return remarks


def left_out(cell: CellSummary) -> list[str]:
    """Why the cell, or which of its variants, has no numbers."""
    if cell.left_out:
        return [f"not timed: {cell.left_out}"]
    return [f"{line.variant.name}: {line.left_out}" for line in cell.lines if line.left_out]


def slower(cell: CellSummary) -> list[str]:
    """Variants that are slower than the untouched model, and in which parts."""
    return [
        f"{line.variant.name}: slower than untouched ({', '.join(line.slower_in)})"
        for line in cell.lines
        if line.slower_in
    ]


def _line(line: Line, base: Line, brief: bool) -> list[str]:
    if line.ratios:
        times = {
            part: _with_spread(ratio.ratio, ratio.low, ratio.high, "{:.2f}".format, brief)
            for part, ratio in line.ratios.items()
        }
        sizes = [f"{line.peak_bytes / base.peak_bytes:.2f}", f"{line.cache_bytes / base.cache_bytes:.2f}"]
    else:
        times = {
            part: _with_spread(ms, *line.quartiles_ms[part], _number, brief, " ms")
            for part, ms in line.median_ms.items()
        }
        sizes = [f"{size / MIB:,.1f} MiB" for size in (line.peak_bytes, line.cache_bytes)]
    share = "" if line.merge_share is None else f"{line.merge_share:.0%}"
    return [line.variant.name, *(times.get(part, "") for part in PARTS), share, *sizes]


def _with_spread(
    median: float, low: float, high: float, number: Callable[[float], str], brief: bool, unit: str = ""
) -> str:
    spread = f"±{number((high - low) / 2)}" if brief else f"[{number(low)}, {number(high)}]"
    return f"{number(median)}{unit} {spread}"


def _number(ms: float) -> str:
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 1 else f"{ms:.2g}"


def page(bench: Bench, evaluated: Sequence[RowSummary] = ()) -> str:
    """All cells in Markdown, and the provenance."""
    parts = []
    for cell in summarise(bench):
        parts.append(f"**{title(cell, bench.full_tokens)}**")
        if not cell.left_out:
            parts.append(markdown(header(bench.answer_tokens), lines(cell)))
        parts.append("\n".join(f"* {remark}" for remark in realised(cell, evaluated) + left_out(cell) + slower(cell)))
    return "\n\n".join([*filter(None, parts), f"<sub>{REALISED}</sub>", f"<sub>{provenance(bench)}</sub>"])


def provenance(bench: Bench) -> str:
    """One line: the command, the model, the number of rounds, device and versions."""
    model = bench.model
    rounds = [len(run.prefill_ms) for cell in bench.cells for run in cell.variants.values() if run.prefill_ms]
    counts = " to ".join(str(count) for count in sorted({min(rounds), max(rounds)})) if rounds else "no"
    versions = ", ".join(f"{name} {number}" for name, number in bench.versions.items())
    return (
        f"`{bench.command}`: {model.name} (weights: {model.weights}; merges: {model.merges}), "
        f"{bench.dtype}, seed {bench.seed}; medians of {counts} interleaved rounds; "
        f"{bench.device}, {versions}, {bench.date[:10]}"
    )
