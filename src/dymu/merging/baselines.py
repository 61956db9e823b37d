"""What merging is compared with: reductions that take the finished image tokens and do not look at them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dymu.errors import BadBudget
from dymu.merging.rule import Chooser
from dymu.token_map import TokenMap


@dataclass(frozen=True)
class AveragePool:
    """Every image's grid of tokens is averaged over `side` x `side` equal fields."""

    side: int

    def choosers(self, tokens: int, layers: int) -> Sequence[Chooser | None]:
        return [None] * layers

    def reduction(self, images: int, tokens: int, device: torch.device) -> TokenMap:
        """Map of [images, tokens] grid tokens to the fields they lie in."""
        rows = round(tokens**0.5)
        if rows * rows != tokens or not 1 <= self.side <= rows:
            raise BadBudget(
                f"{tokens} tokens are no grid to average over {self.side} × {self.side} fields; take fewer."
            )
        field = torch.arange(rows, device=device) * self.side // rows
        group = (field[:, None] * self.side + field).flatten().expand(images, -1)
        kept = self.side**2
        return TokenMap(group, torch.full((images,), kept, device=device), kept)


@dataclass(frozen=True)
class RandomKeep:
    """Of every image, `keep` tokens drawn at random stay, in their places; the others are gone."""

    keep: int
    seed: int = 0

    def choosers(self, tokens: int, layers: int) -> Sequence[Chooser | None]:
        return [None] * layers

    def reduction(self, images: int, tokens: int, device: torch.device) -> TokenMap:
        """Map of [images, tokens] tokens to the kept ones; -1 for those that are gone."""
        if not 1 <= self.keep <= tokens:
            raise BadBudget(f"cannot keep {self.keep} of {tokens} tokens; keep at least 1 and at most all.")
        draw = torch.rand(images, tokens, generator=torch.Generator().manual_seed(self.seed))
        stays = _lowest(draw, self.keep).to(device)
        group = torch.where(stays, stays.cumsum(1) - 1, -1)
        return TokenMap(group, torch.full((images,), self.keep, device=device), self.keep, padded=self.keep < tokens)


def _lowest(draw: Tensor, count: int) -> Tensor:
    chosen = draw.topk(count, dim=1, largest=False).indices
    return torch.zeros_like(draw, dtype=torch.bool).scatter(1, chosen, True)
