"""Merge chosen tokens into their partners: the size-weighted mean (paper section 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from dymu.merging.layout import Layout
from dymu.merging.match import a_count, halves
from dymu.token_map import TokenMap, at_least_float32


def merge_step(into: Tensor, before: Layout, prefix: int = 0) -> tuple[TokenMap, Layout]:
    """Where every token goes when the chosen A tokens join their partners.

    The new order is [prefix] [A that did not merge, in rising index] [B].

    Args:
        into: int64 [B, A], index within B of the partner that each A token merges into; -1: it stays. See `halves`.
        before: the layout of the tokens.
        prefix: leading tokens of each image that never merge.

    Returns:
        TokenMap from the T tokens to those that remain, and their layout. One host synchronisation.
    """
    batch, tokens, device = before.batch, before.longest, into.device
    in_a, in_b = halves(prefix)
    stays = into < 0
    b_start = stays.sum(1, keepdim=True) + prefix
    if before.packed:  # an image's missing A tokens are its last ones, and stay
        b_start -= into.shape[1] - a_count(before.length[:, None], prefix)
    group = torch.empty(batch, tokens, dtype=torch.long, device=device)
    group[:, :prefix] = torch.arange(prefix, device=device)
    torch.where(stays, stays.cumsum(1) + (prefix - 1), into + b_start, out=group[:, in_a])
    torch.add(b_start, torch.arange(group[:, in_b].shape[1], device=device), out=group[:, in_b])
    if before.packed:
        group.masked_fill_(~before.present, -1)
    after = Layout.of(before.length - (into >= 0).sum(1))
    return TokenMap(group, after.length, after.longest, before.packed), after


def merge_tokens(
    x: Tensor, size: Tensor | None, merge_map: TokenMap, before: Layout, after: Layout
) -> tuple[Tensor, Tensor]:
    """Size-weighted mean of every group of `merge_map`: x_j = sum(s x) / sum(s), s_j = sum(s).

    Args:
        x: tokens, in the layout `before`, with C channels.
        size: float32, in the layout `before`, how many original tokens each stands for; None: one each.
        merge_map, after: see `merge_step`.

    Returns:
        Tokens in x's dtype and their float32 sizes, in the layout `after`.
    """
    goal = before.pack(after.index(merge_map.group)).flatten()
    ones = torch.ones(before.total, dtype=torch.float32, device=x.device) if size is None else size.flatten()
    merged_size = ones.new_zeros(after.total).index_add(0, goal, ones)
    goal, order = goal.sort(stable=True)
    first = torch.searchsorted(goal, torch.arange(after.total, device=x.device))
    wide = at_least_float32(x)
    weight = ones[order].to(wide.dtype) / merged_size[goal]
    # A bag of one token has weight 1 and is copied. Bags add up in one order, where scattered adds on a GPU do not.
    merged = embedding_bag(order, wide.flatten(0, 1), first, mode="sum", per_sample_weights=weight).to(x.dtype)
    return merged.unflatten(0, after.shape), merged_size.view(after.shape)
