"""DivPrune (arXiv 2503.02175): tokens far from each other stay."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dymu.choices import Fill
from dymu.reducers.keep import FixedKeep
from dymu.reducers.reducer import Tokens


def far_apart(distance: Tensor, keep: int) -> Tensor:
    """int64 [keep], in order: the token of [N, N] distances whose nearest other is farthest, then again and again the
    one that is farthest from all that are chosen. Of equal ones the first."""
    others = distance.clone().fill_diagonal_(torch.inf)
    first = int(others.amin(1).argmax())
    chosen, nearest = [first], distance[first].clone()
    nearest[first] = -torch.inf
    for _ in range(keep - 1):
        chosen.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, distance[chosen[-1]])
        nearest[chosen[-1]] = -torch.inf
    return torch.tensor(chosen, device=distance.device)


@dataclass(frozen=True)
class DivPrune(FixedKeep):
    """Of every image or video, tokens stay of which each is as far from the others as can be, by cosine.

    Args:
        keep: a number of tokens; a float up to 1 is a fraction.
        fill: what stands for the others: nothing, the kept token that is most like each, or the mean of each run.

    Raises:
        BadBudget: `keep` is not above 0; or in use, more than there are.
    """

    keep: int | float
    fill: Fill = "none"

    def choose(self, tokens: Tokens, row: int, keep: int) -> Tensor:
        x = tokens.unit(row)
        return far_apart(1 - x @ x.mT, keep)
