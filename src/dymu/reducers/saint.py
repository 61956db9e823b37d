"""SAINT (arXiv 2503.11549): again and again the token goes whose key is most like all others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dymu.choices import Fill
from dymu.reducers.keep import KeepOfPictures
from dymu.reducers.reducer import Tokens


def least_alike(cosine: Tensor, keep: int) -> Tensor:
    """int64 [keep], those of N tokens that are left when again and again the one of the largest sum of cosines [N, N]
    to those that are left has gone; of equal ones the first."""
    device, cosine = cosine.device, cosine.cpu()  # a GPU would be waited for at each step
    total = cosine.sum(1)
    for _ in range(len(cosine) - keep):
        gone = int(total.argmax())
        total = total - cosine[gone]
        total[gone] = -torch.inf
    return total.isfinite().nonzero()[:, 0].to(device)


@dataclass(frozen=True)
class SAINT(KeepOfPictures):
    """Of every picture the tokens stay whose keys in the last encoder layer that runs are least like each other's.

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
        keys = normalize(tokens.keys[row, index], dim=-1)
        return least_alike(keys @ keys.mT, keep)
