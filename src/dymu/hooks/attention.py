"""The function that the language model's attention layers call."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import AttentionInterface

from dymu.errors import UnsupportedModel
from dymu.unmerging import BACKENDS, Step

NAME = "dymu"
"""Name of the attention implementation, which layers read from their config."""

UNKNOWN = ("softcap", "s_aux")
"""Arguments with which some decoders change what attention computes, and which the backends do not know."""


def unmerged_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    dymu_step: Step | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention over virtual tokens, in the signature of transformers' attention functions.

    Args:
        query: [B, H, Mq, D]; key, value: [B, Hkv, entries, D]; all merged and un-rotated.
        attention_mask: unused; `dymu_step` says who sees whom.
        dymu_step: the virtual tokens of this forward.

    Returns:
        [B, Mq, H, D], and None for the attention weights, which are never formed.
    """
    if dymu_step is None:
        raise RuntimeError(f"{type(module).__name__} was called outside its language model, where DyMU cannot help it")
    for name in UNKNOWN:
        if kwargs.get(name) is not None:
            raise UnsupportedModel(
                f"{type(module).__name__} asks for attention with {name}, which dymu does not know; remove DyMU from "
                "this model."
            )
    attended = BACKENDS[dymu_step.backend](query, key, value, dymu_step, scaling, sliding_window)
    return attended.contiguous(), None


AttentionInterface.register(NAME, unmerged_attention)
