"""Evenly spaced tokens stay: the other control that every method has to beat."""

from __future__ import annotations

from dataclasses import dataclass

from dymu.choices import Fill
from dymu.reducers.fill import fill_beside
from dymu.reducers.keep import FixedKeep
from dymu.reducers.reducer import Tokens


@dataclass(frozen=True)
class Stride(FixedKeep):
    """Of the N tokens of an image or video, in their order, those at index floor((j + 1/2) N / keep) stay.

    Args:
        keep: a number of tokens; a float up to 1 is a fraction.
        fill: what stands for the others: nothing, the kept token that lies nearest to each, or the mean of each run.

    Raises:
        BadBudget: `keep` is not above 0; or in use, more than there are.
    """

    keep: int | float
    fill: Fill = "none"
    fill_nearest = fill_beside

    def choose(self, tokens: Tokens, row: int, keep: int) -> list[int]:
        return [(2 * j + 1) * tokens.counts[row] // (2 * keep) for j in range(keep)]
