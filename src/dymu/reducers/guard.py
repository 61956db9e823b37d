"""Guard: pictures with something in focus keep a part of their tokens, whatever they look like."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from dymu.merging.match import AHEAD, most_similar
from dymu.reducers.reducer import Candidates, Pixels, Reduced, Reducer, Shown, SomeMerge, Stage, Tokens
from dymu.reducers.tome import FixedMerge
from dymu.token_map import TokenMap


@dataclass(frozen=True)
class Guard(Reducer):
    """Another rule, but of pictures with something in focus no layer merges more than leaves what `least` leaves.

    In these, what is in focus merges last, see `Focus`. Merges behind the layers are the rule's.

    Args:
        rule: which tokens merge in other pictures.
        least: what these keep at least.
    """

    rule: Reducer
    least: FixedMerge

    def check_fits(self, layers: int, tokens: int | None = None) -> None:
        self.rule.check_fits(layers, tokens)

    def check_shown(self, shown: Shown, images: Collection[int]) -> None:
        self.rule.check_shown(shown, images)

    def reduces(self, stage: Stage, shown: Shown) -> bool:
        return self.rule.reduces(stage, shown)

    def before_encoder(self, pixels: Pixels) -> tuple[Tensor, TokenMap] | None:
        return self.rule.before_encoder(pixels)

    def in_layer(self, candidates: Candidates) -> Tensor | SomeMerge | None:
        answer = self.rule.in_layer(candidates)
        if answer is None or candidates.focus is None:
            return answer
        into, still = answer if isinstance(answer, SomeMerge) else (answer, None)
        picture, left = candidates.picture, candidates.state.layout.length - candidates.prefix
        due = torch.zeros_like(left).index_add(0, picture, (into >= 0).sum(1))
        plans = self.least.planned(candidates)
        leaves = [
            tokens - sum(plan[: candidates.layer + 1]) for tokens, plan in zip(candidates.tokens, plans, strict=True)
        ]
        most = (left - torch.tensor(leaves, device=left.device)).clamp(min=0)
        due = torch.where(candidates.focus.any(1), due.minimum(most), due)
        similarity = candidates.similarity - AHEAD * candidates.focused
        into = most_similar(due, similarity, candidates.partner, picture)
        return into if still is None else SomeMerge(into, still)

    def after_encoder(self, tokens: Tokens) -> Reduced | None:
        return self.rule.after_encoder(tokens)

    def in_prompt(self, tokens: Tokens) -> Reduced | None:
        return self.rule.in_prompt(tokens)
