"""RESTORE's anchors (2026): tokens that many are like, and no such other; the rest join them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dymu.reducers.faster_vlm import largest
from dymu.reducers.keep import FixedKeep
from dymu.reducers.reducer import Tokens


def anchors(cosine: Tensor, keep: int) -> Tensor:
    """int64 [keep], those of N tokens with the largest product of the sum of all cosines [N, N] and the distance to the
    nearest token of a larger sum, 1 for the largest."""
    total = cosine.sum(1)
    larger = total[None] > total[:, None]
    nearest = cosine.masked_fill(~larger, -torch.inf).amax(1)
    return largest(total * torch.where(nearest.isinf(), 1.0, 1 - nearest), keep)


@dataclass(frozen=True)
class Anchors(FixedKeep):
    """Of every image or video, the tokens that many are like, and no such other, stand for all that are most like them:
    as their mean.

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
        return anchors(x @ x.mT, keep)
