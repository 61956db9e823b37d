"""Merge chosen tokens into their partners: the size-weighted mean (paper section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from dymu.merging.layout import Layout
from dymu.merging.match import a_count, halves
from dymu.token_map import TokenMap, at_least_float32


def merge_step(into: Tensor, before: Layout, prefix: int = 0, still: Tensor | None = None) -> tuple[TokenMap, Layout]:
    """Where every token goes when the chosen A tokens join their partners.

    The new order is [prefix] [A that did not merge, in rising index] [B].

    Args:
        into: int64 [B, A], index within B of the partner that each A token merges into; -1: it stays. See `halves`.
        before: the layout of the tokens.
        prefix: leading tokens of each image that never merge.
        still: bool [B], rows of which none merges and all keep their order, as in a layer that does not merge.

    Returns:
        TokenMap from the T tokens to those that remain, and their layout. One host synchronisation.

    Raises:
        ValueError: a partner is none of its row's B tokens, or a row that is `still` has one.
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
    if still is not None:
        group = torch.where(still[:, None], torch.arange(tokens, device=device), group)
    if before.packed:
        group.masked_fill_(~before.present, -1)
    after = _joined(into if still is None else into.masked_fill(still[:, None] & (into >= 0), -2), before, prefix)
    return TokenMap(group, after.length, after.longest, before.packed), after


def _joined(into: Tensor, before: Layout, prefix: int) -> Layout:
    """The layout after `merge_step`, whose one synchronisation also brings what tells partners from nonsense."""
    length = before.length - (into >= 0).sum(1)
    if not into.shape[1]:
        return Layout.of(length)
    if before.packed:
        ours = torch.arange(into.shape[1], device=into.device) < a_count(before.length[:, None], prefix)
        into = torch.where(ours, into, torch.where(into == -1, -1, -2))
    lengths, least, most = torch.stack((length, into.amin(1), into.amax(1))).tolist()
    in_b = (max(0, tokens - prefix - a_count(tokens, prefix)) for tokens in before.lengths)
    if min(least, default=-1) < -1 or any(last >= count for last, count in zip(most, in_b, strict=True)):
        raise ValueError(
            "Reducer.in_layer named a partner that is none of its row's B tokens; name an index among these, or -1, "
            "and only -1 for A tokens that a row does not have and in rows that are said not to merge."
        )
    return Layout(length, tuple(lengths))


def merge_tokens(
    parts: Sequence[Tensor], size: Tensor | None, goal: Tensor, after: Layout
) -> tuple[list[Tensor], Tensor]:
    """Size-weighted mean of every group: x_j = sum(s x) / sum(s), s_j = sum(s).

    Args:
        parts: of the S tokens as they travel, [..., C] each.
        size: float32, how many original tokens each stands for, as they travel; None: one each.
        goal: int64 [S], which merged token each becomes part of.
        after: the layout of the merged tokens.

    Returns:
        Each of `parts` in its dtype, and the float32 sizes, in the layout `after`.
    """
    ones = torch.ones(len(goal), dtype=torch.float32, device=goal.device) if size is None else size.flatten()
    merged_size = ones.new_zeros(after.total).index_add(0, goal, ones)
    goal, order = goal.sort(stable=True)
    first = torch.searchsorted(goal, torch.arange(after.total, device=goal.device))
    weight = ones[order] / merged_size[goal]

    def mean(x: Tensor) -> Tensor:
        # A bag of one token has weight 1 and is copied. Bags add up in one order, where scattered adds on a GPU do not.
        wide = at_least_float32(x).flatten(0, 1)
        weights = weight if wide.dtype == weight.dtype else ones[order].to(wide.dtype) / merged_size[goal]
        merged = embedding_bag(order, wide, first, mode="sum", per_sample_weights=weights)
        return merged.to(x.dtype).view(*after.shape, -1)

    return [mean(x) for x in parts], merged_size.view(after.shape)
