"""VisPruner (arXiv 2412.01818): one part by attention, the other by going without what is alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dymu.choices import Fill
from dymu.reducers.faster_vlm import largest
from dymu.reducers.keep import KeepOfPictures, check_finite
from dymu.reducers.reducer import Tokens

ROUND = 8
"""Tokens that a round drops at most."""


def pruned(score: Tensor, x: Tensor, keep: int, important: float) -> Tensor:
    """int64 [keep], those of the tokens [N, C] that stay.

    Args:
        score: [N], the attention that each gets.
        important: part of `keep` that is kept for its attention.
    """
    order, x = largest(score, len(score)), normalize(x, dim=-1)
    cosine = x @ x.mT
    first = int(keep * important)
    kept, rest, wanted = order[:first], order[first:], keep - first
    while len(rest) > wanted:
        even, odd = rest[0::2], rest[1::2]
        drop = min(ROUND, len(rest) - wanted, len(even))
        alike = cosine[even[:, None], odd].amax(1) if len(odd) else x.new_zeros(len(even))
        rest = torch.cat((even[largest(alike, len(even))[drop:]], odd))
    return torch.cat((kept, rest))


@dataclass(frozen=True)
class VisPruner(KeepOfPictures):
    """Of every picture some tokens stay for the attention that they get; of the others, in rounds of up to eight, those
    of every second one go that are most like one of the rest.

    Args:
        keep: of an image or video, a number of tokens; a float up to 1 is a fraction.
        important: part of them that stays for its attention.
        fill: what stands for the others: nothing, the kept token that is most like each, or the mean of each run.

    Raises:
        BadBudget: `keep` is not above 0; or in use, more than there are.
        ValueError: `important` is not from 0 to 1.
    """

    keep: int | float
    important: float = 0.5
    fill: Fill = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_finite(self, "important", 0, 1)

    def reads(self, layers: int) -> tuple[int | None, ...]:
        return (-1, None)

    def choose_of(self, tokens: Tokens, row: int, index: Tensor, keep: int) -> Tensor:
        return pruned(tokens.attention()[row, index], tokens.encoded[row, index], keep, self.important)
