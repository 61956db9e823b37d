"""PyramidDrop (arXiv 2410.17247): image tokens go stage by stage; Reroute lets them come back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dymu.pruning.pruning import Ahead, InStages, check_stages


@dataclass(frozen=True)
class PyramidDrop(InStages):
    """Ahead of some layers the image tokens stay to which the prompt's last token would attend most in that very layer,
    on average over heads.

    With `unmerge="none"` positions are numbered anew behind every stage, as in the authors' program; in the other forms
    tokens stay where they stand. One stage in the middle with a rate of a third is the second half of VScan.

    Args:
        rates: of all image tokens, the fraction that runs from each stage on.
        layers: where stages begin, one number for one stage; empty: at equal distances, so with three at
            a quarter, half and three quarters.
        fill: see `Pruning`.

    Raises:
        BadBudget: a rate is no fraction.
        ValueError: rates rise, or are not as many as layers; or in use, the language model has too few layers.
    """

    rates: tuple[float, ...] = (0.5, 0.25, 0.125)

    def starts(self, layers: int) -> tuple[int, ...]:
        stages = len(self.rates) + 1
        return check_stages(self, self.layers or [layers * stage // stages for stage in range(1, stages)], layers)

    def choose(self, ahead: Ahead) -> Tensor:
        score = ahead.received(ahead.layer, ahead.shown.new_tensor([ahead.last]))
        return ahead.best(score, self.keep_of(ahead))


@dataclass(frozen=True)
class Reroute(PyramidDrop):
    """The same, but tokens only sit stages out: in the next one all compete again."""

    comes_back: ClassVar[bool] = True
