"""DART (arXiv 2502.11494): what is least like a few pivots stays, since the rest is told already."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dymu.pruning.pruning import Ahead, Pruning, check_layer, check_part, part_of


@dataclass(frozen=True)
class DART(Pruning):
    """Ahead of one layer the image tokens stay that are least like pivots: those tokens of image and text whose keys in
    the layer before are largest, by the sum of magnitudes.

    The program that could be read goes through its pivots in no order; here those of the image come first, by falling
    size, then those of the text.

    Args:
        keep: the fraction that stays, pivots of the image included.
        layer: ahead of which it happens.
        pivots: how many of the image, and as many of the text.
        fill: see `Pruning`.

    Raises:
        BadBudget: `keep` is no fraction.
        ValueError: `pivots` is below 1; or in use, the language model has no such layer.
    """

    keep: float = 0.222
    layer: int = 2
    pivots: int = 4

    def __post_init__(self) -> None:
        check_part("keep", self.keep)
        if isinstance(self.pivots, bool) or not isinstance(self.pivots, int) or self.pivots < 1:
            raise ValueError(f"DART needs at least one pivot, not {self.pivots!r}")

    def starts(self, layers: int) -> tuple[int, ...]:
        check_layer("layer", self.layer, layers)
        return (self.layer,)

    def parts(self, layers: int) -> tuple[float, ...]:
        return (self.keep,)

    def scaled(self, factor: float) -> Self:
        return replace(self, keep=min(factor * self.keep, 1.0))

    def choose(self, ahead: Ahead) -> Tensor:
        norms = ahead.keys(ahead.layer - 1).float().abs().sum((1, 2))
        features = normalize(ahead.norm(ahead.hidden).float(), dim=-1)
        keep = part_of(self.keep, len(ahead.shown))
        own = _largest(norms[ahead.shown], min(self.pivots, keep))
        texts = ahead.texts[_largest(norms[ahead.texts], self.pivots)]
        pivots = torch.cat((ahead.shown[own], texts))
        each, more = divmod(keep - len(own), len(pivots))
        chosen = torch.zeros(len(ahead.shown), dtype=torch.bool, device=own.device)
        chosen[own] = True
        for number, pivot in enumerate(pivots.tolist()):
            like = (features[ahead.shown] @ features[pivot]).masked_fill(chosen, torch.inf)
            chosen[like.argsort(stable=True)[: each + (number < more)]] = True
        return chosen.nonzero()[:, 0]


def _largest(norms: Tensor, count: int) -> Tensor:
    return norms.argsort(descending=True, stable=True)[:count]
