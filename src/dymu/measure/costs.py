"""Costs of one prompt: milliseconds, counted FLOPs, bytes of KV cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dymu.families.resolve import resolve
from dymu.hooks.cache import cache_bytes
from dymu.hooks.versions import cache_of
from dymu.measure.times import Cost
from dymu.measure.timing import measure

Shape = tuple[int, ...]


def cost(model: nn.Module, inputs: Mapping[str, Any]) -> Cost:
    """Measure one prompt, once for its times and once to count."""
    times = measure(model, inputs)
    encoder, prefill, stored = count(model, inputs)
    return Cost(
        encoder_ms=round(times.encoder_ms, 3),
        prefill_ms=round(times.prefill_ms, 3),
        decode_ms_per_token=round(times.decode_ms_per_token, 3),
        flops=encoder + prefill,
        cache_bytes=stored,
    )


@torch.no_grad()
def count(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[int, int, int]:
    """FLOPs of the first forward up to the language model and from there on, and bytes of the KV cache after it.

    FLOPs are those of matrix products, convolutions and attention as they were really run, 2 per multiplication and
    addition; attention counts the pairs of query and key that causality lets see.
    """
    counter = FlopCounterMode(display=False, custom_mapping=ATTENTION_FLOPS)
    encoder: list[int] = []
    hook = resolve(model).language_model.register_forward_pre_hook(
        lambda *_: encoder.append(counter.get_total_flops()), prepend=True
    )
    try:
        with counter:
            output = model(**inputs, use_cache=True, logits_to_keep=1)
    finally:
        hook.remove()
    return encoder[0], counter.get_total_flops() - encoder[0], cache_bytes(cache_of(output))


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
"""For `FlopCounterMode`, which by itself leaves out the CPU's attention and counts pairs that causality hides."""
