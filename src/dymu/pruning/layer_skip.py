"""Layer skipping, as VideoLLM-MoD (arXiv 2408.16730) runs it: some layers run a part of the image tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self, get_args

import torch
from torch import Tensor

from dymu.pruning.pruning import Ahead, Pruning, check_part

Pattern = Literal["alternate", "all", "after-second", "alternate-after-second"]
Score = Literal["uniform", "random", "size", "last-row"]


@dataclass(frozen=True)
class LayerSkip(Pruning):
    """Skipping layers run a part of the image tokens; the others pass unchanged and compete again in the next one.

    Args:
        keep: the fraction that runs in a skipping layer, of each picture (image, tile, frame).
        pattern: which layers skip: every other one from the second on, all (but the first), all after the second, or
            every other one after the second.
        score: what runs: tokens at equal distances of whole tokens, from the first one on, as in the authors' program,
            so that the end of the picture never runs where `keep` is no 1 / k; drawn at random, afresh in each layer;
            those that stand for most tokens; or those to which the prompt's last token attends most.
        seed: of the draw.
        fill: see `Pruning`.

    Raises:
        BadBudget: `keep` is no fraction.
        ValueError: `pattern` or `score` is unknown; or in use, the language model has too few layers.
    """

    keep: float = 0.2
    pattern: Pattern = "after-second"
    score: Score = "uniform"
    seed: int = 0
    comes_back: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "keep", check_part("keep", self.keep))
        for name, known in (("pattern", get_args(Pattern)), ("score", get_args(Score))):
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; choose one of {', '.join(known)}")

    def starts(self, layers: int) -> tuple[int, ...]:
        first = 1 if self.pattern in ("all", "alternate") else 2
        if layers <= first:
            raise ValueError(f"a language model of {layers} layers has none that could skip by {self.pattern!r}.")
        return tuple(range(first, layers))

    def parts(self, layers: int) -> tuple[float, ...]:
        every = 2 if self.pattern.startswith("alternate") else 1
        return tuple(1.0 if number % every else self.keep for number in range(len(self.starts(layers))))

    def scaled(self, factor: float) -> Self:
        return replace(self, keep=min(factor * self.keep, 1.0))

    def choose(self, ahead: Ahead) -> Tensor | None:
        starts = self.starts(ahead.layers)
        if self.pattern.startswith("alternate") and (ahead.layer - starts[0]) % 2:
            return None
        score, kept = self._score(ahead), list[Tensor]()
        for number in ahead.picture.unique().tolist():
            index = (ahead.picture == number).nonzero()[:, 0]
            keep = max(math.ceil(round(self.keep * len(index), 6)), 1)
            if score is None:
                kept.append(index[torch.arange(keep, device=index.device) * (len(index) // keep)])
            else:
                kept.append(index[score[index].argsort(descending=True, stable=True)[:keep].sort().values])
        return torch.cat(kept)

    def _score(self, ahead: Ahead) -> Tensor | None:
        """[V], by which tokens run; None: by their places."""
        if self.score == "random":
            generator = torch.Generator("cpu").manual_seed(self.seed * 4096 + ahead.layer)
            drawn = torch.rand(len(ahead.shown), generator=generator, dtype=torch.float64, device="cpu")
            return -drawn.to(ahead.hidden.device)
        if self.score == "size":
            return ahead.size
        if self.score == "last-row":
            return ahead.received(ahead.layer, ahead.shown.new_tensor([ahead.last]))
        return None
