"""FastV (arXiv 2403.06764): image tokens that the last token of the prompt hardly looks at go early on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor

from dymu.pruning.pruning import Ahead, Pruning, check_layer, check_part, part_of


@dataclass(frozen=True)
class FastV(Pruning):
    """Ahead of one layer the image tokens stay that get most attention from the prompt's last token in the layer
    before, on average over heads.

    Args:
        keep: the fraction that stays.
        layer: ahead of which it happens; the layers before run all tokens, and cache them.
        fill: see `Pruning`.

    Raises:
        BadBudget: `keep` is no fraction.
        ValueError: in use, the language model has no such layer.
    """

    keep: float = 0.5
    layer: int = 2

    def __post_init__(self) -> None:
        check_part("keep", self.keep)

    def starts(self, layers: int) -> tuple[int, ...]:
        check_layer("layer", self.layer, layers)
        return (self.layer,)

    def parts(self, layers: int) -> tuple[float, ...]:
        return (self.keep,)

    def scaled(self, factor: float) -> Self:
        return replace(self, keep=min(factor * self.keep, 1.0))

    def choose(self, ahead: Ahead) -> Tensor:
        score = ahead.received(ahead.layer - 1, ahead.shown.new_tensor([ahead.last]))
        return ahead.best(score, part_of(self.keep, len(score)))
