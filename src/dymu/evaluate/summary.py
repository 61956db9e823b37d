"""From a result file to the numbers of a table: means, bootstrap intervals, paired differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from statistics import median
from typing import Any

import numpy as np

from dymu.errors import DymuError
from dymu.evaluate.results import Results
from dymu.evaluate.rows import UNTOUCHED, Method, Row
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
        against: the row that it is compared with; None: there is no such row, or it is that itself.
        against_tokens: the mean image tokens of that row; 0 where there is none.
        difference: accuracy minus that of that row on the same examples.
        f1: of the answer "yes", by kind.
        costs: None where nothing was timed.
    """

    row: Row
    tokens_mean: float
    tokens_sd: float
    accuracy: dict[str, Share]
    against: Row | None
    against_tokens: float
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


@dataclass(frozen=True)
class Part:
    """The examples of which a measure lies from `low` to `high`, both included."""

    measure: str
    low: float
    high: float

    def __call__(self, measures: dict[str, float]) -> bool:
        """Whether an example with these measures belongs to it."""
        return self.low <= measures.get(self.measure, math.nan) <= self.high


def parts_by(results: Results, measure: str, count: int = 3) -> list[Part]:
    """The examples in at most `count` parts of about equal size by one of their measures; equal values stay together.

    Raises:
        DymuError: no example has this measure.
    """
    found = answered(results, rows_of(results)[0]).measures
    every = np.array([measures.get(measure, math.nan) for measures in found])
    values, times = np.unique(every[np.isfinite(every)], return_counts=True)
    if not len(values):
        known = sorted({name for measures in found for name in measures})
        raise DymuError(f"no question has the measure {measure!r}; take one of: {', '.join(known) or '(none there)'}.")
    # A part ends with the value after which the number of examples is nearest to its share of all.
    done = times.cumsum()
    last = [np.abs(done - done[-1] * part / count).argmin() for part in range(1, count + 1)]
    members = np.split(values, np.unique(last)[:-1] + 1)
    return [Part(measure, float(mine[0]), float(mine[-1])) for mine in members]


def compared_with(row: Row, rows: Sequence[Row], method: Method) -> Row | None:
    """The row of `method` that is most like `row`: unmerged alike, then of the nearest budget.

    None for a row of that method itself, and for the untouched model, which is like no row with a budget.
    """
    if row.method == method or row == UNTOUCHED:
        return None
    return min(
        (other for other in rows if other.method == method),
        key=lambda other: (
            other.unmerge != row.unmerge,
            abs(other.budget - row.budget),
            other.schedule != row.schedule,
        ),
        default=None,
    )


def summarise(
    results: Results, choose: Callable[[dict[str, float]], bool] | None = None, against: Method = "untouched"
) -> list[RowSummary]:
    """Every row's numbers.

    Args:
        choose: takes an example's measures and says whether it counts, as `Part` does; None: all do. Costs are of all
            that were timed.
        against: the method whose rows differences are told from, see `compared_with`.
    """
    yes_no = {_kind(results, task, kind) for task, kinds in results.header["yes_no"].items() for kind in kinds}
    summaries = []
    for row in rows_of(results):
        own = answered(results, row)
        other = compared_with(row, rows_of(results), against)
        chosen = np.array([choose is None or choose(measures) for measures in own.measures], dtype=bool)
        of_kind = {ALL: chosen, **{kind: chosen & (np.array(own.kinds) == kind) for kind in dict.fromkeys(own.kinds)}}
        of_kind = {kind: rows for kind, rows in of_kind.items() if rows.any()}
        difference = {}
        against_tokens = 0.0
        if other is not None:
            base = answered(results, other)
            against_tokens = float(base.kept[chosen].mean()) if chosen.any() else 0.0
            difference = {kind: share(own.scores[rows] - base.scores[rows]) for kind, rows in of_kind.items()}
        summaries.append(
            RowSummary(
                row=row,
                tokens_mean=float(own.kept[chosen].mean()) if chosen.any() else 0.0,
                tokens_sd=float(own.kept[chosen].std()) if chosen.any() else 0.0,
                accuracy={kind: share(own.scores[rows]) for kind, rows in of_kind.items()},
                against=other,
                against_tokens=against_tokens,
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
