"""Focus: where it matters, tokens merge last, or by a rule of their own."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dymu.merging.match import AHEAD, most_similar
from dymu.reducers.by_image import ByImage
from dymu.reducers.keep import in_tokens
from dymu.reducers.reducer import Candidates, Pixels, Reduced, Reducer, Shown, SomeMerge, Stage, Tokens
from dymu.reducers.tome import FixedMerge
from dymu.token_map import TokenMap


@dataclass(frozen=True)
class Around(Reducer):
    """Another rule, which is asked first."""

    rule: Reducer
    focuses: ClassVar[bool] = True

    def reads(self, layers: int) -> Collection[int | None]:
        return self.rule.reads(layers)

    def check_fits(self, layers: int, tokens: int | None = None) -> None:
        self.rule.check_fits(layers, tokens)

    def check_shown(self, shown: Shown, images: Collection[int] | None = None) -> None:
        self.rule.check_shown(shown, images)

    def reduces(self, stage: Stage, shown: Shown) -> bool:
        return self.rule.reduces(stage, shown)

    def before_encoder(self, pixels: Pixels) -> tuple[Tensor, TokenMap] | None:
        return self.rule.before_encoder(pixels)

    def after_encoder(self, tokens: Tokens) -> Reduced | None:
        return self.rule.after_encoder(tokens)

    def in_prompt(self, tokens: Tokens) -> Reduced | None:
        return self.rule.in_prompt(tokens)

    def shares(self, shown: Shown) -> list[FixedMerge | None]:
        """Of each picture what merges it to its share, see `ThresholdMerge.share`."""
        return [getattr(rule, "share", None) for rule in self._rules(shown)]

    def to_share(self, tokens: Tokens, reduced: Reduced | None, less_only: bool) -> Reduced | None:
        """What the rule left in the prompt, but of images with something in focus their share, or the cap if that is
        lower. Where tokens of frames join over time, what these leave.

        Args:
            less_only: whether this is for images of which less was left only.
        """
        shown, rules = tokens.shown, self._rules(tokens.shown)
        if tokens.focus is None or any(getattr(rule, "over_time", None) is not None and shown.video for rule in rules):
            return reduced
        goal, in_focus = [0] * len(shown.image_tokens), [False] * len(shown.image_tokens)
        for number, rule, grid in zip(shown.image, rules, shown.focus or (), strict=True):
            share, cap, count = getattr(rule, "share", None), getattr(rule, "at_most", None), shown.image_tokens[number]
            if share is not None:
                goal[number] = min(share.kept_of(count), count if cap is None else max(int(in_tokens(cap, count)), 1))
                in_focus[number] |= bool(grid.any())
        by_picture, _, pictures = (tokens if reduced is None else tokens.then(reduced)).by_picture()
        image = torch.tensor(shown.image, device=pictures.device)
        left = by_picture.left(image[pictures], len(goal))
        due = torch.tensor(goal, device=image.device)
        other = torch.tensor(in_focus, device=image.device) & (left < due if less_only else left != due)
        if not bool(other.any()):
            return reduced
        return tokens.chosen([reduced, tokens.merge_to([max(count, 1) for count in goal])], other[image].long())

    def _rules(self, shown: Shown) -> list[Reducer]:
        """Of each picture."""
        if isinstance(self.rule, ByImage):
            return [self.rule.rules[item] for item in shown.item]
        return [self.rule] * len(shown.grids)

    def beyond_share(self, candidates: Candidates) -> Tensor:
        """int64 [pictures], by how many tokens each is above its share of the plan; -1 where it has none."""
        shares, left = self.shares(candidates.shown), candidates.state.layout.lengths
        plans = {repr(share): share.planned(candidates) for share in shares if share is not None}
        beyond = []
        for number, (share, tokens) in enumerate(zip(shares, candidates.tokens, strict=True)):
            planned = 0 if share is None else sum(plans[repr(share)][number][: candidates.layer + 1])
            above = left[number] - candidates.prefix - (tokens - planned)
            beyond.append(-1 if share is None else max(above, 0))
        return torch.tensor(beyond, device=candidates.keys.device)


@dataclass(frozen=True)
class Focus(Around):
    """Another rule, but for tokens in focus, see `Shown.focus`.

    A merge is in focus if one of its two tokens is, and a merged token if one of its patches is. Behind the layers,
    too, what is in focus merges last.

    Args:
        rule: how many tokens merge, and outside the focus which.
        inside: which merge in focus. None: what is left to merge when all outside that could has; and pictures with
            something in focus merge to their share of tokens, where the rule says it.
    """

    inside: Reducer | None = None

    def in_layer(self, candidates: Candidates) -> Tensor | SomeMerge | None:
        answer = self.rule.in_layer(candidates)
        if answer is None or candidates.focus is None:
            return answer
        into, still = answer if isinstance(answer, SomeMerge) else (answer, None)
        if self.inside is None:
            due, beyond = merges_of(into, candidates), self.beyond_share(candidates)
            due = torch.where(candidates.focus.any(1) & (beyond >= 0), beyond, due)
            into = out_of_focus_first(due, candidates)
        else:
            inner = self.inside.in_layer(candidates)
            assert not isinstance(inner, SomeMerge)
            into = torch.where(
                candidates.focused & (into >= 0), torch.full_like(into, -1) if inner is None else inner, into
            )
        return into if still is None else SomeMerge(into, still)

    def reduces(self, stage: Stage, shown: Shown) -> bool:
        to_share = self.inside is None and shown.focus is not None and any(self.shares(shown))
        return super().reduces(stage, shown) or (stage == "in_prompt" and not shown.single and to_share)

    def in_prompt(self, tokens: Tokens) -> Reduced | None:
        reduced = self.rule.in_prompt(tokens) if self.rule.reduces("in_prompt", tokens.shown) else None
        return reduced if self.inside is not None else self.to_share(tokens, reduced, less_only=False)


def merges_of(into: Tensor, candidates: Candidates) -> Tensor:
    """int64 [pictures], how many tokens of each merge."""
    pictures = candidates.state.layout.batch
    return torch.zeros(pictures, dtype=torch.long, device=into.device).index_add(
        0, candidates.picture, (into >= 0).sum(1)
    )


def out_of_focus_first(due: Tensor, candidates: Candidates) -> Tensor:
    """So many merges of each picture, of tokens out of focus first, and of these the most similar."""
    similarity = candidates.similarity - AHEAD * candidates.focused
    return most_similar(due, similarity, candidates.partner, candidates.picture)
