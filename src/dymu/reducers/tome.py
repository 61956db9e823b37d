"""ToMe (arXiv 2210.09461): every picture keeps the same number of tokens, whatever it shows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from dymu.choices import SCHEDULES, Schedule
from dymu.merging import removals
from dymu.reducers.keep import check_keep, in_tokens
from dymu.reducers.reducer import Candidates, Reducer


@dataclass(frozen=True)
class FixedMerge(Reducer):
    """Plain ToMe: in every layer so many of the most similar tokens merge.

    Args:
        keep: tokens left of each picture, class token and registers not counted; a float up to 1 is a fraction. An
            image that is cut into tiles is several pictures.
        schedule: how the merges spread over the layers; ToMe's own is `constant`.
        layers: indices of the encoder layers that merge; None: all.

    Raises:
        BadBudget: `keep` is not above 0.
        ValueError: `schedule` is unknown, or `layers` is empty or holds a negative index.
    """

    keep: int | float
    schedule: Schedule = "constant"
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_keep(self)
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))
        if self.schedule not in SCHEDULES:
            raise ValueError(f"unknown schedule {self.schedule!r}; choose one of {', '.join(SCHEDULES)}")
        if self.layers is not None and not (len(self.layers) and min(self.layers) >= 0):
            raise ValueError(f"FixedMerge cannot merge in layers {self.layers}; name some, counted from 0")

    def check_fits(self, layers: int, tokens: int | None = None) -> None:
        beyond = [] if self.layers is None else [index for index in self.layers if index >= layers]
        if beyond:
            raise ValueError(
                f"FixedMerge cannot merge in layers {beyond}, since only 0 to {layers - 1} feed this model; "
                "name some of those."
            )
        if tokens is not None:
            self._counts(tokens, layers)

    def in_layer(self, candidates: Candidates) -> Tensor | None:
        count = self._counts(candidates.tokens, candidates.layers)[candidates.layer]
        return most_similar(count, candidates.similarity, candidates.partner) if count else None

    def _counts(self, tokens: int, layers: int) -> list[int]:
        return _counts(round(in_tokens(self.keep, tokens)), tokens, layers, self.schedule, self.layers)


@cache
def _counts(keep: int, tokens: int, layers: int, schedule: Schedule, merging: tuple[int, ...] | None) -> list[int]:
    """How many of a picture's tokens each layer merges."""
    counts: list[int] = []
    left, due = tokens, 0.0
    for removed in removals(tokens, keep, layers, schedule, merging):
        due += removed
        counts.append(min(round(due) - (tokens - left), left // 2))
        left -= counts[-1]
    return counts


def most_similar(count: int, similarity: Tensor, partner: Tensor) -> Tensor:
    """Merge the `count` most similar A tokens; int64 [B, A] as `dymu.merging.above` answers."""
    best = similarity.topk(min(count, similarity.shape[1]), dim=1).indices
    chosen = torch.zeros_like(similarity, dtype=torch.bool).scatter(1, best, True) & (similarity > -torch.inf)
    return torch.where(chosen, partner, -1)
