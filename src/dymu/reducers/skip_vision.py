"""Skip-Vision's merge (arXiv 2503.21817): tokens that all others are like join the one most like each."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dymu.reducers.faster_vlm import largest
from dymu.reducers.keep import FixedKeep
from dymu.reducers.reducer import Tokens


@dataclass(frozen=True)
class SkipVision(FixedKeep):
    """Of every image or video, the tokens with the largest sum of cosines to all others join those that are most like
    them among the rest, as their mean.

    The authors leave tokens in falling order of that sum; here they stay in theirs.

    Args:
        keep: a number of tokens; a float up to 1 is a fraction.

    Raises:
        BadBudget: `keep` is not above 0; or in use, more than there are.
    """

    keep: int | float
    fill = "nearest"
    averages = True

    def choose(self, tokens: Tokens, row: int, keep: int) -> Tensor:
        x = tokens.unit(row)
        return largest(-(x @ x.mT).sum(1), keep)
