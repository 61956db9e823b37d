"""Focus: where it matters, tokens merge last, or by a rule of their own."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from dymu.merging.match import AHEAD, most_similar
from dymu.reducers.by_image import ByImage
from dymu.reducers.dtome import ThresholdMerge
from dymu.reducers.keep import in_tokens
from dymu.reducers.reducer import Candidates, Pixels, Reduced, Reducer, Shown, SomeMerge, Stage, Tokens
from dymu.reducers.tome import FixedMerge
from dymu.token_map import TokenMap


@dataclass(frozen=True)
class Focus(Reducer):
    """Another rule, but for tokens in focus, see `Shown.focus`.

    A merge is in focus if one of its two tokens is, and a merged token if one of its patches is. Pictures with
    something in focus merge to their share of tokens, where the rule says it: in the layers what is out of focus, as
    many as the plan of the share, and behind them the rest, what is in focus last. So tokens in focus go through all
    layers by themselves. Where the rule says no share, as many merge in each layer as it says.

    Args:
        rule: how many tokens merge, and outside the focus which.
        inside: which merge in focus instead; then the rule alone says how many.
    """

    rule: Reducer
    inside: Reducer | None = None
    focuses: ClassVar[bool] = True

    def reads(self, layers: int) -> Collection[int | None]:
        return self.rule.reads(layers)

    def check_fits(self, layers: int, tokens: int | None = None) -> None:
        self.rule.check_fits(layers, tokens)

    def check_shown(self, shown: Shown, images: Collection[int] | None = None) -> None:
        self.rule.check_shown(shown, images)

    def reduces(self, stage: Stage, shown: Shown) -> bool:
        behind = stage in ("after_encoder", "in_prompt") and (stage == "after_encoder") == shown.single
        to_share = behind and self.inside is None and shown.focus is not None and any(self._shares(shown))
        return to_share or self.rule.reduces(stage, shown)

    def before_encoder(self, pixels: Pixels) -> tuple[Tensor, TokenMap] | None:
        return self.rule.before_encoder(pixels)

    def in_layer(self, candidates: Candidates) -> Tensor | SomeMerge | None:
        answer = self.rule.in_layer(candidates)
        if answer is None or candidates.focus is None:
            return answer
        into, still = answer if isinstance(answer, SomeMerge) else (answer, None)
        if self.inside is not None:
            inner = self.inside.in_layer(candidates)
            assert not isinstance(inner, SomeMerge)
            stays = torch.full_like(into, -1)
            into = torch.where(candidates.focused & (into >= 0), stays if inner is None else inner, into)
            return into if still is None else SomeMerge(into, still)
        beyond = self._beyond_share(candidates)
        to_share = candidates.focus.any(1) & (beyond >= 0)
        due = torch.where(to_share, beyond, _merges_of(into, candidates))
        last = torch.where(to_share, torch.inf, AHEAD)[candidates.picture, None]
        similarity = torch.where(candidates.focused, candidates.similarity - last, candidates.similarity)
        into = most_similar(due, similarity, candidates.partner, candidates.picture)
        return into if still is None else SomeMerge(into.masked_fill(still[:, None], -1), still)

    def after_encoder(self, tokens: Tokens) -> Reduced | None:
        reduced = self.rule.after_encoder(tokens) if self.rule.reduces("after_encoder", tokens.shown) else None
        return reduced if self.inside is not None else self._to_share(tokens, reduced)

    def in_prompt(self, tokens: Tokens) -> Reduced | None:
        if self.inside is not None:
            return self.rule.in_prompt(tokens)

        def within(tokens: Tokens) -> Reduced | None:
            rule = _each(self.rule, lambda one: replace(one, over_time=None))
            return self._to_share(tokens, rule.in_prompt(tokens) if rule.reduces("in_prompt", tokens.shown) else None)

        def over_time(tokens: Tokens) -> Reduced | None:
            rule = _each(self.rule, lambda one: ThresholdMerge((), over_time=one.over_time))
            return rule.in_prompt(tokens) if rule.reduces("in_prompt", tokens.shown) else None

        joins = tokens.shown.video and any(getattr(rule, "over_time", None) for rule in self._rules(tokens.shown))
        return tokens.reduced([within, over_time] if joins else [within])

    def _to_share(self, tokens: Tokens, reduced: Reduced | None) -> Reduced | None:
        """What the rule left, but of images with something in focus their share, or the cap if that is lower."""
        shown = tokens.shown
        if tokens.focus is None:
            return reduced
        goal, in_focus = [0] * len(shown.image_tokens), [False] * len(shown.image_tokens)
        for number, rule, grid in zip(shown.image, self._rules(shown), shown.focus or (), strict=True):
            share, cap, count = _share_of(rule), getattr(rule, "at_most", None), shown.image_tokens[number]
            if share is not None:
                goal[number] = min(share.kept_of(count), count if cap is None else max(int(in_tokens(cap, count)), 1))
                in_focus[number] |= bool(grid.any())
        by_picture, _, pictures = (tokens if reduced is None else tokens.then(reduced)).by_picture()
        image = torch.tensor(shown.image, device=pictures.device)
        due = torch.tensor(goal, device=image.device)
        other = torch.tensor(in_focus, device=image.device) & (by_picture.left(image[pictures], len(goal)) != due)
        if not bool(other.any()):
            return reduced
        return tokens.chosen([reduced, tokens.merge_to([max(count, 1) for count in goal])], other[image].long())

    def _rules(self, shown: Shown) -> list[Reducer]:
        """Of each picture."""
        if isinstance(self.rule, ByImage):
            return [self.rule.rules[item] for item in shown.item]
        return [self.rule] * len(shown.grids)

    def _shares(self, shown: Shown) -> list[FixedMerge | None]:
        """Of each picture what merges it to its share."""
        return [_share_of(rule) for rule in self._rules(shown)]

    def _beyond_share(self, candidates: Candidates) -> Tensor:
        """int64 [pictures], by how many tokens each is above its share of the plan; -1 where it has none."""
        shares, left = self._shares(candidates.shown), candidates.state.layout.lengths
        plans = {repr(share): share.planned(candidates) for share in shares if share is not None}
        beyond = []
        for number, (share, tokens) in enumerate(zip(shares, candidates.tokens, strict=True)):
            planned = 0 if share is None else sum(plans[repr(share)][number][: candidates.layer + 1])
            above = left[number] - candidates.prefix - (tokens - planned)
            beyond.append(-1 if share is None else max(above, 0))
        return torch.tensor(beyond, device=candidates.keys.device)


def _share_of(rule: Reducer) -> FixedMerge | None:
    """What merges a picture to the rule's part of all, see `ThresholdMerge.share`."""
    return rule if isinstance(rule, FixedMerge) else getattr(rule, "share", None)


def _each(rule: Reducer, change: Callable[[ThresholdMerge], ThresholdMerge]) -> Reducer:
    """The rule, or of several each, changed where it goes by thresholds."""
    if isinstance(rule, ByImage):
        return ByImage(tuple(_each(one, change) for one in rule.rules))
    return change(rule) if isinstance(rule, ThresholdMerge) else rule


def _merges_of(into: Tensor, candidates: Candidates) -> Tensor:
    """int64 [pictures], how many tokens of each merge."""
    pictures = candidates.state.layout.batch
    return torch.zeros(pictures, dtype=torch.long, device=into.device).index_add(
        0, candidates.picture, (into >= 0).sum(1)
    )
