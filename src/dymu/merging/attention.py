"""Attention whose keys weigh as much as the original tokens they stand for: log(size) is added to their logits."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

Way = Literal["mask", "channels"]
"""How log(size) reaches the kernel: as an additive mask, or within two more channels of the queries and keys."""

ABSENT = -30_000.0
"""What stands for log(0) in a channel: every type holds it, and no logit makes up for it."""


def way_for(x: Tensor) -> Way:
    """The way for queries like `x`.

    A CPU's flash kernel takes a mask. On a GPU a mask excludes the flash kernel, which takes half precision only, so
    there the sizes ride as channels: not yet measured. FlexAttention's score_mod would do too, but must be compiled.
    """
    return "channels" if x.device.type == "cuda" and x.dtype in (torch.float16, torch.bfloat16) else "mask"


def sized_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_size: Tensor | None,
    way: Way | None = None,
    scaling: float | None = None,
) -> Tensor:
    """softmax(q k scaling + log_size) v.

    Args:
        query: [B, H, T, D]; key, value: the same, or with fewer heads Hkv, each for several queries.
        log_size: float32 [B, T], added to the logits of each key; -inf: there is no such key. None: all 0.
        way: see `Way`; None: what `way_for` says.
        scaling: None: 1 / sqrt(D).

    Returns:
        [B, H, T, D].
    """
    shares = query.shape[1] != key.shape[1]
    if log_size is None:
        return scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=shares)
    if (way or way_for(query)) == "mask":
        bias = log_size[:, None, None].to(query.dtype)
        return scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scaling, enable_gqa=shares)
    channels = query.shape[-1]
    root = math.sqrt(channels) if scaling is None else 1 / scaling
    width = -(-(channels + 2) // 8) * 8  # the flash kernels want multiples of 8
    factor = 2.0 ** round(math.log2(root))  # exact in every type
    scaled = log_size.clamp(min=ABSENT)[:, None, :, None] * (root / factor)
    high = scaled.to(query.dtype)
    low = (scaled - high).to(query.dtype)
    query, key, value = (pad(part, (0, width - channels)) for part in (query, key, value))
    query[..., channels : channels + 2] = factor
    key[..., channels : channels + 2] = torch.cat((high, low), -1)
    return scaled_dot_product_attention(query, key, value, scale=1 / root, enable_gqa=shares)[..., :channels]
