"""PyramidDrop (arXiv 2410.17247): image tokens go stage by stage; Reroute lets them come back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from torch import Tensor

from dymu.pruning.pruning import Ahead, Pruning, check_layer, check_part, part_of


@dataclass(frozen=True)
class PyramidDrop(Pruning):
    """Ahead of some layers the image tokens stay to which the prompt's last token would attend most in that very layer,
    on average over heads.

    With `unmerge="none"` positions are numbered anew behind every stage, as in the authors' program; in the other forms
    tokens stay where they stand. One stage in the middle with a rate of a third is the second half of VScan.

    Args:
        rates: of all image tokens, the fraction that runs from each stage on.
        layers: where stages begin, one number for one stage; empty: at equal distances, so
            with three at a quarter, half and three quarters.
        fill: see `Pruning`.

    Raises:
        BadBudget: a rate is no fraction.
        ValueError: rates rise, or are not as many as layers; or in use, the language model has too few layers.
    """

    rates: tuple[float, ...] = (0.5, 0.25, 0.125)
    layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("rates", "layers"):
            given: Any = getattr(self, name)
            object.__setattr__(self, name, (given,) if isinstance(given, int | float) else tuple(given))
        for rate in self.rates:
            check_part("rates", rate)
        if not self.rates or (self.layers and len(self.layers) != len(self.rates)):
            raise ValueError(
                f"{type(self).__name__} has {len(self.rates)} rates and {len(self.layers)} layers; give one of each "
                "for every stage."
            )
        if not self.comes_back and sorted(self.rates, reverse=True) != list(self.rates):
            raise ValueError(f"{type(self).__name__} drops for good, so that rates {self.rates} cannot rise.")

    def starts(self, layers: int) -> tuple[int, ...]:
        stages = len(self.rates) + 1
        found = self.layers or tuple(layers * stage // stages for stage in range(1, stages))
        for layer in found:
            check_layer("layers", layer, layers)
        if sorted(set(found)) != list(found):
            raise ValueError(f"{type(self).__name__} cannot begin stages ahead of layers {found}: name rising ones.")
        return found

    def parts(self, layers: int) -> tuple[float, ...]:
        return self.rates

    def scaled(self, factor: float) -> Self:
        return replace(self, rates=tuple(min(factor * rate, 1.0) for rate in self.rates))

    def choose(self, ahead: Ahead) -> Tensor:
        score = ahead.received(ahead.layer, ahead.shown.new_tensor([ahead.last]))
        rate = self.rates[self.starts(ahead.layers).index(ahead.layer)]
        return ahead.best(score, part_of(rate, len(score)))


@dataclass(frozen=True)
class Reroute(PyramidDrop):
    """The same, but tokens only sit stages out: in the next one all compete again."""

    comes_back: ClassVar[bool] = True
