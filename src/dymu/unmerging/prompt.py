"""Image maps into the prompt: which tokens of the full prompt share one merged token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dymu.token_map import TokenMap

_CARRIED = "_dymu_leaders"


Features = Tensor | Sequence[Tensor]
"""Of the images or videos of a call: [N, C] each, or where all have as many tokens [items, N, C]."""


def carry_leaders(features: Features, leaders: Sequence[Tensor]) -> None:
    """Let each item's features carry its leaders, int64 [N], wherever generation takes them."""
    if isinstance(features, Tensor):
        setattr(features, _CARRIED, list(leaders))
        return
    for feature, own in zip(features, leaders, strict=True):
        setattr(feature, _CARRIED, own)


def carried_leaders(features: Features) -> list[Tensor] | None:
    """The leaders that the items' features carry; None for features that were not merged."""
    if isinstance(features, Tensor):
        return getattr(features, _CARRIED, None)
    if not all(hasattr(feature, _CARRIED) for feature in features):
        return None
    return [getattr(feature, _CARRIED) for feature in features]


def place_leaders(leaders: Tensor, places: Tensor, items: Sequence[Tensor]) -> Tensor:
    """Leaders of all prompt tokens: those at `places` follow the leaders of their item, the others stay as they are.

    Args:
        leaders: int64 [B, N], places within the row; of a prompt without items, each token its own.
        places: bool [B, N], the placeholders of the items in the prompts.
        items: for every item in the order of the placeholders, int64 [its tokens], its leaders; -1 for tokens gone.

    Returns:
        int64 [B, N]; -1 for tokens that are gone.
    """
    own = torch.arange(places.shape[1], device=places.device).expand_as(places)
    starts = torch.tensor([0] + [len(item) for item in items[:-1]]).cumsum(0).tolist()
    flat = torch.cat([torch.where(item < 0, -1, item + start) for item, start in zip(items, starts, strict=True)])
    flat = flat.to(own.device)
    return leaders.masked_scatter(places, torch.where(flat < 0, -1, own[places][flat]))


def leaders_within(leaders: Tensor, start: int, tokens: int) -> Tensor:
    """Leaders of `tokens` tokens from `start` on, taken by themselves: where a group's leader came before, its first
    token here leads.

    Args:
        leaders: int64 [B, N], see `place_leaders`.

    Returns:
        int64 [B, tokens], places counted from `start`.
    """
    here = leaders[:, start : start + tokens]
    led = here.clamp(min=0)
    place = torch.arange(here.shape[1], device=leaders.device).expand_as(here)
    place = torch.where(here < 0, leaders.shape[1], place)
    first = torch.full_like(leaders, leaders.shape[1]).scatter_reduce(1, led, place, "amin")
    return torch.where(here < 0, -1, first.gather(1, led))


def prompt_map(leaders: Tensor, present: Tensor | None = None) -> TokenMap:
    """Number the groups of each prompt by their first token; padding and image tokens that are gone belong to none.

    Args:
        leaders: int64 [B, N], see `place_leaders`.
        present: bool [B, N], the attention mask; None: every token is there but for those that are gone.
    """
    own = torch.arange(leaders.shape[1], device=leaders.device).expand_as(leaders)
    gone = leaders < 0
    if present is not None or bool(gone.any()):
        present = ~gone if present is None else present & ~gone
        leaders = leaders.clamp(min=0)
        leaders = torch.where(present.gather(1, leaders), leaders, own)
    leads = leaders == own if present is None else (leaders == own) & present
    group = (leads.cumsum(1) - 1).gather(1, leaders)
    if present is not None:
        group = torch.where(present, group, -1)
    kept = leads.sum(1)
    return TokenMap(group, kept, max(int(kept.max()), 1), padded=present is not None)


def in_mean_order(prompts: TokenMap) -> TokenMap:
    """The same groups numbered by the mean position of their tokens, so that causal attention between merged tokens
    goes by where each of them stands."""
    place = torch.arange(prompts.tokens, device=prompts.group.device, dtype=torch.float64).expand_as(prompts.group)
    past_end = torch.arange(prompts.width, device=prompts.group.device) >= prompts.kept[:, None]
    mean = prompts.average(place).masked_fill(past_end, torch.inf)
    rank = mean.argsort(dim=1, stable=True).argsort(dim=1)
    group = rank.gather(1, prompts.group.clamp(min=0))
    return replace(prompts, group=torch.where(prompts.group < 0, -1, group))
