"""Attention of virtual tokens over pages of merged ones, on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from dymu.serving.vllm.attention import Step
from dymu.unmerging.backends import sdpa


@register_backend(AttentionBackendEnum.CUSTOM)
class UnmergedBackend(CPUAttentionBackend):
    """vLLM's own for CPUs, but for what it computes."""

    forward_includes_kv_cache_update = True
    """Else vLLM also has the stock backend write the pages, in a layout of its own."""

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        return UnmergedImpl


class UnmergedImpl(CPUAttentionBackendImpl):
    def __init__(self, *args: Any, step: Step, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._step = step

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """query [T, H, D], key and value [T, heads of keys, D] -> output; pages [blocks, heads of keys, slots, 2 D]."""
        if attn_metadata is None:
            return output
        tokens, block = attn_metadata.num_actual_tokens, kv_cache.shape[2]
        slots = attn_metadata.slot_mapping[:tokens].long()
        kv_cache[slots // block, :, slots % block] = torch.cat((key[:tokens], value[:tokens]), -1)
        for new, own, step in self._step.plan(attn_metadata, kv_cache, "sdpa"):
            entries = kv_cache[own // block, :, own % block].transpose(0, 1)[None]
            keys, values = entries.chunk(2, -1)
            asked = query[new].transpose(0, 1)[None]
            (output[new],) = sdpa.attend(asked, keys, values, step, self.scale)
        return output
