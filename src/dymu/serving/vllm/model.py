"""The models of the plug-in: vLLM's language model, of which each token has the position that it would have had."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import SupportsMRoPE, SupportsMultiModal, SupportsPP
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY

from dymu.choices import EACH_ONCE
from dymu.families.vllm import LANGUAGE_MODELS
from dymu.serving.vllm import room_for
from dymu.serving.vllm.attention import Sizes, Step, install, make_room
from dymu.serving.vllm.processor import Dummy, Info, Processor

OF_LANGUAGE_MODEL = {
    "model.language_model.": "model.",
    "language_model.": "",
    **{f"{name}.": f"{name}." for name in ("lm_head", "model.layers", "model.embed_tokens", "model.norm")},
}
"""By the beginning of a weight's name, that of its name in the language model."""


class Merged(nn.Module, SupportsMultiModal, SupportsPP, SupportsMRoPE):
    """A language model of vLLM's whose prompts hold merged tokens.

    vLLM carries for every token as many whole numbers as M-RoPE has axes, through batches, chunks, preemption and
    prefixes: here the first is its position, of which the text behind an image has the one that it would have had.
    """

    placeholder: ClassVar[str]
    several_axes: ClassVar[bool] = False
    """Whether the language model itself rotates by the three whole numbers."""

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str:
        if modality != "image":
            raise ValueError(f"this model takes images, and no {modality}.")
        return cls.placeholder

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config = config = vllm_config.model_config.hf_config
        text = config.get_text_config()
        text.tie_word_embeddings = config.tie_word_embeddings
        if text.architectures is None:
            known = {**MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **LANGUAGE_MODELS}
            text.architectures = [known.get(text.model_type, "")]
        stock: Any = self
        stock.configure_mm_token_handling(vocab_size=text.vocab_size, mm_token_ids=[config.image_token_id])
        with stock._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config, hf_config=text, prefix=maybe_prefix(prefix, "language_model")
            )
        self.unmerge, longest = config.dymu["unmerge"], config.dymu["longest"]
        if not self.several_axes:
            beyond = room_for(vllm_config.model_config, config.dymu)
            make_room(self.language_model.model, vllm_config.model_config.max_model_len + beyond)
        self.step: Step | Sizes | None = None
        if self.unmerge != "original":
            self.step = install(self.language_model.model, vllm_config, self.unmerge, longest)
        if self.unmerge in EACH_ONCE:
            logging.getLogger("dymu").warning("unmerge=%r approximates what the untouched model computes", self.unmerge)
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    def embed_multimodal(self, image_features: Any = None, **_: Any) -> Sequence[Tensor]:
        return [] if image_features is None else list(image_features)

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: Sequence[Any]) -> tuple[Tensor, int]:
        """int64 [3, T] for the tokens of a prompt, and what to add to the index of those that follow."""
        rows = torch.zeros(3, len(input_tokens), dtype=torch.int64)
        done = at = 0
        for feature in sorted(mm_features, key=lambda feature: feature.mm_position.offset):
            begin = feature.mm_position.offset
            position, advance, group = (feature.data[f"image_{name}"].data for name in ("position", "advance", "group"))
            end = begin + len(position)
            rows[:, done:begin] = torch.arange(at, at + begin - done)
            at += begin - done
            rows[:, begin:end] = position.T + at
            if self.unmerge == "compact":
                rows[1, begin:end] = -torch.bincount(group, minlength=len(position))
            elif isinstance(self.step, Step):
                rows[1, begin:end] = -self.step.groups.number(feature.data, group, len(position))
                rows[2, begin:end] = at
            at += int(advance)
            done = end
        rows[:, done:] = torch.arange(at, at + len(input_tokens) - done)
        return rows, at - done

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **_: Any,
    ) -> Any:
        if intermediate_tensors is not None:
            inputs_embeds = None
        if isinstance(self.step, Step):
            self.step.rows = positions
        elif self.step is not None:
            self.step.set(positions[1])
        if not self.several_axes:
            positions = positions[0]
        return self.language_model.model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        logits: Tensor | None = self.language_model.compute_logits(hidden_states)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Those of the language model; the vision half is loaded where images are encoded."""

        def own() -> Iterable[tuple[str, Tensor]]:
            for name, weight in weights:
                for beginning, within in OF_LANGUAGE_MODEL.items():
                    if name.startswith(beginning):
                        yield within + name.removeprefix(beginning), weight
                        break

        return {f"language_model.{name}" for name in self.language_model.load_weights(own())}


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=Dummy)
class DymuLlavaForConditionalGeneration(Merged):
    placeholder = "<image>"


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=Dummy)
class DymuInternVLForConditionalGeneration(Merged):
    placeholder = "<IMG_CONTEXT>"


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=Dummy)
class DymuQwen2_5_VLForConditionalGeneration(Merged):
    placeholder = "<|vision_start|><|image_pad|><|vision_end|>"
    several_axes = True
