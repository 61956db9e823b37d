"""How many image tokens a picture will keep, told before the encoder runs: what calibration fits, and the answer.

`dymu.media.features` measures the pixels, `dymu.calibration.forecast` fits, `Thresholds.forecast` answers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated

import msgspec

COVERED = 0.95
"""Part of pictures like those of calibration for which the reserve is enough."""

LOG_TOKENS = "log_tokens"
"""The last feature: the natural logarithm of the tokens of the untouched image."""

LEAST_SD = 1e-6
"""A feature whose standard deviation is not above it was the same for all, but for rounding."""

Number = Annotated[float, msgspec.Meta(ge=-1e6, le=1e6)]
"""No logarithm, share or mean of such comes near the ends, and what is computed from them is finite."""


class Forecast(msgspec.Struct, frozen=True):
    """Image tokens that a picture will keep, as budgets count them.

    Attributes:
        expected: their mean over pictures with such features.
        reserve: so many are enough for 95 of 100 pictures like those of calibration.
        least: no picture of so many tokens keeps fewer: each layer that merges at most halves them.
        most: tokens of the untouched image.
    """

    expected: float
    reserve: int
    least: int
    most: int


class BudgetForecast(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The fit at one budget. Its numbers are of log(kept / untouched tokens), natural logarithms.

    Attributes:
        budget: as calibrated.
        intercept: the fit for a picture of average features.
        slopes: what one standard deviation of each feature adds.
        to_mean: added to the fit, it gives the log of the mean, which is above the mean of the logs.
        to_reserve: added to the fit, it is enough for `COVERED` of all pictures.
        r2: part of the variance of log(kept / untouched) that the fit tells of images left out of it; None: there is
            no variance.
    """

    budget: Annotated[float, msgspec.Meta(gt=0)]
    intercept: Number
    slopes: tuple[Number, ...]
    to_mean: Number
    to_reserve: Number
    r2: Annotated[float, msgspec.Meta(le=1)] | None = None


class Forecasts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What calibration fitted, for every budget.

    Attributes:
        features: names of the features of a picture, see `dymu.media.features`, and `LOG_TOKENS`.
        means, sds: of each over the calibration images. One whose sd is not above `LEAST_SD` tells nothing.
        budgets: one entry per calibrated budget, smallest first.

    Raises:
        ValueError: not one number per feature, or budgets that do not rise.
    """

    features: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    means: tuple[Number, ...]
    sds: tuple[Annotated[float, msgspec.Meta(ge=0, le=1e6)], ...]
    budgets: Annotated[tuple[BudgetForecast, ...], msgspec.Meta(min_length=1)]

    def __post_init__(self) -> None:
        each = (self.means, self.sds, *(entry.slopes for entry in self.budgets))
        if {len(numbers) for numbers in each} != {len(self.features)}:
            raise ValueError("`forecasts` need one mean, sd and slope per feature")
        if any(lower.budget >= upper.budget for lower, upper in pairwise(self.budgets)):
            raise ValueError("the budgets of `forecasts` must rise")

    def at(self, measured: Sequence[float], budget: float) -> tuple[float, float]:
        """Parts of its tokens that a picture will keep, above 0: the mean, and what is enough for `COVERED`.

        Args:
            measured: its features.
            budget: in tokens, within those calibrated; between two of them, logarithms are interpolated linearly in
                the log of the budget.
        """
        pairs = zip(measured, self.means, self.sds, strict=True)
        standardised = [(value - mean) / sd if sd > LEAST_SD else 0.0 for value, mean, sd in pairs]
        lower = max((entry for entry in self.budgets if entry.budget <= budget), key=lambda entry: entry.budget)
        upper = min((entry for entry in self.budgets if entry.budget >= budget), key=lambda entry: entry.budget)
        part = 0.0
        if lower is not upper:
            part = math.log(budget / lower.budget) / math.log(upper.budget / lower.budget)
        mean, reserve = 0.0, 0.0
        for entry, weight in ((lower, 1 - part), (upper, part)):
            fitted = entry.intercept + sum(s * x for s, x in zip(entry.slopes, standardised, strict=True))
            mean += weight * (fitted + entry.to_mean)
            reserve += weight * (fitted + entry.to_reserve)
        return math.exp(min(mean, 0.0)), math.exp(min(reserve, 0.0))
