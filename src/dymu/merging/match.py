"""Each token's best partner: bipartite soft matching on attention keys (paper section 3.1, ToMe section 3)."""

from __future__ import annotations

import torch
from torch import Tensor


def similarity_metric(keys: Tensor, prefix: int = 0) -> Tensor:
    """What decides whether two tokens are alike: the L2-normalised mean over heads of the attention keys.

    Args:
        keys: [B, T, H, D] keys of the layer's attention, before any rotation; at least float32 is used from here on.
        prefix: leading tokens (class, registers) that never merge and are left out.

    Returns:
        [B, T - prefix, D], unit vectors.
    """
    keys = keys[:, prefix:]
    metric = (keys if keys.dtype == torch.float64 else keys.float()).mean(2)
    return torch.nn.functional.normalize(metric, dim=-1)


def best_partner(metric: Tensor, length: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """For every token at an even place (A), the most similar one at an odd place (B).

    Args:
        metric: [B, T, D] unit vectors.
        length: int64 [B], tokens that each row really has; None: all T.

    Returns:
        similarity: [B, ceil(T / 2)], cosine to the best partner; -inf where row has no such A or no B at all.
        partner: int64 [B, ceil(T / 2)], its index within B.
    """
    a, b = metric[:, 0::2], metric[:, 1::2]
    if b.shape[1] == 0:
        return a.new_full(a.shape[:2], -torch.inf), a.new_zeros(a.shape[:2], dtype=torch.long)
    with torch.autocast(metric.device.type, enabled=False):
        scores = a @ b.transpose(1, 2)
    if length is not None:
        places = torch.arange(metric.shape[1], device=metric.device)
        absent = places[None] >= length[:, None]
        scores = scores.masked_fill(absent[:, None, 1::2], -torch.inf)
        scores = scores.masked_fill(absent[:, 0::2, None], -torch.inf)
    similarity, partner = scores.max(-1)
    return similarity, partner
