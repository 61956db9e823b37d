"""The tables of a result file: for a terminal and in Markdown, from the same cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dymu.bench.summary import PARTS, CellSummary, Line, Ratio, summarise
from dymu.evaluate.tables import markdown

MIB = 2**20


def title(cell: CellSummary, full_tokens: int) -> str:
    """What the cell measured."""
    spread = f" ({min(cell.kept)} to {max(cell.kept)})" if len(cell.kept) > 1 else ""
    prompts = "1 prompt" if cell.batch == 1 else f"{cell.batch} prompts"
    return f"{cell.layout}, {prompts}, {cell.tokens:.0f}{spread} of {full_tokens} tokens per image"


def header(answer_tokens: int) -> list[str]:
    """The names of the columns."""
    parts = {**PARTS, "end_to_end": f"{PARTS['end_to_end']}, {answer_tokens} tokens"}
    return ["", *parts.values(), "merging", "peak memory", "KV cache"]


def lines(cell: CellSummary, brief: bool = False) -> list[list[str]]:
    """A line for each variant: the untouched model in milliseconds and MiB, the others as parts of that.

    Medians with their quartiles or, `brief`, with half of what lies between them. Merging is told as a part of the
    variant's own encoder time.
    """
    if cell.left_out:
        return []
    base = cell.lines[0]
    counted = [f"{cell.flop_ratios[part]:.2f}" if part in cell.flop_ratios else "" for part in PARTS]
    return [
        *(_line(line, base, brief) for line in cell.lines if not line.left_out),
        ["FLOPs, counted", *counted, "", "", ""],
    ]


def left_out(cell: CellSummary) -> list[str]:
    """What has no numbers, and why."""
    if cell.left_out:
        return [f"not timed: {cell.left_out}"]
    return [f"{line.variant.name}: {line.left_out}" for line in cell.lines if line.left_out]


def slower(cell: CellSummary) -> list[str]:
    """What is slower than the untouched model, and in which part."""
    return [
        f"{line.variant.name}: slower than untouched ({', '.join(line.slower_in)})"
        for line in cell.lines
        if line.slower_in
    ]


def _line(line: Line, base: Line, brief: bool = False) -> list[str]:
    absolute = not line.ratios
    parts = [_ms(line, part, brief) if absolute else _ratio(line, part, brief) for part in PARTS]
    share = "" if line.merge_share is None else f"{line.merge_share:.0%}"
    sizes = [
        _bytes(line.peak_bytes, 0 if absolute else base.peak_bytes),
        _bytes(line.cache_bytes, 0 if absolute else base.cache_bytes),
    ]
    return [line.variant.name, *parts, share, *sizes]


def _ms(line: Line, part: str, brief: bool) -> str:
    if part not in line.median_ms:
        return ""

    def number(ms: float) -> str:
        return f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 1 else f"{ms:.2g}"

    low, high = line.quartiles_ms[part]
    spread = f"±{number((high - low) / 2)}" if brief else f"[{number(low)}, {number(high)}]"
    return f"{number(line.median_ms[part])} ms {spread}"


def _ratio(line: Line, part: str, brief: bool) -> str:
    found = line.ratios.get(part)
    if found is None:
        return ""
    spread = f"±{(found.high - found.low) / 2:.2f}" if brief else f"[{found.low:.2f}, {found.high:.2f}]"
    return f"{found.ratio:.2f} {spread}"


def _bytes(count: int, of: int) -> str:
    return f"{count / of:.2f}" if of else f"{count / MIB:,.1f} MiB"


def page(results: dict[str, Any]) -> str:
    """All cells in Markdown, with what they were measured with."""
    parts = []
    for cell in summarise(results):
        parts.append(f"**{title(cell, results['full_tokens'])}**")
        if not cell.left_out:
            parts.append(markdown(header(results["answer_tokens"]), lines(cell)))
        parts.append("\n".join(f"* {remark}" for remark in left_out(cell) + slower(cell)))
    return "\n\n".join([*filter(None, parts), f"<sub>{provenance(results)}</sub>"])


def overview(results: dict[str, Any]) -> str:
    """One Markdown table over all cells: times and bytes as parts of the untouched model's; slower ones in bold."""
    rows = []
    for cell in summarise(results):
        place = [f"{cell.tokens:.0f} of {results['full_tokens']}", str(cell.batch), cell.layout]
        for line in cell.lines:
            if line.ratios:
                ratios = [_short(line.ratios.get(part)) for part in PARTS]
                rows.append([*place, line.variant.name, *ratios, *_line(line, cell.lines[0])[-2:]])
        rows += [[*place, line[0], *line[1 : len(PARTS) + 1], "", ""] for line in lines(cell)[-1:]]
        rows += [[*place, remark, *[""] * (len(PARTS) + 2)] for remark in left_out(cell)]
    return markdown(["image tokens", "batch", "prompt", "", *PARTS.values(), "peak memory", "KV cache"], rows)


def _short(found: Ratio | None) -> str:
    if found is None:
        return ""
    return f"**{found.ratio:.2f}**" if found.slower else f"{found.ratio:.2f}"


def provenance(results: dict[str, Any]) -> str:
    """One line: what was measured, how, and with what."""
    model = results["model"]
    rounds = sorted({line.rounds for cell in summarise(results) for line in cell.lines if line.rounds})
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    return (
        f"`{results['command']}`: {model['name']} (weights: {model['weights']}; merges: {model['merges']}), "
        f"{results['dtype']}, seed {results['seed']}; medians of {_listed(rounds)} interleaved rounds; "
        f"{results['device']}, {versions}, {results['date'][:10]}"
    )


def _listed(rounds: Sequence[int]) -> str:
    return " to ".join(str(count) for count in dict.fromkeys((*rounds[:1], *rounds[-1:]))) or "no"
