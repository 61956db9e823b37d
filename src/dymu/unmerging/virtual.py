"""From merged tokens to the virtual ones that stand at every position of the full prompt. The model has rotated queries
and keys (RoPE) to their representatives' positions; from there they turn to their own."""

from __future__ import annotations

import torch
from torch import Tensor


def as_phase(cos: Tensor, sin: Tensor) -> Tensor:
    """Cosines and sines [B, N, D], both halves alike, as complex numbers [B, N, D / 2] of float32 or wider parts."""
    half = cos.shape[-1] // 2
    wide = torch.promote_types(cos.dtype, torch.float32)
    return torch.complex(cos[..., :half].to(wide), sin[..., :half].to(wide))


def turn_between(start: Tensor, end: Tensor) -> Tensor:
    """What turns vectors that are rotated by the phases `start` to those of `end`, complex [..., D / 2]. Lengths other
    than 1, as rotations that also scale have, stay as they are."""
    return end * start.conj() / (start.real.square() + start.imag.square())


def as_pairs(x: Tensor, channels: Tensor | None = None) -> Tensor:
    """[..., D] vectors as complex numbers [..., D / 2] of float32 or wider parts.

    A pair is what RoPE rotates together: elements i and i + D / 2 of the order that `channels`, int64 [D], says.
    """
    half = x.shape[-1] // 2
    x = x if channels is None else x[..., channels]
    x = x if x.dtype.itemsize >= 4 else x.float()
    return torch.complex(x[..., :half], x[..., half:])


def interleaved(pairs: Tensor, dtype: torch.dtype) -> Tensor:
    """Complex [..., D / 2] as real [..., D], the parts of each number side by side. Dot products between two such
    vectors are those of the usual order."""
    real = torch.view_as_real(pairs).flatten(-2)
    return real if real.dtype == dtype else real.to(dtype)


def side_by_side(size: int, channels: Tensor | None = None) -> Tensor:
    """int64 [D], the channels of a head in the order that `interleaved` gives, see `as_pairs`."""
    order = torch.arange(size) if channels is None else channels
    return torch.stack(order.chunk(2), 1).flatten()


def usual_order(x: Tensor, channels: Tensor | None = None) -> Tensor:
    """Interleaved [..., D] in the order that heads have, see `as_pairs`."""
    halves = torch.cat((x[..., 0::2], x[..., 1::2]), -1)
    return halves if channels is None else halves[..., channels.argsort()]


def rows_behind(slot: Tensor, stored: int, heads: int = 1) -> Tensor:
    """Rows of the flattened [B * heads * stored, ...] entries that the tokens [B, N] of every head read: int64
    [B * heads * N]; any row for slot -1."""
    head = torch.arange(slot.shape[0] * heads, device=slot.device).view(-1, heads, 1) * stored
    return (head + slot.clamp(min=0)[:, None]).flatten()


def virtual_keys(key: Tensor, rows: Tensor, turn: Tensor | None, channels: Tensor | None = None) -> Tensor:
    """Expand and turn keys.

    Args:
        key: [B, Hkv, M, D].
        rows: those of every head, see `rows_behind`.
        turn: complex [B, N, D / 2], of the virtual tokens; None: none turns.
        channels: see `as_pairs`.

    Returns:
        [B, Hkv, N, D], interleaved (see `interleaved`).
    """
    pairs = virtual_values(as_pairs(key, channels), rows)
    return interleaved(pairs if turn is None else pairs.mul_(turn[:, None]), key.dtype)


def virtual_values(value: Tensor, rows: Tensor) -> Tensor:
    """Expand values [B, Hkv, M, D] to [B, Hkv, N, D]; `rows` are those of every head."""
    batch, heads, _, size = value.shape
    return value.reshape(-1, size).index_select(0, rows).view(batch, heads, -1, size)
