"""SparseVLM (arXiv 2410.04417): the words of the question that speak of the picture choose its tokens."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from dymu.pruning.pruning import Ahead, InStages, check_stages

HEADS = 14 / 32
"""The part of the heads that is asked, those whose raters look at the picture most."""


@dataclass(frozen=True)
class SparseVLM(InStages):
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

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.layers and len(self.rates) != 3:
            raise ValueError(f"SparseVLM has {len(self.rates)} rates; give three, or a layer for each.")

    def starts(self, layers: int) -> tuple[int, ...]:
        usual = accumulate((of_32 * layers // 32 for of_32 in (2, 6, 15)), lambda before, at: max(before + 1, at))
        return check_stages(self, [layer + 1 for layer in self.layers or usual], layers)

    def choose(self, ahead: Ahead) -> Tensor:
        raters = raters_of(ahead.embeds[ahead.shown], ahead.embeds[ahead.texts])
        rows = ahead.texts[raters]
        weights = ahead.attend(ahead.layer - 1, rows)[..., ahead.shown]
        plain = ahead.alike(ahead.layer - 1, rows)[:, ahead.shown]
        weights = weights / plain.clamp(min=torch.finfo(torch.float32).tiny)
        weights = weights.masked_fill(~ahead.running, 0)
        heads = weights.sum((1, 2)).argsort(descending=True, stable=True)[: max(round(HEADS * len(weights)), 1)]
        return ahead.best(weights[heads].mean((0, 1)), self.keep_of(ahead))


def raters_of(image: Tensor, words: Tensor) -> Tensor:
    """int64, of words [W, C] those that more than the average speak of image tokens [V, C]; of equal ones all."""
    share = (image.float() @ words.float().mT).softmax(1).mean(0)
    raters = (share > share.mean()).nonzero()[:, 0]
    return raters if len(raters) else torch.arange(len(words), device=words.device)
