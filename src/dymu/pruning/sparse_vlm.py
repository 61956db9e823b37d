"""SparseVLM (arXiv 2410.04417): the words of the question that speak of the picture choose its tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Self

import torch
from torch import Tensor

from dymu.pruning.pruning import Ahead, Pruning, check_layer, check_part, part_of

HEADS = 14 / 32
"""The part of the heads that is asked, those whose raters look at the picture most."""


@dataclass(frozen=True)
class SparseVLM(Pruning):
    """Behind some layers the image tokens stay that get most attention there from the question's raters: its tokens
    whose embeddings have more than the average of those of the picture.

    Attention is divided by what it would be if all queries and keys were the same ahead of rotation, which takes out
    what comes of positions alone (version 2).

    Args:
        rates: of all image tokens, the fraction that is left behind each layer.
        layers: these layers; the authors' are 2, 6 and 15 of 32; empty: as far in, but no two the same.
        fill: see `Pruning`.

    Raises:
        BadBudget: a rate is no fraction.
        ValueError: rates rise, or are not as many as layers; or in use, the language model has too few layers.
    """

    rates: tuple[float, ...] = (300 / 576, 200 / 576, 118 / 576)
    layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("rates", "layers"):
            given: Any = getattr(self, name)
            object.__setattr__(self, name, (given,) if isinstance(given, int | float) else tuple(given))
        for rate in self.rates:
            check_part("rates", rate)
        if len(self.rates) != (len(self.layers) or 3):
            raise ValueError(f"SparseVLM has {len(self.rates)} rates; give one for each layer, or three.")
        if sorted(self.rates, reverse=True) != list(self.rates):
            raise ValueError(f"SparseVLM drops for good, so that rates {self.rates} cannot rise.")

    def starts(self, layers: int) -> tuple[int, ...]:
        usual = accumulate((of_32 * layers // 32 for of_32 in (2, 6, 15)), lambda before, at: max(before + 1, at))
        found = tuple(layer + 1 for layer in self.layers or usual)
        for layer in found:
            check_layer("layers", layer, layers)
        if sorted(set(found)) != list(found):
            raise ValueError(f"SparseVLM cannot choose behind layers {self.layers or found}: name rising ones.")
        return found

    def parts(self, layers: int) -> tuple[float, ...]:
        return self.rates

    def scaled(self, factor: float) -> Self:
        return replace(self, rates=tuple(min(factor * rate, 1.0) for rate in self.rates))

    def choose(self, ahead: Ahead) -> Tensor:
        raters = raters_of(ahead.embeds[ahead.shown], ahead.embeds[ahead.texts])
        rows = ahead.texts[raters]
        weights = ahead.attend(ahead.layer - 1, rows)[..., ahead.shown]
        plain = ahead.alike(ahead.layer - 1, rows)[:, ahead.shown]
        weights = weights / plain.clamp(min=torch.finfo(torch.float32).tiny)
        weights = weights.masked_fill(~ahead.running, 0)
        heads = weights.sum((1, 2)).argsort(descending=True, stable=True)[: max(round(HEADS * len(weights)), 1)]
        rate = self.rates[self.starts(ahead.layers).index(ahead.layer)]
        return ahead.best(weights[heads].mean((0, 1)), part_of(rate, len(ahead.shown)))


def raters_of(image: Tensor, words: Tensor) -> Tensor:
    """int64, of words [W, C] those that more than the average speak of image tokens [V, C]; of equal ones all."""
    share = (image.float() @ words.float().mT).softmax(1).mean(0)
    raters = (share > share.mean()).nonzero()[:, 0]
    return raters if len(raters) else torch.arange(len(words), device=words.device)
