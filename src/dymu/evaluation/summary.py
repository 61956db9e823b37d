"""From a result file to the numbers of a table: means, their 95 % intervals, paired differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import NormalDist
from typing import TypeVar

import msgspec
import numpy as np

from dymu.errors import DymuError
from dymu.evaluation.methods import UNTOUCHED, Row, options_of
from dymu.evaluation.results import Answers, Examples, Results
from dymu.evaluation.tasks.scoring import f1, yes_or_no
from dymu.measure.times import Times

RESAMPLES = 2000
Z2 = NormalDist().inv_cdf(0.975) ** 2
"""Square of the normal quantile of a 95 % interval."""
ALL = "all"
SHARE: tuple[float, float] = (0.0, 1.0)
"""The least and the greatest of a score."""
Batch = TypeVar("Batch", Examples, Answers)


@dataclass(frozen=True)
class Share:
    """A mean over n examples and its 95 % interval, see `share`."""

    mean: float
    low: float
    high: float
    n: int


class Costs(Times, frozen=True):
    """A row's cost of a prompt: medians of milliseconds, means of the rest, over the n examples that all rows timed."""

    tokens: float
    tflops: float
    cache_bytes: float
    n: int


@dataclass(frozen=True)
class RowSummary:
    """One row of the table.

    Attributes:
        tokens_mean, tokens_sd: image tokens per prompt.
        accuracy: by kind, and `all` over all examples.
        against: the row that it is compared with; None for that row itself, or where there is none.
        against_tokens: the mean image tokens of that row; 0 where there is none.
        difference: accuracy minus that of that row on the same examples.
        f1: of the answer "yes", by kind of yes-or-no questions; None for a kind without a question whose answer is yes.
        same: by kind, the share of answers that equal the untouched model's; without kinds of which the file says none.
        divergence: likewise the mean KL divergence of the untouched model's distribution from the row's, in nats per
            token of the untouched answer, see `Answers.kl`.
        costs: None where nothing was timed.
    """

    row: Row
    tokens_mean: float
    tokens_sd: float
    accuracy: dict[str, Share]
    against: Row | None
    against_tokens: float
    difference: dict[str, Share]
    f1: dict[str, float | None]
    same: dict[str, Share]
    divergence: dict[str, Share]
    costs: Costs | None


@dataclass(frozen=True)
class Part:
    """The examples whose measure lies from `low` to `high`, both included."""

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
    of_examples = _joined(Examples, (results.examples[batch] for batch in _answered(results))).measures
    every = np.array([measures.get(measure, math.nan) for measures in of_examples])
    values, times = np.unique(every[np.isfinite(every)], return_counts=True)
    if not len(values):
        known = sorted({name for measures in of_examples for name in measures})
        raise DymuError(f"no question has the measure {measure!r}; take one of: {', '.join(known) or '(none there)'}.")
    # A part ends with the value after which the number of examples is nearest to its share of all.
    done = times.cumsum()
    last = [np.abs(done - done[-1] * part / count).argmin() for part in range(1, count + 1)]
    members = np.split(values, np.unique(last)[:-1] + 1)
    return [Part(measure, float(mine[0]), float(mine[-1])) for mine in members]


def compared_with(row: Row, rows: Sequence[Row], method: str) -> Row | None:
    """The row of `method` that `row` is compared with: unmerged alike if possible, then of the nearest budget, then
    with the fewest arguments.

    Args:
        method: a name, with arguments where only rows with these are meant: `holo-v:stretches=8`.

    Returns:
        None for such a row itself, for the untouched model, and where there is none.
    """
    name, _, options = method.partition(":")
    them = [other for other in rows if other.method == name and options in ("", other.options)]
    if row in them or row == UNTOUCHED:
        return None
    return min(
        them,
        key=lambda other: (
            other.unmerge != row.unmerge,
            abs(other.budget - row.budget),
            len(options_of(other.options)),
            other.schedule != row.schedule,
        ),
        default=None,
    )


