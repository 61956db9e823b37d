"""From items to the prompt: which tokens of the full prompt share a merged token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from dymu.choices import EACH_ONCE, Unmerge
from dymu.token_map import TokenMap, leaders_of, take
from dymu.unmerging.virtual import turn_between


def place_leaders(leaders: Tensor, mask: Tensor, items: Sequence[Tensor]) -> Tensor:
    """Leaders of all prompt tokens: those of `mask` follow the leaders of their item, the others stay as they are.

    Args:
        leaders: int64 [B, N], indices within the row; of a prompt without items, each token its own.
        mask: bool [B, N], the placeholders of the items in the prompts.
        items: for every item in the order of the placeholders, int64 [its tokens], its leaders; -1 for dropped tokens.

    Returns:
        int64 [B, N]; -1 for dropped tokens.
    """
    index = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    starts = accumulate((len(item) for item in items[:-1]), initial=0)
    flat = torch.cat([torch.where(item < 0, -1, item + start) for item, start in zip(items, starts, strict=True)])
    flat = flat.to(mask.device)
    return leaders.masked_scatter(mask, torch.where(flat < 0, -1, index[mask][flat]))


def leaders_within(leaders: Tensor, start: int, tokens: int) -> Tensor:
    """int64 [B, tokens]: leaders of `tokens` tokens from `start` on, taken by themselves and counted from `start`.

    Where a group's leader came before, its first token here leads.

    Args:
        leaders: int64 [B, N], see `place_leaders`.
    """
    return leaders_of(leaders[:, start : start + tokens], leaders.shape[1])


@dataclass(frozen=True)
class NewTokens:
    """The tokens of the full prompt that one forward adds.

    Attributes:
        map: to their merged tokens, which are in the order of their representatives.
        representative: int64 [B, M], the token at whose position each merged one stands in the KV cache; 0 past a row's
            end.
        asked: int64 [B, Q], the tokens that are queries where a group has one or two; -1 past a row's end.
        merged: whether any stands for several.
        plain: whether `map` is the identity.
        several: whether groups are asked more than once.
    """

    map: TokenMap
    representative: Tensor
    asked: Tensor
    merged: bool
    plain: bool
    several: bool = False

    @classmethod
    def identity(cls, batch: int, tokens: int, device: torch.device) -> NewTokens:
        """Tokens of which none is merged and none is missing."""
        index = torch.arange(tokens, device=device).expand(batch, -1)
        return cls(TokenMap.identity(batch, tokens, device), index, index, merged=False, plain=True)

    @classmethod
    def of(cls, tokens: TokenMap, positions: Tensor, unmerge: Unmerge, representatives: int = 1) -> NewTokens:
        """Of the groups of `tokens`, which are numbered anew.

        Args:
            positions: [B, N] or [B, N, axes]: the representative of a group is the token nearest to the mean of its
                positions, of equally near ones the first.
            unmerge: forms that show every merged token once have the lower median of the group instead, and where
                positions are consecutive, its first token.
            representatives: tokens of a group that are asked: its representative, or those of its first and its second
                half.
        """
        if unmerge == "none":
            chosen = tokens.first()
        else:
            chosen = tokens.median() if unmerge in EACH_ONCE else nearest_to_mean(tokens, positions)
        chosen = _past_end(tokens, chosen)
        order = chosen.argsort(dim=1, stable=True)
        group = order.argsort(dim=1).gather(1, tokens.group.clamp(min=0))
        numbered = replace(tokens, group=torch.where(tokens.group < 0, -1, group))
        chosen = asked = chosen.gather(1, order)
        merged = bool((tokens.size() > 1).any())
        several = merged and representatives > 1
        if several:
            halves = _parts(tokens, representatives)
            asked = _past_end(halves, nearest_to_mean(halves, positions)).sort(1).values
        asked = torch.where(asked < tokens.tokens, asked, -1)
        return cls(numbered, chosen % tokens.tokens, asked, merged, plain=False, several=several)

    def turn(self, phase: Tensor) -> Tensor | None:
        """complex [B, N, P]: what turns a vector that is rotated to the position of each token's representative on to
        the token's own; None: none has to turn.

        Args:
            phase: complex [B, N, P], the rotary angles of the tokens.
        """
        if not self.merged:
            return None
        stands = take(take(phase, self.representative), self.map.group.clamp(min=0))
        return turn_between(stands, phase)

    @cached_property
    def represents(self) -> Tensor:
        """bool [B, N], whether each token is the representative of its group."""
        at = torch.arange(self.map.tokens, device=self.representative.device)
        there = self.map.group >= 0
        return there & (self.representative.gather(1, self.map.group.clamp(min=0)) == at)


def _past_end(tokens: TokenMap, chosen: Tensor) -> Tensor:
    """One original token of each group, int64 [B, M]; past a row's end, N."""
    past_end = torch.arange(tokens.width, device=chosen.device) >= tokens.kept[:, None]
    return chosen.masked_fill(past_end, tokens.tokens)


def _parts(tokens: TokenMap, parts: int) -> TokenMap:
    """The groups, each cut into so many of neighbouring tokens, or fewer."""
    group = tokens.group.clamp(min=0)
    part = tokens.rank() * parts // tokens.size().long().gather(1, group).clamp(min=1)
    label = torch.where(tokens.group < 0, -1, group * parts + part)
    return TokenMap.from_leaders(leaders_of(label, tokens.width * parts), tokens.group >= 0 if tokens.padded else None)


def nearest_to_mean(tokens: TokenMap, positions: Tensor) -> Tensor:
    """int64 [B, M]: of each group the token nearest to the mean of its positions [B, N] or [B, N, axes], the first of
    equally near ones. 0 past a row's end."""
    positions = positions.double().reshape(tokens.batch, tokens.tokens, -1)
    group = tokens.group.clamp(min=0)
    size = take(tokens.size().double(), group)[..., None]
    away = (size * positions - take(tokens.sum(positions), group)).square().sum(-1)  # whole numbers, so that ties are
    bag = torch.where(tokens.group < 0, tokens.width, tokens.group)
    least = away.new_full((tokens.batch, tokens.width + 1), torch.inf).scatter_reduce(1, bag, away, "amin")
    index = torch.arange(tokens.tokens, device=group.device).expand_as(group)
    nearest = (away <= least.gather(1, bag)) & (tokens.group >= 0)
    first = index.new_full((tokens.batch, tokens.width + 1), tokens.tokens)
    first = first.scatter_reduce(1, torch.where(nearest, tokens.group, tokens.width), index, "amin")[:, : tokens.width]
    return torch.where(first < tokens.tokens, first, 0)
