"""What one prompt costs a model: milliseconds, counted FLOPs, bytes of KV cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dymu.hooks.versions import cache_of
from dymu.timing import measure
from dymu.unmerging import cache_bytes

Shape = tuple[int, ...]


def cost(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, float]:
    """Times of one prompt (see `dymu.timing.Times`), the FLOPs of its first forward and the bytes of its cache.

    FLOPs are those of matrix products, convolutions and attention as they were really run, 2 per multiplication and
    addition; attention counts the pairs of query and key that causality lets see.
    """
    times = measure(model, inputs)
    flops, stored = _count(model, inputs)
    return {**{name: round(ms, 3) for name, ms in asdict(times).items()}, "flops": flops, "cache_bytes": stored}


@torch.no_grad()
def _count(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[int, int]:
    with FlopCounterMode(display=False, custom_mapping=ATTENTION_FLOPS) as counter:
        output = model(**inputs, use_cache=True, logits_to_keep=1)
    return counter.get_total_flops(), cache_bytes(cache_of(output))


def _attention(causal_at: int) -> Callable[..., int]:
    """FLOPs of an attention operation, whose argument number `causal_at` after query, key and value is `is_causal`."""

    def count(query: Shape, key: Shape, value: Shape, *options: Any, **_: Any) -> int:
        batch, heads, queries, size = query
        keys = key[-2]
        causal = len(options) > causal_at and options[causal_at] is True
        pairs = queries * (keys + 1) // 2 if causal else queries * keys
        return 2 * batch * heads * pairs * (size + value[-1])

    return count


ATTENTION_FLOPS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention(1),
    torch.ops.aten._scaled_dot_product_flash_attention: _attention(1),
    torch.ops.aten._scaled_dot_product_efficient_attention: _attention(3),
    torch.ops.aten._scaled_dot_product_cudnn_attention: _attention(3),
}
"""For `FlopCounterMode`, which by itself leaves out the CPU's attention and counts what causality hides."""
