"""Attention for packed training: the same numbers as sdpa in less time on a CPU.

All rows share a causal prefix, so its part needs no mask; and float32 beats bfloat16 here.
"""

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

NAME = "packed-prefix"


def register(prefix: int) -> str:
    """Make the attention known to transformers for prefixes of this length; return its name."""

    def attend(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor,
        scaling: float | None = None,
        **_: object,
    ) -> tuple[torch.Tensor, None]:
        groups = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(groups, dim=1).float() for t in (key, value))
        front, back = query.float().split([prefix, query.shape[2] - prefix], dim=2)
        with torch.autocast("cpu", enabled=False):
            parts = (
                F.scaled_dot_product_attention(
                    front, key[:, :, :prefix], value[:, :, :prefix], is_causal=True, scale=scaling
                ),
                F.scaled_dot_product_attention(
                    back, key, value, attn_mask=attention_mask[:, :, prefix:], scale=scaling
                ),
            )
        return torch.cat(parts, dim=2).transpose(1, 2).to(query.dtype), None

    AttentionInterface.register(NAME, attend)
    return NAME
