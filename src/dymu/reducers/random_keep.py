"""Tokens drawn at random stay: what every method has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dymu.choices import Fill
from dymu.reducers.keep import FixedKeep
from dymu.reducers.reducer import Tokens


@dataclass(frozen=True)
class RandomKeep(FixedKeep):
    """Of every image or video, `keep` tokens drawn at random stay where they stand.

    Args:
        keep: a number of tokens; a float up to 1 is a fraction.
        seed: of the draw, with the picture itself, so that a picture keeps the same tokens wherever it is shown.
        fill: what stands for the others: nothing, the kept token that is most like each, or the mean of each run.

    Raises:
        BadBudget: `keep` is not above 0; or in use, more than there are.
    """

    keep: int | float
    seed: int = 0
    fill: Fill = "none"

    def choose(self, tokens: Tokens, row: int, keep: int) -> Tensor:
        picture = tokens.shown.pixels[tokens.first[row]].detach().float().contiguous()
        bits = picture.view(torch.int32).flatten()
        digest = int((bits * torch.arange(1, len(bits) + 1, device=bits.device)).sum()) & (2**62 - 1)
        generator = torch.Generator("cpu").manual_seed(self.seed ^ digest)
        return (
            torch.rand(tokens.counts[row], generator=generator, dtype=torch.float32, device="cpu")
            .argsort()[:keep]
            .to(bits.device)
        )
