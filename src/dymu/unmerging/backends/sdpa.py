"""Virtual token unmerging on torch's scaled_dot_product_attention."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dymu.unmerging.rotary import rotate
from dymu.unmerging.step import Step


def _expand(entries: Tensor, slot: Tensor) -> Tensor:
    """Copy merged entries [B, H, M, D] to the virtual tokens [B, N] that read them; any entry for slot -1."""
    batch, heads, stored, size = entries.shape
    head = torch.arange(batch * heads, device=slot.device).view(batch, heads, 1) * stored
    row = head + slot.clamp(min=0)[:, None]
    return entries.reshape(-1, size).index_select(0, row.flatten()).view(batch, heads, -1, size)


def attend(query: Tensor, key: Tensor, value: Tensor, step: Step, scaling: float, window: int | None = None) -> Tensor:
    """See `dymu.unmerging.backends.reference.attend`."""
    tokens, seen = step.queries.tokens, step.keys.shape[1]
    if step.expand_keys:
        key, value = _expand(key, step.keys), _expand(value, step.keys)
    if step.expand_queries:
        query = _expand(query, step.queries.group)
    query = rotate(query, step.cos[:, seen - tokens :], step.sin[:, seen - tokens :])
    key = rotate(key, step.cos, step.sin)
    mask = step.mask(window)
    if mask is not None and mask.is_floating_point():
        mask = mask.to(query.dtype)
    attended = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None and tokens > 1,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    ).transpose(1, 2)
    return step.queries.average(attended) if step.expand_queries else attended
