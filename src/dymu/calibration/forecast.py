"""Features of pictures and what they kept -> what tells it beforehand, see `dymu.forecast`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from dymu.forecast import COVERED, LEAST_SD, LOG_TOKENS, BudgetForecast, Forecasts
from dymu.media.features import NAMES

FEWEST = 20
"""Images that a fit needs: of fewer, no residual has 95 of 100 below it."""

RIDGE = 1.0
"""Added to the sum of squares of each standardised feature, which is the number of images."""


def fit(
    measured: Sequence[Sequence[float]], tokens: Sequence[int], kept: Mapping[float, Sequence[int]]
) -> Forecasts | None:
    """Log(kept / tokens) regressed on standardised features, for every budget by itself.

    What is added for the reserve is a quantile of the residuals of images that were each left out of the fit, of the
    rank that makes it enough for the next image with a chance of `COVERED`.

    Args:
        measured: [images, F], the features of each image's pixels.
        tokens: [images], those of each untouched image.
        kept: by budget, those that each image kept.

    Returns:
        None where there are fewer than `FEWEST` images.
    """
    count = len(tokens)
    if count < FEWEST:
        return None
    counts = np.column_stack([tokens, *(kept[budget] for budget in sorted(kept))]).astype(np.float64)
    everything = np.column_stack([np.asarray(measured, dtype=np.float64), counts])
    order = np.lexsort(everything.T)  # sums in one order, whichever worker has which image
    full = counts[order, 0]
    features = np.column_stack([everything[order, : len(NAMES)], np.log(full)])
    means, sds = features.mean(0), features.std(0)
    standardised = (features - means) / np.where(sds > LEAST_SD, sds, np.inf)
    budgets = []
    for column, budget in enumerate(sorted(kept), 1):
        part = counts[order, column] / full
        intercept, slopes, left_out = ridge(standardised, np.log(part), RIDGE)
        fitted = intercept + standardised @ slopes
        variance = float(np.log(part).var())
        budgets.append(
            BudgetForecast(
                budget=budget,
                intercept=intercept,
                slopes=tuple(slopes.tolist()),
                to_mean=math.log((part * full).sum() / (np.exp(fitted) * full).sum()),
                to_reserve=float(np.sort(left_out)[math.ceil((count + 1) * COVERED) - 1]),
                r2=1 - float(np.square(left_out).mean()) / variance if variance > LEAST_SD**2 else None,
            )
        )
    return Forecasts((*NAMES, LOG_TOKENS), tuple(means.tolist()), tuple(sds.tolist()), tuple(budgets))


def ridge(x: np.ndarray, y: np.ndarray, strength: float) -> tuple[float, np.ndarray, np.ndarray]:
    """Least squares with `strength` times the sum of the squared slopes; the intercept costs nothing.

    Args:
        x: [n, F], each column of mean 0.
        y: [n].

    Returns:
        The intercept, the slopes [F], and [n] the residual of each row in a fit without it.
    """
    inverse = np.linalg.inv(x.T @ x + strength * np.eye(x.shape[1]))
    intercept = float(y.mean())
    slopes = inverse @ x.T @ (y - intercept)
    leverage = 1 / len(y) + np.einsum("nf,fg,ng->n", x, inverse, x)
    return intercept, slopes, (y - intercept - x @ slopes) / (1 - leverage)
