"""Each token's best partner: bipartite soft matching on attention keys (paper section 3.1, ToMe section 3)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dymu.merging.layout import Layout
from dymu.token_map import at_least_float32


def similarity_metric(keys: Tensor) -> Tensor:
    """What decides whether two tokens are alike: the L2-normalised mean over heads of the attention keys.

    Args:
        keys: [..., H, D] keys of the layer's attention, before any rotation; at least float32 is used from here on.

    Returns:
        [..., D], unit vectors.
    """
    return normalize(at_least_float32(keys).sum(-2), dim=-1)  # a sum, once normalised, is a mean


def best_partner(metric: Tensor, layout: Layout, prefix: int = 0) -> tuple[Tensor, Tensor]:
    """For every token at an even index (A), the most similar one at an odd index (B).

    Args:
        metric: unit vectors of all tokens, in `layout`, with D channels.
        layout: of the tokens.
        prefix: leading tokens (class, registers) of each image that never merge; counting starts behind them.

    Returns:
        similarity: [B, A] of A = ceil((T - prefix) / 2), cosine to the best partner; -inf where an image has no such
            token or no B at all.
        partner: int64 [B, A], its index within B.
    """
    metric = layout.pad(metric)
    a, b = metric[:, prefix::2], metric[:, prefix + 1 :: 2]
    if b.shape[1] == 0:
        return a.new_full(a.shape[:2], -torch.inf), a.new_zeros(a.shape[:2], dtype=torch.long)
    with torch.autocast(metric.device.type, enabled=False):
        scores = torch.bmm(a, b.mT)
    if not layout.packed:
        similarity, partner = scores.max(-1)
        return similarity, partner
    absent = ~layout.present
    similarity, partner = scores.masked_fill_(absent[:, None, prefix + 1 :: 2], -torch.inf).max(-1)
    return similarity.masked_fill(absent[:, prefix::2], -torch.inf), partner


def above(threshold: float, similarity: Tensor, partner: Tensor) -> Tensor:
    """Merge what is more similar than `threshold`.

    Args:
        similarity, partner: of the A tokens, see `best_partner`.

    Returns:
        int64 [B, A], the partner that each A token merges into; -1: it stays.
    """
    return torch.where(similarity > threshold, partner, -1)
