"""What one prompt costs a model: milliseconds, counted FLOPs, bytes of KV cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dymu.timing import measure
from dymu.unmerging import cache_bytes

Shape = tuple[int, ...]


def cost(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, float]:
    """Times of one prompt (see `dymu.timing.Times`), the FLOPs of its first forward and the bytes of its cache.

    FLOPs are those of matrix products, convolutions and attention as they were really run, 2 per multiplication and
    addition; attention counts every pair of query and key, causal or not.
    """
    times = measure(model, inputs)
    flops, stored = _count(model, inputs)
    return {**{name: round(ms, 3) for name, ms in asdict(times).items()}, "flops": flops, "cache_bytes": stored}


@torch.no_grad()
def _count(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[int, int]:
    with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        output = model(**inputs, use_cache=True, logits_to_keep=1)
    return counter.get_total_flops(), cache_bytes(output.past_key_values)


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    batch, heads, queries, size = query
    return 2 * batch * heads * queries * key[-2] * (size + value[-1])


# torch counts every attention kernel but the CPU's.
_CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}
