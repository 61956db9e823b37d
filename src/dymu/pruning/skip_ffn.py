"""Skip-FFN and skip-KV (Skip-Vision, arXiv 2503.21817): most image tokens are only attended to."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self, get_args

from torch import Tensor

from dymu.pruning.pruning import Ahead, Pruning, check_layer, check_part, part_of

Score = Literal["last-row", "small"]


@dataclass(frozen=True)
class SkipFFN(Pruning):
    """From one layer on, a part of the image tokens runs the MLP; the others take part in attention alone, and the KV
    cache of these layers forgets them when the prompt has been read.

    The authors train with it, on a sequence in another order, and choose by the class token's attention in the encoder.

    Args:
        keep: the fraction that runs the MLP.
        layer: the first one where others skip it.
        until: the first one where all run it again; None: none.
        score: what runs: tokens to which the prompt's last token attends most in that layer, or those that stand for
            fewest tokens, since what many are like is background.
        forget: whether the KV cache forgets the others.

    Raises:
        BadBudget: `keep` is no fraction.
        ValueError: `score` is unknown; or in use, the language model has no such layers.
    """

    keep: float = 0.4
    layer: int = 1
    until: int | None = None
    score: Score = "last-row"
    forget: bool = True
    attends: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "keep", check_part("keep", self.keep))
        if self.score not in get_args(Score):
            raise ValueError(f"unknown score {self.score!r}; choose one of {', '.join(get_args(Score))}")

    @property
    def forgets(self) -> bool:
        return self.forget

    def starts(self, layers: int) -> tuple[int, ...]:
        check_layer("layer", self.layer, layers)
        if self.until is None:
            return (self.layer,)
        check_layer("until", self.until, layers)
        if self.until <= self.layer:
            raise ValueError(f"until={self.until} is not behind layer={self.layer}.")
        return self.layer, self.until

    def parts(self, layers: int) -> tuple[float, ...]:
        return (self.keep, 1.0)[: len(self.starts(layers))]

    def scaled(self, factor: float) -> Self:
        return replace(self, keep=min(factor * self.keep, 1.0))

    def choose(self, ahead: Ahead) -> Tensor | None:
        if ahead.layer == self.until:
            return None
        keep = part_of(self.keep, len(ahead.shown))
        if self.score == "small":
            return ahead.best(-ahead.size, keep)
        return ahead.best(ahead.received(ahead.layer, ahead.shown.new_tensor([ahead.last])), keep)
