"""LLaVA-PruMerge (arXiv 2403.15388): outliers of attention stay, and get what is most like them added."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dymu.checks import check_fields
from dymu.reducers.faster_vlm import largest
from dymu.reducers.keep import check_finite
from dymu.reducers.reducer import Reduced, Reducer, Tokens
from dymu.token_map import TokenMap, at_least_float32, leaders_of

NEIGHBOURS = 32
"""Tokens that are added to each that stays."""


def outliers(score: Tensor, plus: bool, beyond: float = 1.5) -> Tensor:
    """int64 [at least 1], rising: those of [N] scores that lie above the third quartile by `beyond` times its distance
    to the first, at least one; with `plus` also evenly spaced ones, three for each."""
    first, third = (float(torch.quantile(score.detach(), part)) for part in (0.25, 0.75))
    count = max(int((score > third + beyond * (third - first)).sum()), 1)
    kept = torch.zeros_like(score, dtype=torch.bool)
    kept[largest(score, count)] = True
    if plus:
        kept[: len(score) - 1 : max(int(len(score) // count / 3), 1)] = True
    return kept.nonzero()[:, 0]


@dataclass(frozen=True)
class PruMerge(Reducer):
    """Of every picture (tile, frame) that the encoder sees, tokens stay that get outstanding attention in the layer
    behind that whose features are read, and each has its 32 most similar ones added, weighed by their attention.

    How many stay depends on the picture. A token that went is represented by the kept one of the most similar key; the
    authors' program has one more token for all of them, of which no place is known, and which is left out.

    Args:
        plus: whether evenly spaced tokens stay, too, about three for each.
        outliers: how far above the third quartile attention is outstanding, in distances between the first and the
            third; the authors' number is 1.5. Fewer tokens stay by a larger one.

    Raises:
        ValueError: `outliers` is no finite number.
    """

    plus: bool = False
    outliers: float = 1.5

    def __post_init__(self) -> None:
        check_fields(self)
        check_finite(self, "outliers")

    def reads(self, layers: int) -> tuple[None]:
        return (None,)

    def after_encoder(self, tokens: Tokens) -> Reduced:
        label = torch.full_like(tokens.map.first(), -1)
        features = at_least_float32(tokens.features).clone()
        sources = tokens.shown.sources
        score, keys = tokens.attention(None, heads=False), tokens.of_pictures(sources.keys(None, heads=False))
        for row, count in enumerate(tokens.counts):
            own, unit = score[row, :count], normalize(keys[row, :count], dim=-1)
            kept = outliers(own, self.plus, self.outliers)
            cosine = unit[kept] @ unit.mT
            near = cosine.scatter(1, kept[:, None], -torch.inf).topk(min(NEIGHBOURS, count - 1)).indices
            x = at_least_float32(tokens.features[row, :count])
            features[row, kept] = x[kept] + (own[near][..., None] * x[near]).sum(1)
            label[row, :count] = kept[cosine.argmax(0)]
            label[row, kept] = kept
        merges = TokenMap.from_leaders(leaders_of(label, label.shape[1]), tokens.present)
        stands = label == torch.arange(label.shape[1], device=label.device)
        return Reduced(merges, merges.sum(features * stands[..., None]).to(tokens.features.dtype))
