"""DART (arXiv 2502.11494): what is least like a few pivots stays, since the rest is told already."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dymu.pruning.pruning import Ahead, AtLayer, part_of
from dymu.token_map import at_least_float32


@dataclass(frozen=True)
class DART(AtLayer):
    """Ahead of one layer the image tokens stay that are least like pivots: those tokens of image and text whose keys in
    the layer before are largest, by the sum of magnitudes.

    The program that could be read goes through its pivots in no order; here those of the image come first, by falling
    size, then those of the text. By a fraction of 0.222 it keeps 124 of 576, since each pivot's part is cut to a whole
    number; here `keep` is what stays.

    Args:
        keep, layer: see `AtLayer`; pivots of the image are among what stays.
        pivots: how many of the image, and as many of the text.
        fill: see `Pruning`.

    Raises:
        ValueError: `pivots` is below 1.
    """

    keep: float = 124 / 576
    pivots: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pivots < 1:
            raise ValueError(f"DART needs at least one pivot, not {self.pivots!r}")

    def choose(self, ahead: Ahead) -> Tensor:
        norms = at_least_float32(ahead.keys(ahead.layer - 1)).abs().sum((1, 2))
        features = normalize(at_least_float32(ahead.norm(ahead.hidden)), dim=-1)
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
