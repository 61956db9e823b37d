"""The models of the plug-in: vLLM's language model, of which each token has the position that it would have had."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import SupportsMRoPE, SupportsMultiModal, SupportsPP
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY

from dymu.serving.vllm.attention import Sizes, Step, install
from dymu.serving.vllm.processor import Dummy, Info, Processor

OF_LANGUAGE_MODEL = {"model.language_model.": "model.", "language_model.": "", "lm_head.": "lm_head."}
"""By the beginning of a weight's name, that of its name in the language model."""


class Merged(nn.Module, SupportsMultiModal, SupportsPP, SupportsMRoPE):
    """A language model of vLLM's whose prompts hold merged tokens.

    vLLM carries for every token as many whole numbers as M-RoPE has axes, through batches, chunks, preemption and
    prefixes: here the first is its position, of which the text behind an image has the one that it would have had.
    """

    placeholder: ClassVar[str]

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
            text.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text.model_type]]
        stock: Any = self
        stock.configure_mm_token_handling(vocab_size=text.vocab_size, mm_token_ids=[config.image_token_id])
        with stock._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config, hf_config=text, prefix=maybe_prefix(prefix, "language_model")
            )
        self.unmerge = config.dymu["unmerge"]
        self.step: Step | Sizes | None = None
        if self.unmerge != "original":
            self.step = install(self.language_model.model, vllm_config, self.unmerge, config.dymu["longest"])
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    def embed_multimodal(self, image_features: Any = None, **_: Any) -> Sequence[Tensor]:
        return [] if image_features is None else list(image_features)

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: Sequence[Any]) -> tuple[Tensor, int]:
        """int64 [3, T] for the tokens of a prompt, and what to add to the index of those that follow."""
        rows = torch.zeros(3, len(input_tokens), dtype=torch.int64)
        done = shift = 0
        for feature in sorted(mm_features, key=lambda feature: feature.mm_position.offset):
            begin = feature.mm_position.offset
            place, group = (feature.data[f"image_{name}"].data for name in ("place", "group"))
            end = begin + len(place)
            rows[:, done:begin] = torch.arange(done, begin) + shift
            rows[:, begin:end] = place + begin + shift
            if self.unmerge == "compact":
                rows[1, begin:end] = -torch.bincount(group, minlength=len(place))
            elif isinstance(self.step, Step):
                rows[1, begin:end] = -self.step.groups.number(feature.data, group, len(place))
                rows[2, begin:end] = begin + shift
            shift += len(group) - len(place)
            done = end
        rows[:, done:] = torch.arange(done, len(input_tokens)) + shift
        return rows, shift

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
        return self.language_model.model(input_ids, positions[0], intermediate_tensors, inputs_embeds=inputs_embeds)

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
