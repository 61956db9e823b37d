"""Virtual token unmerging on torch's scaled_dot_product_attention."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dymu.unmerging.step import Step
from dymu.unmerging.virtual import virtual_keys, virtual_queries, virtual_values

FEW = 8
"""Up to so many virtual queries, weights are summed over each group instead of copying the group's value."""

MASK = 2**24
"""Elements of the largest mask that is formed at once."""


def attend(query: Tensor, key: Tensor, value: Tensor, step: Step, scaling: float, window: int | None = None) -> Tensor:
    """See `dymu.unmerging.backends.reference.attend`."""
    few = step.expand_keys and step.queries.tokens <= FEW
    if few:
        wide = torch.promote_types(query.dtype, torch.float32)
        query, key = query.to(wide), key.to(wide)
    merged = step.queries.group if step.expand_queries else None
    query = virtual_queries(query, merged, step.query_phase)
    if not step.rotated:
        key = virtual_keys(key, step.keys if step.expand_keys else None, step.phase)
    if few:
        attended = _attend_few(query, key, value, step, scaling, window)
    else:
        value = virtual_values(value, step.keys if step.expand_keys else None)
        attended = _attend_many(query, key, value, step, scaling, window)
    attended = attended.transpose(1, 2)
    return step.queries.average(attended) if step.expand_queries else attended


def _attend_many(query: Tensor, key: Tensor, value: Tensor, step: Step, scaling: float, window: int | None) -> Tensor:
    """Attention of virtual queries [B, H, Nq, D] to virtual keys and values [B, Hkv, Nk, D], as [B, H, Nq, D]."""
    tokens, seen = step.queries.tokens, step.keys.shape[1]
    grouped = query.shape[1] != key.shape[1]
    if step.causal(window):
        return scaled_dot_product_attention(query, key, value, is_causal=tokens > 1, scale=scaling, enable_gqa=grouped)
    rows = max(MASK // (len(query) * seen), 1)
    parts = []
    for start in range(0, tokens, rows):
        end = min(start + rows, tokens)
        make = partial(_mask, step, window, start, end, query.dtype)
        # What takes several pieces is too large to keep for the other layers.
        mask = step.once((window, "mask"), make) if rows >= tokens else make()
        parts.append(
            scaled_dot_product_attention(
                query[:, :, start:end], key, value, attn_mask=mask, scale=scaling, enable_gqa=grouped
            )
        )
    return torch.cat(parts, 2)


def _attend_few(query: Tensor, key: Tensor, value: Tensor, step: Step, scaling: float, window: int | None) -> Tensor:
    """The same with merged values [B, Hkv, entries, D]: all weights on copies of one value are summed first."""
    batch, heads, tokens, size = query.shape
    shared, seen, entries = key.shape[1], key.shape[2], value.shape[2]
    logits = query.reshape(batch, shared, -1, size) @ key.mT * scaling
    if tokens > 1 or not step.causal(window):
        mask = step.once((window, "added"), lambda: _added(step.mask(window)))
        logits = (logits.view(batch, heads, tokens, seen) + mask).view_as(logits)
    weights = logits.softmax(-1)
    slot = step.keys.clamp(min=0)[:, None, None].expand_as(weights)
    summed = weights.new_zeros(*weights.shape[:3], entries).scatter_add(3, slot, weights)
    return (summed.to(value.dtype) @ value).view(batch, heads, tokens, size)


def _mask(step: Step, window: int | None, start: int, end: int, dtype: torch.dtype) -> Tensor:
    mask = step.mask(window, start, end)
    return mask.to(dtype) if mask.is_floating_point() else mask


def _added(mask: Tensor) -> Tensor:
    if mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, -torch.inf)
