"""Each token's best partner: bipartite soft matching on attention keys (paper section 3.1, ToMe section 3)."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dymu.merging.layout import Layout
from dymu.token_map import at_least_float32

N = TypeVar("N", int, Tensor)


def similarity_metric(keys: Tensor) -> Tensor:
    """What decides whether two tokens are alike: the L2-normalised mean over heads of the attention keys.

    Args:
        keys: [..., H, D] keys of the layer's attention, before any rotation; at least float32 is used from here on.

    Returns:
        [..., D], unit vectors.
    """
    return normalize(at_least_float32(keys).sum(-2), dim=-1)  # a sum, once normalised, is a mean


def halves(prefix: int) -> tuple[slice, slice]:
    """Which tokens are A, those at an even index, and which B, at an odd one.

    The index is counted from the first token of the sequence, as in ToMe and in the authors' code: behind one class
    token the first patch is in B.

    Args:
        prefix: leading tokens (class, registers) that never merge: they count, and are in neither half.
    """
    return slice(prefix + prefix % 2, None, 2), slice(prefix + 1 - prefix % 2, None, 2)


def a_count(tokens: N, prefix: int) -> N:
    """A, how many of `tokens` tokens are in the first half, see `halves`."""
    return (tokens + 1) // 2 - (prefix + 1) // 2


def best_partner(metric: Tensor, layout: Layout, prefix: int = 0, apart: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """For every token of A the most similar one of B, see `halves`.

    Args:
        metric: unit vectors of all tokens, in `layout`, with D channels.
        layout: of the tokens.
        prefix: leading tokens of each image that never merge.
        apart: [B, T], what the similarity of two tokens is lowered by: the larger one of theirs.

    Returns:
        similarity: [B, A], cosine to the best partner, lowered; -inf where an image has no such token or no B at all.
        partner: int64 [B, A], its index within B.
    """
    metric, (in_a, in_b) = layout.pad(metric), halves(prefix)
    a, b = metric[:, in_a], metric[:, in_b]
    if b.shape[1] == 0:
        return a.new_full(a.shape[:2], -torch.inf), a.new_zeros(a.shape[:2], dtype=torch.long)
    with torch.autocast(metric.device.type, enabled=False):
        scores = torch.bmm(a, b.mT)
    if apart is not None:
        scores -= torch.maximum(apart[:, in_a, None], apart[:, None, in_b]).to(scores.dtype)
    if not layout.packed:
        similarity, partner = scores.max(-1)
        return similarity, partner
    absent = ~layout.present
    similarity, partner = scores.masked_fill_(absent[:, None, in_b], -torch.inf).max(-1)
    return similarity.masked_fill(absent[:, in_a], -torch.inf), partner


def above(threshold: float, similarity: Tensor, partner: Tensor) -> Tensor:
    """Merge what is more similar than `threshold`.

    Args:
        similarity, partner: of the A tokens, see `best_partner`.

    Returns:
        int64 [B, A], the partner that each A token merges into; -1: it stays.
    """
    return torch.where(similarity > threshold, partner, -1)


AHEAD = 4.0
"""More than any two cosines differ."""


def in_focus(focus: Tensor, partner: Tensor, prefix: int = 0) -> Tensor:
    """bool [B, A]: of each A token whether it, or its partner, is in focus.

    Args:
        focus: bool [B, T], the tokens that are.
        partner: int64 [B, A], see `best_partner`.
    """
    in_a, in_b = halves(prefix)
    if focus[:, in_b].shape[1] == 0:
        return focus[:, in_a]
    return focus[:, in_a] | focus[:, in_b].gather(1, partner)


def focus_last(into: Tensor, similarity: Tensor, partner: Tensor, item: Tensor, focused: Tensor) -> Tensor:
    """As many merges of each item as `into` has, of A tokens out of focus first, and of these the most similar.

    Args:
        into: int64 [rows, A], see `above`.
        similarity, partner: of the A tokens, see `best_partner`.
        item: int64 [rows], the item that each row belongs to.
        focused: bool [rows, A], see `in_focus`.
    """
    due = item.new_zeros(int(item.max()) + 1).index_add(0, item, (into >= 0).sum(1))
    return most_similar(due, similarity - AHEAD * focused, partner, item)


def most_similar(due: Tensor, similarity: Tensor, partner: Tensor, item: Tensor) -> Tensor:
    """Merge the most similar A tokens of each item; of equals, the first. Those that cannot be compared stay.

    Args:
        due: int64 [items], how many of each.
        similarity, partner: [rows, A], see `best_partner`.
        item: int64 [rows], the item that each row belongs to.

    Returns:
        int64 [rows, A], as `above` does.
    """
    similarity = similarity.masked_fill(~similarity.isfinite(), -torch.inf)
    order = similarity.flatten().argsort(descending=True, stable=True)
    of_edge, by_item = item[order // max(similarity.shape[1], 1)].sort(stable=True)
    rank = torch.arange(len(order), device=order.device) - torch.searchsorted(of_edge, of_edge)
    best = torch.zeros_like(order, dtype=torch.bool).scatter(0, order[by_item], rank < due[of_edge])
    return torch.where(best.view_as(similarity) & (similarity > -torch.inf), partner, -1)
