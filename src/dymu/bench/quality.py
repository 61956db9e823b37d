"""What an evaluation says beside times: accuracy and divergence at the budgets that were timed, and which to take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dymu.bench.variants import Variant
from dymu.errors import DymuError
from dymu.evaluation.results import Results
from dymu.evaluation.summary import ALL, RowSummary
from dymu.evaluation.tables import difference, likeness, series

NEAR = 0.05
"""Part by which the budget of an evaluated row may differ from the one that was timed."""


def check_same_model(results: Results, name: str, weights: str) -> None:
    """Raises: DymuError, where the evaluation is of another model than the one that was timed."""
    of = results.header.model
    if of.weights != weights:
        raise DymuError(
            f"the evaluation is of {of.name} (weights {of.weights}), and {name} (weights {weights}) was timed; "
            "give that of the same model."
        )


def beside(variant: Variant, budget: float, summaries: Iterable[RowSummary]) -> RowSummary | None:
    """The evaluated row that merges by thresholds to the same budget and attends as the variant does; None: there is
    none."""
    alike = [row for row in summaries if row.row.method == "dtome" and row.row.unmerge == variant.unmerge]
    nearest = min(alike, key=lambda row: abs(row.row.budget - budget), default=None)
    return nearest if nearest is not None and abs(nearest.row.budget - budget) <= NEAR * budget else None


def recommended(summaries: Iterable[RowSummary], loss: float, divergence: float) -> list[RowSummary]:
    """For every way to merge and unmerge the row with the fewest tokens that stays within both.

    Args:
        loss: share of right answers that may be lost against the untouched model.
        divergence: KL divergence, in nats per token, that the answers may have from the untouched model's.
    """
    within = dict[str, RowSummary]()
    for row in summaries:
        if row.row.method == "untouched" or ALL not in row.difference or ALL not in row.divergence:
            continue
        if row.difference[ALL].mean >= -loss and row.divergence[ALL].mean <= divergence:
            best = within.setdefault(series(row.row), row)
            if row.tokens_mean < best.tokens_mean:
                within[series(row.row)] = row
    return list(within.values())


def told(summary: RowSummary) -> str:
    """`-1.5 [-3.1, +0.1] points of right answers, KL 0.0236 nats per token`."""
    return f"{difference(summary)} points of right answers, KL {likeness(summary)[1]} nats per token"


def said(rows: Sequence[RowSummary], loss: float, divergence: float) -> list[str]:
    """Which operating points to take, for people."""
    limits = f"within {100 * loss:g} points and {divergence:g} nats per token"
    if not rows:
        return [f"No evaluated budget stays {limits}."]
    return [
        f"Recommended, the fewest tokens {limits}:",
        *(f"* {series(row.row)}, {row.row.budget} tokens: {told(row)}" for row in rows),
    ]
