"""SparseVLM (arXiv 2410.04417): the words of the question that speak of the picture choose its tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from dymu.errors import BadPrompt
from dymu.merging import distances, nearest_of, peaks
from dymu.pruning.pruning import Ahead, InStages, Joined, check_stages
from dymu.token_map import at_least_float32

HEADS = 14 / 32
"""The part of the heads that is asked, those whose raters look at the picture most."""
RECYCLED = 0.3
"""The part of the dropped tokens that means are made of."""


@dataclass(frozen=True)
class SparseVLM(InStages):
    """Behind some layers the image tokens stay that get most attention there from the question's raters: its tokens
    whose embeddings have more than the average of those of the picture.

    Attention is divided by what it would be if all queries and keys were the same ahead of rotation, which takes out
    what comes of positions alone (version 2).

    Args:
        rates: of all image tokens, the fraction that is left behind each layer.
        layers: these layers; the authors' are 2, 6 and 15 of 32; empty: as far in, but no two the same.
        recycle: whether some of what is left are means of dropped tokens (version 1.5): of the 30 % with most attention
            a tenth, the peaks of density among their hidden states, each the mean of those nearest to it.
        fill: see `Pruning`.

    Raises:
        BadBudget: a rate is no fraction.
        BadPrompt: in use, no word follows the image.
        ValueError: rates rise, or are not as many as layers; or in use, the language model has too few layers.
    """

    rates: tuple[float, ...] = (300 / 576, 200 / 576, 118 / 576)
    recycle: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.layers and len(self.rates) != 3:
            raise ValueError(f"SparseVLM has {len(self.rates)} rates; give three, or a layer for each.")

    def starts(self, layers: int) -> tuple[int, ...]:
        for layer in self.layers:
            if not 0 <= layer < layers - 1:
                raise ValueError(
                    f"layers={self.layers}: SparseVLM cuts behind layers 0 to {layers - 2} of this language model; "
                    "name some of those."
                )
        usual = accumulate((of_32 * layers // 32 for of_32 in (2, 6, 15)), lambda before, at: max(before + 1, at))
        return check_stages(self, [layer + 1 for layer in self.layers or usual], layers)

    def choose(self, ahead: Ahead) -> Tensor | Joined:
        if not len(ahead.texts):
            raise BadPrompt(
                "SparseVLM asks the words behind the image which tokens they are about, and this prompt ends with it: "
                "put the question behind the image, or take another method."
            )
        raters = raters_of(ahead.embeds[ahead.shown], ahead.embeds[ahead.texts])
        rows = ahead.texts[raters]
        weights = ahead.attend(ahead.layer - 1, rows)[..., ahead.shown]
        plain = ahead.alike(ahead.layer - 1, rows)[:, ahead.shown]
        weights = weights / plain.clamp(min=torch.finfo(torch.float32).tiny)
        weights = weights.masked_fill(~ahead.running, 0)
        heads = weights.sum((1, 2)).argsort(descending=True, stable=True)[: max(round(HEADS * len(weights)), 1)]
        score, keep = weights[heads].mean((0, 1)), self.keep_of(ahead)
        return _recycled(ahead, score, keep) if self.recycle else ahead.best(score, keep)


def _recycled(ahead: Ahead, score: Tensor, keep: int) -> Tensor | Joined:
    """The `keep` image tokens that run on, some of them means of tokens that do not."""
    running, asked, centres = int(ahead.running.sum()), 0, 0
    while centres != asked // 10 + 1:  # of what is dropped, which the members of means are
        centres = asked // 10 + 1
        asked = int(RECYCLED * (running - keep + centres)) + 1
    if running <= keep or centres >= keep:
        return ahead.best(score, keep)
    kept = ahead.best(score, keep - centres)
    some = replace(ahead, running=ahead.running.index_fill(0, kept, False)).best(score, asked)
    distance = distances(at_least_float32(ahead.hidden[ahead.shown[some]]))
    centre = peaks(distance, centres).argsort(descending=True, stable=True)[:centres]
    into = torch.full_like(ahead.shown, -1)
    into[some] = some[centre[nearest_of(distance, centre)]]
    return Joined(torch.cat((kept, some[centre])).sort().values, into)


def raters_of(image: Tensor, words: Tensor) -> Tensor:
    """int64, of words [W, C] those that more than the average speak of image tokens [V, C]; of equal ones all."""
    share = (at_least_float32(image) @ at_least_float32(words).mT).softmax(1).mean(0)
    raters = (share > share.mean()).nonzero()[:, 0]
    return raters if len(raters) else torch.arange(len(words), device=words.device)
