"""From a result file to numbers: medians, and how each variant stands to the untouched model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dymu.bench.variants import UNTOUCHED, Variant

PARTS = {"encoder": "encoder", "prefill": "prefill", "decode": "each token after", "end_to_end": "end to end"}
"""What is timed, and what it is called."""


@dataclass(frozen=True)
class Ratio:
    """A variant's time as a part of the untouched model's.

    Attributes:
        ratio: of the medians.
        low, high: quartiles of the rounds' own ratios.
    """

    ratio: float
    low: float
    high: float

    @property
    def slower(self) -> bool:
        """Whether it is slower beyond noise: in three of four rounds, and by the medians."""
        return self.low > 1 and self.ratio > 1


@dataclass(frozen=True)
class Line:
    """One variant in one cell.

    Attributes:
        left_out: why it has no numbers; empty where it has.
        median_ms: by part, see `PARTS`; the floor, which has no image, has only the two of the language model.
        quartiles_ms: the same, lower and upper.
        ratios: to the untouched model; empty where that has no times, and for that itself.
        merge_share: of the encoder's time, what finding partners and merging takes; None where nothing merges.
        peak_bytes, cache_bytes: see `dymu.bench.measure.memory`.
        rounds: measured.
    """

    variant: Variant
    left_out: str
    median_ms: dict[str, float]
    quartiles_ms: dict[str, tuple[float, float]]
    ratios: dict[str, Ratio]
    merge_share: float | None
    peak_bytes: int
    cache_bytes: int
    rounds: int

    @property
    def slower_in(self) -> list[str]:
        """The parts in which it is slower than the untouched model, beyond noise."""
        return [PARTS[part] for part, found in self.ratios.items() if found.slower]


@dataclass(frozen=True)
class CellSummary:
    """One budget, batch and layout.

    Attributes:
        kept: image tokens that remain of each image.
        left_out: why it has no lines; empty where it has.
        flop_ratios: counted FLOPs of DyMU to those of the untouched model, of encoder and prefill.
    """

    layout: str
    batch: int
    budget: float
    kept: list[int]
    left_out: str
    lines: list[Line]
    flop_ratios: dict[str, float]

    @property
    def tokens(self) -> float:
        """Mean tokens left of an image."""
        return float(np.mean(self.kept))


def summarise(results: dict[str, Any]) -> list[CellSummary]:
    """Every cell of a result file, by layout, batch and budget."""
    compared = [Variant(**variant) for variant in results["variants"]]
    cells = sorted(results["cells"], key=lambda cell: (cell["layout"], cell["batch"], -cell["budget"]))
    return [_cell(cell, compared, results["answer_tokens"]) for cell in cells]


def _cell(cell: dict[str, Any], compared: Sequence[Variant], answer_tokens: int) -> CellSummary:
    lines = []
    if "variants" in cell:
        times = {variant: _times(cell["variants"][variant.name], variant, answer_tokens) for variant in compared}
        lines = [
            _line(cell["variants"][variant.name], variant, times[variant], times[UNTOUCHED]) for variant in compared
        ]
    flops = cell.get("flops", {})
    return CellSummary(
        layout=cell["layout"],
        batch=cell["batch"],
        budget=cell["budget"],
        kept=cell["kept"],
        left_out=cell.get("left_out", ""),
        lines=lines,
        flop_ratios={
            part: flops["dymu"][f"{part}_flops"] / flops["untouched"][f"{part}_flops"]
            for part in ("encoder", "prefill")
            if flops
        },
    )


def _times(found: dict[str, Any], variant: Variant, answer_tokens: int) -> dict[str, np.ndarray]:
    """Milliseconds of every round, by part; the answer's first token comes with the prefill."""
    if "prefill_ms" not in found:
        return {}
    encoder, prefill, decode = (np.array(found[name]) for name in ("encoder_ms", "prefill_ms", "decode_ms_per_token"))
    if variant.floor:
        return {"prefill": prefill, "decode": decode}
    whole = encoder + prefill + (answer_tokens - 1) * decode
    return {"encoder": encoder, "prefill": prefill, "decode": decode, "end_to_end": whole}


def _line(
    found: dict[str, Any], variant: Variant, times: dict[str, np.ndarray], untouched: dict[str, np.ndarray]
) -> Line:
    of_untouched = {} if variant == UNTOUCHED else untouched
    return Line(
        variant=variant,
        left_out=found.get("left_out", ""),
        median_ms={part: float(np.median(ms)) for part, ms in times.items()},
        quartiles_ms={part: _quartiles(ms) for part, ms in times.items()},
        ratios={
            part: Ratio(float(np.median(ms) / np.median(of_untouched[part])), *_quartiles(ms / of_untouched[part]))
            for part, ms in times.items()
            if part in of_untouched
        },
        merge_share=found["merge_ms"] / found["merge_of_ms"] if "merge_ms" in found else None,
        peak_bytes=found.get("peak_bytes", 0),
        cache_bytes=found.get("cache_bytes", 0),
        rounds=len(next(iter(times.values()), [])),
    )


def _quartiles(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, (0.25, 0.75))
    return float(low), float(high)
