"""From items to the prompt: which tokens of the full prompt share a merged token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from dymu.token_map import TokenMap, leaders_of


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


def in_mean_order(prompts: TokenMap) -> TokenMap:
    """The same groups numbered by the mean position of their tokens, which is the order that causal attention between
    merged tokens goes by."""
    position = torch.arange(prompts.tokens, device=prompts.group.device, dtype=torch.float64).expand_as(prompts.group)
    past_end = torch.arange(prompts.width, device=prompts.group.device) >= prompts.kept[:, None]
    mean = prompts.average(position).masked_fill(past_end, torch.inf)
    rank = mean.argsort(dim=1, stable=True).argsort(dim=1)
    group = rank.gather(1, prompts.group.clamp(min=0))
    return replace(prompts, group=torch.where(prompts.group < 0, -1, group))
