"""From a result file to numbers: medians, and each variant's ratios to the untouched model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dymu.bench.results import Bench, Cell, Measured
from dymu.bench.variants import UNTOUCHED, Variant

PARTS = {"encoder": "encoder", "prefill": "prefill", "decode": "each token after", "end_to_end": "end to end"}
"""The parts that are timed, and their names in tables."""

REALISED = (
    "realised = (untouched − this) / (untouched − floor); floor: the stock language model fed M tokens, and of the "
    "encoder the untouched time × operations counted"
)
"""How it is computed, for people."""
LITTLE = 0.1
"""Part of the untouched time that a floor must save, or nothing could be told apart from noise."""


FEWEST_ROUNDS = 3
"""Of which the quartiles say anything about noise."""


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
        """Whether it is slower in three of four rounds, and by the medians."""
        return self.low > 1 and self.ratio > 1


@dataclass(frozen=True)
class Line:
    """One variant in one cell.

    Attributes:
        left_out: why it has no numbers; empty where it has.
        median_ms: by part, see `PARTS`; the floor, which has no image, has only the two of the language model.
        quartiles_ms: the same, lower and upper.
        ratios: to the untouched model; empty where that has no times, and for that itself.
        realised: by part, the time saved as a fraction of what the counts of tokens promise, see `REALISED`; without
            parts in which that is less than `LITTLE` of the untouched model's.
        merge_share: fraction of the encoder's time for matching and merging; None where nothing merges.
        peak_bytes, cache_bytes: see `dymu.bench.probes.memory`.
        rounds: measured.
    """

    variant: Variant
    left_out: str
    median_ms: dict[str, float]
    quartiles_ms: dict[str, tuple[float, float]]
    ratios: dict[str, Ratio]
    realised: dict[str, float]
    merge_share: float | None
    peak_bytes: int
    cache_bytes: int
    rounds: int

    @property
    def slower_in(self) -> list[str]:
        """The parts in which it is slower than the untouched model beyond noise, of which few rounds say nothing."""
        return [PARTS[part] for part, ratio in self.ratios.items() if ratio.slower and self.rounds >= FEWEST_ROUNDS]


@dataclass(frozen=True)
class CellSummary:
    """One budget, batch and prompt.

    Attributes:
        kept: image tokens that remain of each image.
        left_out: why it has no lines; empty where it has.
        flop_ratios: counted FLOPs of DyMU to those of the untouched model, of encoder and prefill.
    """

    prompt: str
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


def summarise(bench: Bench) -> list[CellSummary]:
    """Every cell of a result file, by prompt, batch and budget."""
    cells = sorted(bench.cells, key=lambda cell: (cell.prompt, cell.batch, -cell.budget))
    return [_cell(cell, bench) for cell in cells]


def _cell(cell: Cell, bench: Bench) -> CellSummary:
    times = {
        variant: _times(cell.variants[variant.name], variant, bench.answer_tokens)
        for variant in (bench.variants if cell.variants else ())
    }
    flops = cell.flops
    flop_ratios = {
        part: getattr(flops["dymu"], f"{part}_flops") / getattr(flops["untouched"], f"{part}_flops")
        for part in ("encoder", "prefill")
        if flops
    }
    floor = next((ms for variant, ms in times.items() if variant.floor), {})
    least = _floor(times.get(UNTOUCHED, {}), floor, flop_ratios, bench.answer_tokens)
    return CellSummary(
        prompt=cell.prompt,
        batch=cell.batch,
        budget=cell.budget,
        kept=cell.kept,
        left_out=cell.left_out,
        lines=[
            _line(cell.variants[variant.name], variant, ms, times[UNTOUCHED], least) for variant, ms in times.items()
        ],
        flop_ratios=flop_ratios,
    )


def _floor(
    untouched: dict[str, np.ndarray], floor: dict[str, np.ndarray], flop_ratios: dict[str, float], answer_tokens: int
) -> dict[str, float]:
    """Milliseconds by part that the counts of tokens promise, see `REALISED`."""
    if not (untouched and floor and flop_ratios):
        return {}
    encoder = float(np.median(untouched["encoder"])) * flop_ratios["encoder"]
    prefill, decode = (float(np.median(floor[part])) for part in ("prefill", "decode"))
    whole = encoder + prefill + (answer_tokens - 1) * decode
    return {"encoder": encoder, "prefill": prefill, "decode": decode, "end_to_end": whole}


def _times(measured: Measured, variant: Variant, answer_tokens: int) -> dict[str, np.ndarray]:
    """Milliseconds of every round, by part; the answer's first token comes with the prefill."""
    if not measured.prefill_ms:
        return {}
    encoder, prefill, decode = map(np.array, (measured.encoder_ms, measured.prefill_ms, measured.decode_ms_per_token))
    if variant.floor:
        return {"prefill": prefill, "decode": decode}
    whole = encoder + prefill + (answer_tokens - 1) * decode
    return {"encoder": encoder, "prefill": prefill, "decode": decode, "end_to_end": whole}


def _line(
    measured: Measured,
    variant: Variant,
    times: dict[str, np.ndarray],
    untouched: dict[str, np.ndarray],
    least: dict[str, float],
) -> Line:
    realised = {}
    for part, floor in least.items() if variant.backend else ():
        full = float(np.median(untouched[part]))
        if part in times and full - floor > LITTLE * full:
            realised[part] = (full - float(np.median(times[part]))) / (full - floor)
    compared = {} if variant == UNTOUCHED else {part: (ms, untouched[part]) for part, ms in times.items() if untouched}
    return Line(
        variant=variant,
        left_out=measured.left_out,
        median_ms={part: float(np.median(ms)) for part, ms in times.items()},
        quartiles_ms={part: _quartiles(ms) for part, ms in times.items()},
        ratios={
            part: Ratio(float(np.median(ms) / np.median(full)), *_quartiles(ms / full))
            for part, (ms, full) in compared.items()
        },
        realised=realised,
        merge_share=measured.merge_share,
        peak_bytes=measured.peak_bytes,
        cache_bytes=measured.cache_bytes,
        rounds=len(measured.prefill_ms),
    )


def _quartiles(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, (0.25, 0.75)).tolist()
    return low, high
