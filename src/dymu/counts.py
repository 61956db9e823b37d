"""How many tokens images keep, as users ask for it, and the reducer that does it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from dymu.choices import COUNTINGS, SCHEDULES, Counting
from dymu.errors import BadBudget, BadThresholds
from dymu.reducers import FixedMerge, Reducer, ThresholdMerge
from dymu.thresholds import Thresholds, number

Budget = int | float | str | None
"""Tokens, a fraction of all, `untouched` (nothing merges), or what is set anyway."""

NOTHING = ThresholdMerge(())
"""Merges nothing."""


@dataclass(frozen=True)
class Count:
    """How many tokens images keep.

    Args:
        budget: on average, see `Thresholds.tokens_for`; None: the only calibrated one, or the one nearest to
            `at_most`.
        per_second: tokens per second of video; None: every frame is merged by itself.
        at_most: what no image goes beyond; see `ThresholdMerge.at_most`.
        exactly: what every image keeps, in place of an average; see `FixedMerge.keep`.

    Raises:
        BadBudget: `exactly` and something else.
    """

    budget: int | float | None = None
    per_second: int | float | None = None
    at_most: int | float | None = None
    exactly: int | float | None = None

    @classmethod
    def of(cls, counting: Counting, budget: int | float | None) -> Count:
        """A number in one of the senses that it may have."""
        return cls(**{COUNTINGS[counting]: budget})

    def __post_init__(self) -> None:
        given = [name for name in ("budget", "per_second", "at_most") if getattr(self, name) is not None]
        if self.exactly is not None and given:
            raise BadBudget(
                f"exactly={self.exactly!r} says how much every image keeps: leave {' and '.join(given)} out."
            )
        for name in ("at_most", "exactly"):
            value = getattr(self, name)
            value = value if value is None else number(value, f"`{name}` is a number of tokens or a fraction of them")
            if value is not None and not value > 0:
                raise BadBudget(f"cannot keep {value:g} tokens of an image; keep at least 1.")
            if isinstance(value, float) and value > 1 and not value.is_integer():
                raise BadBudget(f"{name}={value:g} is neither a whole number of tokens nor a fraction of all.")

    def __str__(self) -> str:
        named = {"budget {:g}": self.budget, "{:g} per second": self.per_second, "at most {:g}": self.at_most}
        named |= {"exactly {:g}": self.exactly}
        return ", ".join(text.format(value) for text, value in named.items() if value is not None)

    def at(self, budget: int | float | None) -> Count:
        """The same in the same sense with another number."""
        if self.exactly is not None:
            return replace(self, exactly=budget)
        if self.budget is None and self.at_most is not None:
            return replace(self, at_most=budget)
        return replace(self, budget=budget)

    def rule(self, thresholds: Thresholds) -> tuple[Reducer, float]:
        """What merges so, and the number in tokens; of `exactly`, as it was given.

        Raises:
            BadBudget: nothing was calibrated for it, or it is no number above 0, or above what an image has.
            BadThresholds: it is not known how merges spread over the layers.
        """
        if self.exactly is not None:
            fixed, one_size = _fixed(self.exactly, thresholds), thresholds.image_tokens is None
            if one_size and thresholds.full is not None and fixed.keep > thresholds.full:
                raise BadBudget(
                    f"cannot keep {fixed.keep:g} tokens of images that have {thresholds.full:g}; take fewer."
                )
            return fixed, fixed.keep
        budget = self.budget
        if budget is None and self.at_most is not None:
            budget = thresholds.tokens_for(self.at_most, nearest=True)
        entry = thresholds.at(budget)
        over_time = None if self.per_second is None else thresholds.over_time_at(budget, self.per_second)
        full = thresholds.full
        share = None if full is None else _fixed(min(entry.budget / full, 1.0), thresholds)
        rule = ThresholdMerge(entry.thresholds, entry.images, entry.frames, over_time, self.at_most, share)
        return rule, entry.budget


def _fixed(keep: int | float, thresholds: Thresholds) -> FixedMerge:
    """What keeps so many, by merges that spread over the layers as they were calibrated to."""
    schedule: Any = thresholds.schedule or "reverse_linear"
    if schedule not in SCHEDULES:
        raise BadThresholds(f"{thresholds} names the schedule {schedule!r}, which is unknown; calibrate again.")
    return FixedMerge(keep, schedule, thresholds.merge_layers)
