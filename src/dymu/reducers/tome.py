"""ToMe (arXiv 2210.09461): as many tokens are left as were asked for, whatever a picture shows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from dymu.choices import SCHEDULES, Schedule
from dymu.merging import most_similar
from dymu.reducers.keep import check_keep, in_tokens
from dymu.reducers.reducer import Candidates, Reduced, Reducer, Shown, Stage, Tokens
from dymu.schedule import removals


@dataclass(frozen=True)
class FixedMerge(Reducer):
    """Plain ToMe: in every layer so many of the most similar tokens merge.

    Where the language model gets other tokens than those of one picture (of tiles, less their padding; shrunk; pooled
    frames), the most similar ones of each picture merge once more there, until the same part of them is left.

    Args:
        keep: tokens left of each picture, class token and registers not counted; a float up to 1 is a fraction. An
            image that is cut into tiles, or a video, is several pictures.
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

    def reduces(self, stage: Stage, shown: Shown) -> bool:
        return super().reduces(stage, shown) and not (stage == "in_prompt" and shown.single)

    def in_layer(self, candidates: Candidates) -> Tensor | None:
        # What is rounded up here merges in the prompt, where fractions of several pictures add up.
        whole = round if candidates.shown.single else math.ceil
        counts = [self._counts(tokens, candidates.layers, whole)[candidates.layer] for tokens in candidates.tokens]
        if not any(counts):
            return None
        due = torch.tensor(counts, device=candidates.keys.device)
        return most_similar(due, candidates.similarity, candidates.partner, candidates.picture)

    def in_prompt(self, tokens: Tokens) -> Reduced:
        places = (tokens.map.group >= 0).sum(1).double()
        patches = torch.tensor([tokens.shown.counts[first] for first in tokens.first[:-1]], device=places.device)
        kept = torch.tensor([in_tokens(self.keep, count) for count in patches.tolist()], device=places.device)
        goal = (places * kept / patches).round().long().clamp(min=1)
        by_picture, index = tokens.by_picture()
        item = index[by_picture.state.layout.start[:, 0]] // tokens.map.width
        merged = by_picture.merge_to(goal, item)
        return tokens.joined(merged.group, index, merged.x.flatten(0, 1))

    def _counts(self, tokens: int, layers: int, whole: Callable[[float], int] = round) -> list[int]:
        return _counts(whole(in_tokens(self.keep, tokens)), tokens, layers, self.schedule, self.layers)


@cache
def _counts(keep: int, tokens: int, layers: int, schedule: Schedule, merging: tuple[int, ...] | None) -> list[int]:
    """How many of a picture's tokens each layer merges."""
    counts: list[int] = []
    left, due = tokens, 0.0
    for removed in removals(tokens, keep, layers, schedule, merging, alike=True):
        due += removed
        counts.append(min(round(due) - (tokens - left), left // 2))
        left -= counts[-1]
    return counts
