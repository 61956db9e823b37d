"""VisionZip (arXiv 2412.04467): what gets most attention stays, and a few of the others gather the rest."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dymu.errors import BadBudget
from dymu.reducers.faster_vlm import largest
from dymu.reducers.keep import check_keep, in_tokens, is_part
from dymu.reducers.reducer import Reduced, Reducer, Shown, Tokens
from dymu.token_map import TokenMap, at_least_float32, leaders_of


def gathered(score: Tensor, keys: Tensor, dominant: int, contextual: int) -> tuple[Tensor, Tensor]:
    """Which of N tokens stands for each, int64 [N]: those of the largest scores [N] for themselves alone; of the others
    every so-manieth for those whose keys [N, D] are most like its own. And bool [N], which are such targets."""
    keys, label = normalize(keys, dim=-1), torch.arange(len(score), device=score.device)
    alone = torch.zeros_like(score, dtype=torch.bool)
    alone[largest(score, dominant)] = True
    rest, target = (~alone).nonzero()[:, 0], torch.zeros_like(alone)
    if not len(rest):
        return label, target
    targets = rest[:: max(1, len(rest) // contextual)][:contextual]
    target[targets] = True
    joining = rest[~target[rest]]
    label[joining] = targets[(keys[joining] @ keys[targets].mT).argmax(-1)]
    return label, target


@dataclass(frozen=True)
class VisionZip(Reducer):
    """Of every picture (tile, frame) that the encoder sees, `dominant` tokens stay for the attention that they get in
    the last layer that runs; of the others `contextual` evenly spaced ones get the mean of those that are most like
    them added.

    The authors' program counts the class token among the dominant ones and shows it to the language model, which never
    saw it; here all are patches.

    Args:
        dominant, contextual: numbers of tokens of each picture; both floats up to 1: fractions.

    Raises:
        BadBudget: one of them is not above 0; or in use, together they are more than there are, or less than 2.
    """

    dominant: int | float
    contextual: int | float

    def __post_init__(self) -> None:
        check_keep(self, "dominant")
        check_keep(self, "contextual")

    def reads(self, layers: int) -> tuple[int]:
        return (-1,)

    def check_fits(self, layers: int, tokens: int | None = None) -> None:
        if tokens is not None:
            self._counts(tokens)

    def check_shown(self, shown: Shown, images: Collection[int] | None = None) -> None:
        for count in set(shown.counts):
            self._counts(count)

    def after_encoder(self, tokens: Tokens) -> Reduced:
        label = torch.full_like(tokens.map.first(), -1)
        joining = torch.zeros_like(tokens.present)
        for row, count in enumerate(tokens.counts):
            score, keys = tokens.attention()[row, :count], tokens.keys[row, :count]
            label[row, :count], _ = gathered(score, keys, *self._counts(count))
            joining[row, :count] = label[row, :count] != torch.arange(count, device=label.device)
        merges = TokenMap.from_leaders(leaders_of(label, label.shape[1]), tokens.present)
        x = at_least_float32(tokens.features)
        more = merges.sum(x * joining[..., None]) / merges.sum(joining.float()).clamp(min=1)[..., None]
        own = merges.sum(x * (tokens.present & ~joining)[..., None])
        return Reduced(merges, (own + more).to(tokens.features.dtype))

    def _counts(self, tokens: int) -> tuple[int, int]:
        dominant, contextual = int(self.dominant), int(self.contextual)
        if is_part(self.dominant) or is_part(self.contextual):
            total = round(in_tokens(self.dominant, tokens) + in_tokens(self.contextual, tokens))
            if total < 2:
                raise BadBudget(
                    f"VisionZip keeps two tokens of a picture or more, and {total} of {tokens} are asked for."
                )
            contextual = max(round(in_tokens(self.contextual, tokens)), 1)
            dominant = max(total - contextual, 1)
        if dominant + contextual > tokens:
            raise BadBudget(f"cannot keep {dominant} and {contextual} of {tokens} tokens of a picture; take fewer.")
        return dominant, contextual
