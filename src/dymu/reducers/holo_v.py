"""HoloV (arXiv 2510.02912): every stretch of the picture keeps its part."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dymu.choices import Fill
from dymu.reducers.faster_vlm import largest
from dymu.reducers.keep import KeepOfPictures
from dymu.reducers.reducer import Tokens


def in_stretches(score: Tensor, keep: int, stretches: int) -> Tensor:
    """int64 [keep], those of [N] scores that stay: of each stretch the largest, as many as its mean score is a part of
    all. What rounding leaves goes to the largest, as does what a stretch has no tokens for."""
    parts = score.tensor_split(min(stretches, len(score)))
    means = torch.stack([part.mean() for part in parts])
    quota = (means / means.sum().clamp(min=torch.finfo(means.dtype).tiny) * keep).floor().long().tolist()
    quota = [min(of_part, len(part)) for of_part, part in zip(quota, parts, strict=True)]
    order = largest(means, len(means)).tolist()
    while (left := keep - sum(quota)) > 0:
        for number in [number for number in order if quota[number] < len(parts[number])][:left]:
            quota[number] += 1
    begin, kept = 0, []
    for part, of_part in zip(parts, quota, strict=True):
        kept.append(largest(part, of_part) + begin)
        begin += len(part)
    return torch.cat(kept)


@dataclass(frozen=True)
class HoloV(KeepOfPictures):
    """Of every picture's tokens, in their order cut into stretches of equal length, each stretch keeps those that get
    most attention, as many as its mean attention is a part of all.

    Args:
        keep: of an image or video, a number of tokens; a float up to 1 is a fraction.
        stretches: of a picture.
        fill: what stands for the others: nothing, the kept token that is most like each, or the mean of each run.

    Raises:
        BadBudget: `keep` is not above 0; or in use, more than there are.
        ValueError: `stretches` is below 1.
    """

    keep: int | float
    stretches: int = 16
    fill: Fill = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stretches < 1:
            raise ValueError(f"stretches={self.stretches!r}: a picture has at least one")

    def reads(self, layers: int) -> tuple[int]:
        return (-1,)

    def choose_of(self, tokens: Tokens, row: int, index: Tensor, keep: int) -> Tensor:
        return in_stretches(tokens.attention()[row, index], keep, self.stretches)