def summarise(
    results: Results, choose: Callable[[dict[str, float]], bool] | None = None, against: str = "untouched"
) -> list[RowSummary]:
    """Every row's numbers; empty where no chosen example was answered by every row.

    Args:
        choose: takes an example's measures and says whether it counts, as `Part` does; None: all do. Costs are of all
            examples that were timed.
        against: the method whose rows differences are taken from, see `compared_with`.
    """
    rows, batches = results.header.rows, _answered(results)
    examples = _joined(Examples, (results.examples[batch] for batch in batches))
    answers = {row: _joined(Answers, (results.answers[row.key][batch] for batch in batches)) for row in rows}
    scores = {row: np.array(answers[row].scores, dtype=np.float64) for row in rows}
    kinds = [_kind(results, batch[0], kind) for batch in batches for kind in results.examples[batch].kind]
    yes_no = {_kind(results, task, kind) for task, of_task in results.header.yes_no.items() for kind in of_task}
    members: dict[str, list[int]] = {ALL: []}
    for index, (kind, measures) in enumerate(zip(kinds, examples.measures, strict=True)):
        members.setdefault(kind, [])
        if choose is None or choose(measures):
            members[ALL].append(index)
            members[kind].append(index)
    members = {kind: indices for kind, indices in members.items() if indices}
    kept = {row: np.array(answers[row].kept)[members.get(ALL, [])] for row in rows}
    summaries = []
    for row in rows if members else ():
        other = compared_with(row, rows, against)
        summaries.append(
            RowSummary(
                row=row,
                tokens_mean=float(kept[row].mean()),
                tokens_sd=float(kept[row].std()),
                accuracy={kind: share(scores[row][indices]) for kind, indices in members.items()},
                against=other,
                against_tokens=0.0 if other is None else float(kept[other].mean()),
                difference={}
                if other is None
                else {
                    kind: share((scores[row] - scores[other])[indices], (-1, 1)) for kind, indices in members.items()
                },
                f1={
                    kind: _f1(
                        [yes_or_no(answers[row].answers[index]) for index in indices],
                        [yes_or_no(examples.references[index][0]) for index in indices],
                    )
                    for kind, indices in members.items()
                    if kind in yes_no
                },
                same=_known(members, answers[row].same, None if row == UNTOUCHED else SHARE),
                divergence=_known(members, answers[row].kl, None),
                costs=_costs(results, row),
            )
        )
    return summaries


def skipped(results: Results) -> list[str]:
    """The reason for each example that was left out."""
    return [why for batch in results.examples.values() for _, why in batch.skipped]


def _answered(results: Results) -> list[tuple[str, int]]:
    """The batches that every row has answered, in order."""
    of_rows = [results.answers.get(row.key, {}).keys() for row in results.header.rows]
    return sorted(results.examples.keys() & set.intersection(*map(set, of_rows)))


def _joined(kind: type[Batch], batches: Iterable[Batch]) -> Batch:
    """The batches as one, field by field."""
    batches = list(batches)
    names = kind.__struct_fields__
    return kind(*(list(chain.from_iterable(getattr(batch, name) for batch in batches)) for name in names))


def _kind(results: Results, task: str, kind: str) -> str:
    return f"{task}: {kind}" if len(results.header.tasks) > 1 else kind


def share(values: np.ndarray, ends: tuple[float, float] | None = SHARE) -> Share:
    """The mean of some values and its 95 % interval; the same values always give the same.

    Of right and wrong (0 and 1) it is Wilson's; else the percentile bootstrap's. Equal values resample to themselves,
    so there the bootstrap would claim certainty: the interval is then that of the mean if as many other values as
    Wilson allows where none of n was seen are as far away as they can be.

    Args:
        ends: the least and the greatest value that there can be. None: nothing bounds them, and equal values have no
            interval (`low` and `high` are the mean).
    """
    count = len(values)
    if count == 0:
        return Share(math.nan, math.nan, math.nan, 0)
    mean = float(values.mean())
    if ends == SHARE and np.isin(values, ends).all():
        centre = (mean + Z2 / (2 * count)) / (1 + Z2 / count)
        width = math.sqrt(Z2 * (mean * (1 - mean) + Z2 / (4 * count)) / count) / (1 + Z2 / count)
        low, high = centre - width, centre + width
    elif (values == values[0]).all():
        others = Z2 / (count + Z2)
        low, high = (mean + others * (end - mean) for end in ends or (mean, mean))
    else:
        low, high = _resampled(values)
    return Share(mean, *((low, high) if ends is None else (max(low, ends[0]), min(high, ends[1]))), count)


def _resampled(values: np.ndarray) -> tuple[float, float]:
    """The percentile bootstrap's interval of the mean."""
    drawn = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.percentile(values[drawn].mean(1), (2.5, 97.5))
    return float(low), float(high)


def _known(
    members: dict[str, list[int]], values: Sequence[float | None], ends: tuple[float, float] | None
) -> dict[str, Share]:
    """By kind, the mean of the values that are known; without kinds of which none is."""
    known = {
        kind: [value for index in indices if (value := values[index]) is not None] for kind, indices in members.items()
    }
    return {kind: share(np.array(some, dtype=np.float64), ends) for kind, some in known.items() if some}


def _f1(said: list[str | None], right: list[str | None]) -> float | None:
    return f1(said, right) if "yes" in right else None


def _costs(results: Results, row: Row) -> Costs | None:
    answered = {(batch[0], index) for batch in _answered(results) for index in results.examples[batch].index}
    timed = sorted(answered.intersection(*(results.costs.get(other.key, {}) for other in results.header.rows)))
    if not timed:
        return None
    costs = [results.costs[row.key][example] for example in timed]
    kept = {
        (task, index): tokens
        for (task, start), answers in results.answers[row.key].items()
        for index, tokens in zip(results.examples[task, start].index, answers.kept, strict=True)
    }
    return Costs(
        tokens=float(np.mean([kept[example] for example in timed])),
        **msgspec.structs.asdict(Times.medians(costs)),
        tflops=float(np.mean([cost.flops for cost in costs])) / 1e12,
        cache_bytes=float(np.mean([cost.cache_bytes for cost in costs])),
        n=len(costs),
    )
