"""Rotary positions (RoPE, the half-split form): computed by the model, applied where tokens are expanded."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [B, H, N, D] vectors by the angles [B, N, D] of their positions, in x's dtype as the stock models do."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x * cos[:, None] + turned * sin[:, None]


def no_rotation(_module: object, _args: object, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Forward hook of a rotary embedding: answer with the angles that leave queries and keys as they are."""
    cos, sin = angles
    return torch.ones_like(cos), torch.zeros_like(sin)
