"""Merge chosen tokens into their partners: the size-weighted mean (paper section 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from dymu.token_map import TokenMap


def merge_map(into: Tensor, length: Tensor, tokens: int, prefix: int = 0) -> TokenMap:
    """Where every token goes when the chosen A tokens join their partners.

    The new order is [prefix] [A that did not merge, in rising index] [B].

    Args:
        into: int64 [B, ceil((T - prefix) / 2)], index within B of the partner that each A token merges into; -1: it
            stays.
        length: int64 [B], tokens that each row really has, prefix included.
        tokens: T, tokens of the (padded) input.
        prefix: leading tokens that never merge.

    Returns:
        TokenMap from T to the tokens that remain. One host synchronisation, to learn the widest row.
    """
    batch, device = into.shape[0], into.device
    place = torch.arange(tokens, device=device)
    present = place[None] < length[:, None]
    stay = present[:, prefix::2] & (into < 0)
    staying = stay.sum(1)
    b_start = (prefix + staying)[:, None]

    group = place.expand(batch, tokens).clone()
    group[:, prefix::2] = torch.where(stay, prefix + stay.cumsum(1) - 1, b_start + into)
    group[:, prefix + 1 :: 2] = b_start + torch.arange((tokens - prefix) // 2, device=device)
    kept = prefix + staying + present[:, prefix + 1 :: 2].sum(1)
    extent = torch.stack([kept.max(), length.min()]).tolist()
    padded = extent[1] < tokens
    if padded:
        group = torch.where(present, group, -1)
    return TokenMap(group, kept, extent[0], padded)


def merge_tokens(x: Tensor, size: Tensor, step: TokenMap) -> tuple[Tensor, Tensor]:
    """Size-weighted mean of every group of `step`: x_j = sum(s x) / sum(s), s_j = sum(s).

    Args:
        x: [B, T, C] tokens.
        size: float32 [B, T], how many original tokens each stands for.
        step: map from T to the tokens that remain.

    Returns:
        [B, M, C] tokens in x's dtype (0 past a row's end) and their float32 [B, M] sizes (0 past a row's end).
    """
    merged_size = step.sum(size)
    wide = x if x.dtype == torch.float64 else x.float()
    total = step.sum(wide * size[..., None])
    return (total / merged_size.clamp(min=1)[..., None]).to(x.dtype), merged_size
