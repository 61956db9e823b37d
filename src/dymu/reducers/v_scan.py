"""VScan's first half (arXiv 2505.22654): local and global attention choose, the others join what they are most like."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dymu.reducers.faster_vlm import largest
from dymu.reducers.keep import KeepOfPictures
from dymu.reducers.reducer import Tokens


def scanned(local: Tensor, overall: Tensor, window: Tensor, keep: int) -> Tensor:
    """int64 [up to keep], those of N tokens that stay: of every window as many of the largest local score, half of all
    together at most; and of the others those of the largest overall score.

    Args:
        local, overall: [N] scores.
        window: int64 [N], which window each lies in.
    """
    if keep == len(window):
        return torch.arange(keep, device=window.device)
    windows = window.unique().tolist()
    of_each = keep // 2 // len(windows)
    kept = torch.zeros_like(window, dtype=torch.bool)
    for number in windows:
        index = (window == number).nonzero()[:, 0]
        kept[index[largest(local[index], of_each)]] = True
    kept[largest(overall.masked_fill(kept, -torch.inf), keep - keep // 2)] = True
    return kept.nonzero()[:, 0]


@dataclass(frozen=True)
class VScan(KeepOfPictures):
    """Of every picture, tokens of much attention stay, half of them spread over windows by an early encoder layer, the
    rest by the last; every other token is averaged into the one that it is most like.

    Where half of `keep` is no multiple of the number of windows, fewer stay, as in the authors' program; where all are
    asked for, all do.

    Args:
        keep: of an image or video, a number of tokens; a float up to 1 is a fraction.
        side: rows and columns of a window.
        early: the encoder layer of the local scores, by index; where it attends within windows, the last before it that
            does not, if there is one.

    Raises:
        BadBudget: `keep` is not above 0; or in use, more than there are.
        ValueError: `side` is below 1, or `early` no layer.
    """

    keep: int | float
    side: int = 6
    early: int = 5
    fill = "nearest"
    averages = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.side < 1 or self.early < 0:
            raise ValueError(f"VScan needs windows of at least one token and a layer, not {self.side} and {self.early}")

    def check_fits(self, layers: int, tokens: int | None = None) -> None:
        super().check_fits(layers, tokens)
        if self.early >= layers:
            raise ValueError(f"early={self.early}: only layers 0 to {layers - 1} feed this model; name one of those.")

    def reads(self, layers: int) -> tuple[int, ...]:
        return (self.early, -1)

    def choose_of(self, tokens: Tokens, row: int, index: Tensor, keep: int) -> Tensor:
        local, overall, place = (
            of[row, index] for of in (tokens.attention(self.early), tokens.attention(), tokens.place)
        )
        return scanned(local, overall, (place // self.side).unique(dim=0, return_inverse=True)[1], keep)
