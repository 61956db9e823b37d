"""Which tokens merge in which layer: by threshold (DToMe) or so many per layer (ToMe)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor

from dymu.errors import BadBudget
from dymu.token_map import TokenMap

Schedule = Literal["constant", "linear", "reverse_linear"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)

Chooser = Callable[[Tensor, Tensor], Tensor]
"""Similarities and partners of the A tokens, see `best_partner`, -> int64 [B, A], the partner that each A token merges
into; -1: it stays."""


class MergeRule(Protocol):
    """What `dymu.apply` needs to know of a way to choose merges."""

    def choosers(self, tokens: int, layers: int) -> Sequence[Chooser | None]:
        """One chooser per encoder layer, for pictures of `tokens` tokens; None: the layer does not merge."""
        ...


@runtime_checkable
class Reduction(MergeRule, Protocol):
    """A rule that also reduces the finished tokens, after the last layer whose features are used."""

    def reduction(self, images: int, tokens: int, device: torch.device) -> TokenMap:
        """Map of [images, tokens] tokens, prefix not among them; -1 for a token that is to be gone."""
        ...


@runtime_checkable
class Settling(MergeRule, Protocol):
    """A rule that also merges tokens where they stand in the prompt, see `dymu.settling`.

    Attributes:
        over_time: similarity above which tokens of a video go on from frame to frame; None: frames stay apart.
    """

    over_time: float | None

    def rounds(self, video: bool) -> tuple[float, ...]:
        """For images or videos, the similarity above which tokens of one picture merge, round after round."""
        ...


def removals(
    tokens: int, keep: float, layers: int, schedule: Schedule, merging: Collection[int] | None = None
) -> list[float]:
    """How many tokens each layer should remove so that `keep` of `tokens` remain.

    `constant` removes the same number everywhere, `linear` more in early layers, `reverse_linear` more in late ones
    (paper section 4.3). No layer can remove more than half of what reaches it; what it cannot, the others do in
    proportion. Where only some layers are `merging`, they remove everything, in the same proportion to one another.

    Args:
        tokens: of an image.
        keep: of them in the end.
        layers: how many the encoder has.
        schedule: where to remove.
        merging: indices of the layers that may; None: all.

    Raises:
        ValueError: `schedule` is unknown, or `merging` names no layer or one that there is not.
        BadBudget: `keep` is more than `tokens`, or less than halving them in every merging layer leaves.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}; choose one of {', '.join(SCHEDULES)}")
    chosen = set(range(layers) if merging is None else merging)
    if not chosen or not chosen <= set(range(layers)):
        raise ValueError(f"cannot merge in layers {sorted(chosen)}; name some of 0 to {layers - 1}")
    lowest = tokens / 2 ** len(chosen)
    if not lowest <= keep <= tokens:
        raise BadBudget(
            f"cannot keep {keep:g} of {tokens} tokens in {len(chosen)} layers, each of which at most halves them; "
            f"keep between {lowest:.3g} and {tokens}."
        )
    rising = range(1, layers + 1)
    weights = {
        "constant": [1] * layers,
        "linear": list(reversed(rising)),
        "reverse_linear": list(rising),
    }[schedule]

    def removed_at(scale: float) -> list[float]:
        left, removed = float(tokens), []
        for weight in (weight if layer in chosen else 0 for layer, weight in enumerate(weights)):
            removed.append(min(scale * weight, left / 2))
            left -= removed[-1]
        return removed

    low, high = 0.0, float(tokens)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(removed_at(middle)) < tokens - keep else (low, middle)
    return removed_at(high)


def above(threshold: float, similarity: Tensor, partner: Tensor) -> Tensor:
    """A `Chooser`: tokens more similar than `threshold` merge."""
    return torch.where(similarity > threshold, partner, -1)


def _most_similar(count: int, similarity: Tensor, partner: Tensor) -> Tensor:
    best = similarity.topk(min(count, similarity.shape[1]), dim=1).indices
    chosen = torch.zeros_like(similarity, dtype=torch.bool).scatter(1, best, True) & (similarity > -torch.inf)
    return torch.where(chosen, partner, -1)


@dataclass(frozen=True)
class ThresholdMerge:
    """DToMe: in layer l, tokens more similar than `thresholds[l]` merge, so simple images merge more.

    A threshold above 1 means that the layer does not merge; so does a layer past the end of the list.

    Args:
        thresholds: one per layer.
        images, frames: one per round of merging after an image, or the frames of a video, was placed in the prompt.
        over_time: see `Settling`.
    """

    thresholds: tuple[float, ...]
    images: tuple[float, ...] = ()
    frames: tuple[float, ...] = ()
    over_time: float | None = None

    def rounds(self, video: bool) -> tuple[float, ...]:
        return self.frames if video else self.images

    def choosers(self, tokens: int, layers: int) -> list[Chooser | None]:
        used = self.thresholds[:layers] + (2.0,) * (layers - len(self.thresholds))
        return [None if threshold > 1 else partial(above, threshold) for threshold in used]


@dataclass(frozen=True)
class FixedMerge:
    """Plain ToMe (arXiv 2210.09461): every image keeps exactly `keep` tokens, whatever it shows.

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
        if not self.keep > 0:
            raise BadBudget(f"FixedMerge(keep={self.keep}) would keep nothing; keep at least one token.")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"unknown schedule {self.schedule!r}; choose one of {', '.join(SCHEDULES)}")
        if self.layers is not None and not (len(self.layers) and min(self.layers) >= 0):
            raise ValueError(f"FixedMerge cannot merge in layers {self.layers}; name some, counted from 0")

    def check_fits(self, layers: int) -> None:
        """Refuse an encoder of which only the first `layers` run, if another one is to merge.

        Raises:
            ValueError: naming the layers that there are not.
        """
        beyond = [] if self.layers is None else [index for index in self.layers if index >= layers]
        if beyond:
            raise ValueError(
                f"FixedMerge cannot merge in layers {beyond}, since only 0 to {layers - 1} feed this model; "
                "name some of those."
            )

    def choosers(self, tokens: int, layers: int) -> list[Chooser | None]:
        keep = self.keep * tokens if isinstance(self.keep, float) and self.keep <= 1 else self.keep
        choosers: list[Chooser | None] = []
        left, wanted = tokens, 0.0
        for removed in removals(tokens, round(keep), layers, self.schedule, self.layers):
            wanted += removed
            count = min(round(wanted) - (tokens - left), left // 2)
            left -= count
            choosers.append(partial(_most_similar, count) if count else None)
        return choosers
