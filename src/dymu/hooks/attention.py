"""The function that the language model's attention layers call."""

from __future__ import annotations

import sys
from typing import Any, Protocol

from torch import Tensor
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dymu.hooks.refusals import refuse_unknown
from dymu.unmerging import BACKENDS, Step

NAME = "dymu"
"""Name of the attention implementation, which layers read from their config."""


class Probe(Protocol):
    """Stands in for a step where it is tried how a layer rotates, see `dymu.hooks.probe`."""

    def attend(self, query: Tensor, key: Tensor) -> Tensor: ...


def unmerged_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    dymu_step: Step | Probe | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention over virtual tokens, in the signature of transformers' attention functions.

    Args:
        query: [B, H, Mq, D]; key, value: [B, Hkv, entries, D]; all merged and un-rotated.
        attention_mask: unused; `dymu_step` says who sees whom.
        dymu_step: the virtual tokens of this forward; None: DyMU is disabled, and the implementation that the model is
            set to attends.

    Returns:
        [B, Mq, H, D], and None for the attention weights, which are never formed.
    """
    if dymu_step is None:
        stock: Any = ALL_ATTENTION_FUNCTIONS.get_interface(
            module.config._attn_implementation_internal,  # what the config view of this layer covers
            getattr(sys.modules[type(module).__module__], "eager_attention_forward", None),
        )
        attended: tuple[Tensor, Tensor | None] = stock(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout,
            **({} if sliding_window is None else {"sliding_window": sliding_window}), **kwargs,
        )  # fmt: skip
        return attended
    refuse_unknown(module, kwargs)
    if not isinstance(dymu_step, Step):
        return dymu_step.attend(query, key), None
    unmerged = BACKENDS[dymu_step.backend](query, key, value, dymu_step, scaling, sliding_window)
    return unmerged.contiguous(), None


AttentionInterface.register(NAME, unmerged_attention)
