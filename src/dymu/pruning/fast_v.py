"""FastV (arXiv 2403.06764): image tokens that the last token of the prompt hardly looks at go early on."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dymu.pruning.pruning import Ahead, AtLayer, part_of


@dataclass(frozen=True)
class FastV(AtLayer):
    """Ahead of one layer the image tokens stay that get most attention from the prompt's last token in the layer
    before, on average over heads.

    Args:
        keep, layer: see `AtLayer`.
        fill: see `Pruning`.
    """

    keep: float = 0.5

    def choose(self, ahead: Ahead) -> Tensor:
        score = ahead.received(ahead.layer - 1, ahead.shown.new_tensor([ahead.last]))
        return ahead.best(score, part_of(self.keep, len(score)))
