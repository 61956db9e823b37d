"""From a result file to the numbers of a table: means, bootstrap intervals, differences from the untouched model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from statistics import median
from typing import Any

import numpy as np

from dymu.evaluate.results import Results
from dymu.evaluate.rows import UNTOUCHED, Row
from dymu.tasks.scoring import f1, yes_or_no
from dymu.timing import Times

RESAMPLES = 2000
ALL = "all"


@dataclass(frozen=True)
class Share:
    """A mean score of n examples and its 95 % bootstrap interval, all from 0 to 1 (differences from -1)."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Costs:
    """What a prompt cost a row: medians of milliseconds, means of the rest, over the n examples that all rows timed."""

    tokens: float
    encoder_ms: float
    prefill_ms: float
    decode_ms_per_token: float
    tflops: float
    cache_bytes: float
    n: int


@dataclass(frozen=True)
class RowSummary:
    """One row of the table.

    Attributes:
        tokens_mean, tokens_sd: image tokens per prompt.
        accuracy: by kind, and `all` over all examples.
        difference: the same minus the untouched model's on the same examples; empty for that itself.
        f1: of the answer "yes", by kind.
        costs: None where nothing was timed.
    """

    row: Row
    tokens_mean: float
    tokens_sd: float
    accuracy: dict[str, Share]
    difference: dict[str, Share]
    f1: dict[str, float]
    costs: Costs | None


@dataclass(frozen=True)
class Answered:
    """One row's answers to all examples that every row has answered, in the same order for all rows.

    Attributes:
        kinds, references, measures: of the examples; where there are several tasks, kinds are named with theirs.
        answers, scores, kept: of the row; kept are image tokens.
    """

    kinds: list[str]
    references: list[list[str]]
    measures: list[dict[str, float]]
    answers: list[str]
    scores: np.ndarray
    kept: np.ndarray


def rows_of(results: Results) -> list[Row]:
    """The rows that a result file compares."""
    return [Row(**row) for row in results.header["rows"]]


def answered(results: Results, row: Row) -> Answered:
    """A row's answers where every row has answered."""
    places = [
        place
        for place in sorted(results.examples)
        if all(place in results.answers.get(other.key, {}) for other in rows_of(results))
    ]

    def joined(of: Callable[[tuple[str, int]], list[Any]]) -> list[Any]:
        return [entry for place in places for entry in of(place)]

    own = results.answers.get(row.key, {})
    return Answered(
        kinds=joined(lambda place: [_kind(results, place[0], kind) for kind in results.examples[place]["kind"]]),
        references=joined(lambda place: results.examples[place]["references"]),
        measures=joined(lambda place: results.examples[place]["measures"]),
        answers=joined(lambda place: own[place]["answers"]),
        scores=np.array(joined(lambda place: own[place]["scores"]), dtype=np.float64),
        kept=np.array(joined(lambda place: own[place]["kept"]), dtype=np.float64),
    )


def summarise(results: Results, choose: Callable[[dict[str, float]], bool] | None = None) -> list[RowSummary]:
    """Every row's numbers.

    Args:
        choose: takes an example's measures and says whether it counts; None: all do. Costs are of all that were timed.
    """
    yes_no = {_kind(results, task, kind) for task, kinds in results.header["yes_no"].items() for kind in kinds}
    base = answered(results, UNTOUCHED) if UNTOUCHED in rows_of(results) else None
    summaries = []
    for row in rows_of(results):
        own = answered(results, row)
        chosen = np.array([choose is None or choose(measures) for measures in own.measures], dtype=bool)
        of_kind = {ALL: chosen, **{kind: chosen & (np.array(own.kinds) == kind) for kind in dict.fromkeys(own.kinds)}}
        of_kind = {kind: rows for kind, rows in of_kind.items() if rows.any()}
        difference = {}
        if base is not None and row != UNTOUCHED:
            difference = {kind: share(own.scores[rows] - base.scores[rows]) for kind, rows in of_kind.items()}
        summaries.append(
            RowSummary(
                row=row,
                tokens_mean=float(own.kept[chosen].mean()) if chosen.any() else 0.0,
                tokens_sd=float(own.kept[chosen].std()) if chosen.any() else 0.0,
                accuracy={kind: share(own.scores[rows]) for kind, rows in of_kind.items()},
                difference=difference,
                f1={
                    kind: f1(
                        [yes_or_no(own.answers[i]) for i in np.flatnonzero(of_kind[kind])],
                        [yes_or_no(own.references[i][0]) for i in np.flatnonzero(of_kind[kind])],
                    )
                    for kind in of_kind
                    if kind in yes_no
                },
                costs=_costs(results, row),
            )
        )
    return summaries


def skipped(results: Results) -> list[str]:
    """What was left out, and why."""
    return [why for batch in results.examples.values() for _, why in batch["skipped"]]


def _kind(results: Results, task: str, kind: str) -> str:
    return f"{task}: {kind}" if len(results.header["tasks"]) > 1 else kind


def share(scores: np.ndarray) -> Share:
    """Mean and percentile bootstrap interval; the same scores always give the same interval."""
    if len(scores) == 0:
        return Share(float("nan"), float("nan"), float("nan"), 0)
    rng = np.random.default_rng(0)
    means = [scores[rng.integers(0, len(scores), len(scores))].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, (0.025, 0.975))
    return Share(float(scores.mean()), float(low), float(high), len(scores))


def _costs(results: Results, row: Row) -> Costs | None:
    rows = [results.costs.get(other.key, {}) for other in rows_of(results)]
    places = set.intersection(*(set(timed) for timed in rows))
    if not places:
        return None
    found: Sequence[dict[str, float]] = [results.costs[row.key][place] for place in sorted(places)]
    kept = {
        (task, index): tokens
        for (task, start), answers in results.answers[row.key].items()
        for index, tokens in zip(results.examples[task, start]["index"], answers["kept"], strict=True)
    }
    times = {part.name: median(cost[part.name] for cost in found) for part in fields(Times)}
    return Costs(
        tokens=float(np.mean([kept[place] for place in places])),
        **times,
        tflops=float(np.mean([cost["flops"] for cost in found])) / 1e12,
        cache_bytes=float(np.mean([cost["cache_bytes"] for cost in found])),
        n=len(found),
    )
