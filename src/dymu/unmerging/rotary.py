"""Rotary positions (RoPE, the half-split form): computed by the model, applied where tokens are expanded."""

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


def no_rotation(x: Tensor, position_ids: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
    """In place of a rotary embedding's forward: the angles that leave queries and keys as they are."""
    one = x.new_ones(1, 1, 1)
    return one, torch.zeros_like(one)
