"""From merged tokens to the virtual ones that stand at every position of the full prompt, and their rotation (RoPE, the
half-split form): the model computes the angles, which are applied where tokens are expanded."""

from __future__ import annotations

import torch
from torch import Tensor


def as_phase(cos: Tensor, sin: Tensor) -> Tensor:
    """Cosines and sines [B, N, D], both halves alike, as complex numbers [B, N, D / 2] of float32 or wider parts."""
    half = cos.shape[-1] // 2
    wide = torch.promote_types(cos.dtype, torch.float32)
    return torch.complex(cos[..., :half].to(wide), sin[..., :half].to(wide))


def as_pairs(x: Tensor) -> Tensor:
    """[..., D] vectors as complex numbers [..., D / 2] of float32 or wider parts.

    A pair is what RoPE rotates together: elements i and i + D / 2.
    """
    half = x.shape[-1] // 2
    x = x if x.dtype.itemsize >= 4 else x.float()
    return torch.complex(x[..., :half], x[..., half:])


def interleaved(pairs: Tensor, dtype: torch.dtype) -> Tensor:
    """Complex [..., D / 2] as real [..., D], the parts of each number side by side. Dot products between two such
    vectors are those of the usual order."""
    real = torch.view_as_real(pairs).flatten(-2)
    return real if real.dtype == dtype else real.to(dtype)


def rows_behind(slot: Tensor, stored: int, heads: int = 1) -> Tensor:
    """Rows of the flattened [B * heads * stored, ...] entries that the tokens [B, N] of every head read: int64
    [B * heads * N]; any row for slot -1."""
    head = torch.arange(slot.shape[0] * heads, device=slot.device).view(-1, heads, 1) * stored
    return (head + slot.clamp(min=0)[:, None]).flatten()


def virtual_queries(query: Tensor, rows: Tensor | None, phase: Tensor) -> Tensor:
    """Expand and rotate queries.

    Args:
        query: [B, H, M, D], un-rotated; best a transposed [B, M, H, D].
        rows: of the flattened [B * M, ...] queries, see `rows_behind`; None: there is one virtual token for each.
        phase: complex [B, N, D / 2], the angles of the virtual tokens.

    Returns:
        [B, H, N, D], interleaved (see `interleaved`).
    """
    pairs = as_pairs(query.transpose(1, 2))
    if rows is not None:
        pairs = pairs.flatten(0, 1).index_select(0, rows).unflatten(0, phase.shape[:2])
    return interleaved(pairs.mul_(phase[:, :, None]), query.dtype).transpose(1, 2)


def virtual_keys(key: Tensor, rows: Tensor | None, phase: Tensor) -> Tensor:
    """Expand and rotate keys [B, Hkv, M, D] to [B, Hkv, N, D], interleaved; `rows` are those of every head."""
    pairs = as_pairs(key)
    if rows is not None:
        pairs = virtual_values(pairs, rows)
    return interleaved(pairs.mul_(phase[:, None]), key.dtype)


def virtual_values(value: Tensor, rows: Tensor) -> Tensor:
    """Expand values [B, Hkv, M, D] to [B, Hkv, N, D]; `rows` are those of every head."""
    batch, heads, _, size = value.shape
    return value.reshape(-1, size).index_select(0, rows).view(batch, heads, -1, size)
