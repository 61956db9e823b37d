"""Attention of virtual tokens over pages of merged ones, on a GPU, by the Triton kernels of `dymu.unmerging`.

They read the pages where they are, which vLLM's own backend writes. The kernels are tested on such pages on a GPU and
by Triton's interpreter; vLLM itself was not run on a GPU yet.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)

from dymu.serving.vllm.attention import Step
from dymu.serving.vllm.paged import Pages
from dymu.unmerging.backends import triton


class UncapturedBuilder(TritonAttentionMetadataBuilder):
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER
    """Since the host plans each step."""


@register_backend(AttentionBackendEnum.CUSTOM)
class UnmergedBackend(TritonAttentionBackend):
    """vLLM's own in Triton, but for what it computes."""

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[TritonAttentionImpl]:
        return UnmergedImpl

    @staticmethod
    def get_builder_cls() -> type[TritonAttentionMetadataBuilder]:
        return UncapturedBuilder


class UnmergedImpl(TritonAttentionImpl):
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
        """query [T, H, D] -> output; pages [blocks, heads of keys, slots, 2 D], in which key and value are already."""
        if attn_metadata is None:
            return output.fill_(0)
        pages = Pages.of(kv_cache)
        for new, _, step in self._step.plan(attn_metadata, kv_cache, "triton"):
            asked = query[new].transpose(0, 1)[None]
            (output[new],) = triton.attend(asked, pages.keys, pages.values, step, self.scale)
        return output
