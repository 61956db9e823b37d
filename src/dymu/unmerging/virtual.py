"""From merged tokens to the virtual ones that stand at every position of the full prompt, in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from dymu.unmerging.rotary import as_pairs, interleaved


def expand(entries: Tensor, slot: Tensor) -> Tensor:
    """Copy merged entries [B, M, ...] to the tokens [B, N] that read them: [B, N, ...]; any entry for slot -1."""
    batch, stored = entries.shape[:2]
    row = torch.arange(batch, device=slot.device)[:, None] * stored + slot.clamp(min=0)
    taken = entries.reshape(batch * stored, *entries.shape[2:]).index_select(0, row.flatten())
    return taken.view(batch, slot.shape[1], *entries.shape[2:])


def virtual_queries(query: Tensor, slot: Tensor | None, phase: Tensor) -> Tensor:
    """Expand and rotate queries.

    Args:
        query: [B, H, M, D], un-rotated; best a transposed [B, M, H, D].
        slot: int64 [B, N], the merged token behind each virtual one; None: they are the same.
        phase: complex [B, N, D / 2], the angles of the virtual ones.

    Returns:
        [B, H, N, D], interleaved (see `rotary.interleaved`).
    """
    pairs = as_pairs(query.transpose(1, 2))
    if slot is not None:
        pairs = expand(pairs, slot)
    return interleaved(pairs * phase[:, :, None], query.dtype).transpose(1, 2)


def virtual_keys(key: Tensor, slot: Tensor | None, phase: Tensor) -> Tensor:
    """The same for keys, best contiguous [B, Hkv, M, D]."""
    pairs = as_pairs(key)
    if slot is not None:
        pairs = _expand_heads(pairs, slot)
    return interleaved(pairs * phase[:, None], key.dtype)


def virtual_values(value: Tensor, slot: Tensor | None) -> Tensor:
    """Expand values [B, Hkv, M, D] to [B, Hkv, N, D]."""
    return value if slot is None else _expand_heads(value, slot)


def _expand_heads(entries: Tensor, slot: Tensor) -> Tensor:
    batch, heads = entries.shape[:2]
    slot = slot[:, None].expand(batch, heads, -1).flatten(0, 1)
    return expand(entries.flatten(0, 1), slot).unflatten(0, (batch, heads))
