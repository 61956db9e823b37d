"""FasterVLM (arXiv 2412.01818): what the class token attends to most stays."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dymu.choices import Fill
from dymu.reducers.keep import KeepOfPictures
from dymu.reducers.reducer import Tokens


def largest(score: Tensor, keep: int) -> Tensor:
    """int64 [keep], the indices of the largest of [N], largest first; of equal ones the first."""
    return score.argsort(descending=True, stable=True)[:keep]


@dataclass(frozen=True)
class FasterVLM(KeepOfPictures):
    """Of every picture the tokens stay that get most attention in the last encoder layer that runs.

    Args:
        keep: of an image or video, a number of tokens; a float up to 1 is a fraction.
        fill: what stands for the others: nothing, the kept token that is most like each, or the mean of each run.

    Raises:
        BadBudget: `keep` is not above 0; or in use, more than there are.
    """

    keep: int | float
    fill: Fill = "none"

    def reads(self, layers: int) -> tuple[int]:
        return (-1,)

    def choose_of(self, tokens: Tokens, row: int, index: Tensor, keep: int) -> Tensor:
        return largest(tokens.attention()[row, index], keep)
