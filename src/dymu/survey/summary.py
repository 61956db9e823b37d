"""What the counts of many pictures come to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dymu.evaluation.summary import share
from dymu.survey.file import Row

MOST = 0.95
"""The part of pictures that keep no more than their quantile."""
Z = 1.96
"""The normal quantile of a 95 % interval."""
FEWEST = 10
"""Pictures below which a correlation says nothing."""


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float

    def data(self) -> dict[str, float]:
        return {"value": round(self.value, 4), "low": round(self.low, 4), "high": round(self.high, 4)}


@dataclass(frozen=True)
class Costs:
    """Tokens of all pictures: their sum, and of one the mean, standard deviation, least, most and the quantile `MOST`,
    which is what one of them keeps."""

    total: int
    mean: float
    sd: float
    least: int
    quantile: int
    most: int

    @classmethod
    def of(cls, counts: np.ndarray) -> Costs:
        quantile = int(np.quantile(counts, MOST, method="inverted_cdf"))
        return cls(
            int(counts.sum()), float(counts.mean()), float(counts.std()), int(counts.min()), quantile, int(counts.max())
        )

    def data(self) -> dict[str, float]:
        return {
            "total": self.total,
            "mean": round(self.mean, 2),
            "sd": round(self.sd, 2),
            "least": self.least,
            "quantile_95": self.quantile,
            "most": self.most,
        }


@dataclass(frozen=True)
class Told:
    """What forecasts told at one budget.

    Attributes:
        expected, reserve: of each picture.
        covered: the part of pictures that kept no more than their reserve.
    """

    expected: np.ndarray
    reserve: np.ndarray
    covered: Interval

    def data(self) -> dict[str, Any]:
        return {
            "expected_total": round(float(self.expected.sum()), 1),
            "reserve_total": int(self.reserve.sum()),
            "within_reserve": self.covered.data(),
        }


@dataclass(frozen=True)
class AtBudget:
    """One budget.

    Attributes:
        kept: of each picture.
        complexity: Spearman's correlation of the kept tokens with the JPEG bytes per pixel; None: undefined.
        told: None without forecasts.
    """

    budget: float
    kept: np.ndarray
    costs: Costs
    complexity: Interval | None
    told: Told | None

    def data(self) -> dict[str, Any]:
        return {
            "budget": self.budget,
            **self.costs.data(),
            "spearman_jpeg": self.complexity and self.complexity.data(),
            "forecast": self.told and self.told.data(),
        }


@dataclass(frozen=True)
class Summary:
    """All budgets.

    Attributes:
        rows: of the pictures that could be read, and
        failed: of the others.
        jpeg: of each the bytes per pixel.
        untouched: what they cost with nothing merged.
    """

    rows: list[Row]
    failed: list[Row]
    jpeg: np.ndarray
    untouched: Costs
    budgets: list[AtBudget]

    @classmethod
    def of(cls, rows: Sequence[Row], budgets: Sequence[float]) -> Summary:
        """At least one of the rows must be without an error."""
        good = [row for row in rows if row.error is None]
        jpeg = np.array([row.jpeg for row in good])
        told = all(row.reserve for row in good)
        each = []
        for index, budget in enumerate(budgets):
            kept = np.array([row.kept[index] for row in good])
            forecast = None
            if told:
                expected = np.array([row.expected[index] for row in good])
                reserve = np.array([row.reserve[index] for row in good])
                covered = share((kept <= reserve).astype(np.float64))
                forecast = Told(expected, reserve, Interval(covered.mean, covered.low, covered.high))
            each.append(AtBudget(budget, kept, Costs.of(kept), spearman(jpeg, kept), forecast))
        untouched = Costs.of(np.array([row.tokens for row in good]))
        return cls(good, [row for row in rows if row.error is not None], jpeg, untouched, each)

    @property
    def shown(self) -> AtBudget:
        """The budget in the middle, at which pictures are shown."""
        return self.budgets[len(self.budgets) // 2]

    def extremes(self, count: int) -> tuple[list[Row], list[Row]]:
        """The simplest and the most complex pictures, by the part that they keep at the budget that is shown; at most
        so many of each, and none twice."""
        part = self.shown.kept / np.array([row.tokens for row in self.rows])
        order = [self.rows[index] for index in np.argsort(part, kind="stable")]
        count = min(count, len(order) // 2)
        return order[:count], order[::-1][: max(count, 1)]

    def data(self) -> dict[str, Any]:
        return {
            "images": len(self.rows) + len(self.failed),
            "failed": len(self.failed),
            "untouched": self.untouched.data(),
            "budgets": [at.data() for at in self.budgets],
        }


def spearman(x: np.ndarray, y: np.ndarray) -> Interval | None:
    """The rank correlation with the interval by Fisher's transformation (Bonett and Wright, 2000); None for few
    pictures, or where one of the two is always the same."""
    count = len(x)
    if count < FEWEST or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    value = float(np.corrcoef(_ranks(x), _ranks(y))[0, 1])
    value = min(max(value, -1.0), 1.0)
    if abs(value) == 1:
        return Interval(value, value, value)
    error = math.sqrt((1 + value**2 / 2) / (count - 3))
    return Interval(value, math.tanh(math.atanh(value) - Z * error), math.tanh(math.atanh(value) + Z * error))


def _ranks(values: np.ndarray) -> np.ndarray:
    """Of equal values the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = counts.cumsum()
    ranks: np.ndarray = (ends - (counts - 1) / 2)[inverse]
    return ranks
