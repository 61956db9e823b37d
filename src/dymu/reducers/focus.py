"""Focus: where it matters, tokens merge last, or by a rule of their own."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from dymu.merging import focus_last
from dymu.reducers.reducer import Candidates, Pixels, Reduced, Reducer, Shown, SomeMerge, Stage, Tokens
from dymu.token_map import TokenMap


@dataclass(frozen=True)
class Focus(Reducer):
    """Another rule, but for tokens in focus, see `Shown.focus`.

    A merge is in focus if one of its two tokens is, and a merged token if one of its patches is. Behind the layers,
    too, what is in focus merges last.

    Args:
        rule: how many tokens merge, and outside the focus which.
        inside: which merge in focus. None: what is left to merge when all outside that could has, so that a picture
            keeps as many tokens as without focus.
    """

    rule: Reducer
    inside: Reducer | None = None

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
        focused = candidates.focused
        if self.inside is None:
            into = focus_last(into, candidates.similarity, candidates.partner, candidates.picture, focused)
        else:
            inner = self.inside.in_layer(candidates)
            assert not isinstance(inner, SomeMerge)
            into = torch.where(focused & (into >= 0), torch.full_like(into, -1) if inner is None else inner, into)
        return into if still is None else SomeMerge(into, still)

    def after_encoder(self, tokens: Tokens) -> Reduced | None:
        return self.rule.after_encoder(tokens)

    def in_prompt(self, tokens: Tokens) -> Reduced | None:
        return self.rule.in_prompt(tokens)
