"""A backend is timed only if it computes what the reference computes."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlavaConfig

from dymu.bench.replay import Replay
from dymu.bench.variants import Variant
from dymu.families import FAMILIES, resolve

ALLOWED = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}
"""The largest relative error (Frobenius norm) of the attention's outputs, by dtype."""

LAYERS, SIDE, PATCH, VOCABULARY = 2, 32, 4, 64
TOKENS = (SIDE // PATCH) ** 2
KEY_HEADS = 2
"""At most: the reference takes its time."""
TEXT = (5, 19)
"""Words before and after the image."""
BATCH, DECODED = 2, 2
WIDTH_PER_HEAD = 64


@dataclass(frozen=True)
class Checked:
    """How far a variant is from the reference; `error` is None where it could not run at all, for `why`."""

    error: float | None
    allowed: float
    why: str = ""

    @property
    def right(self) -> bool:
        return self.error is not None and self.error <= self.allowed


class Reference:
    """A small model with attention of the measured model's shape, and what the reference computes for a prompt.

    It keeps the size of a head, how many query heads share a key head, rotary angles and windows, and has two layers
    and up to two key heads. Two images merge at random, each to another number of tokens, and two tokens are decoded.
    The reference runs in float32 on the CPU.

    Args:
        text_config: of the measured model's decoder.
    """

    def __init__(self, text_config: Any, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        torch.manual_seed(0)
        self._model = AutoModelForImageTextToText.from_config(_small(text_config), dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in self._model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, parameter.shape[-1] ** -0.5)
        self._rule = _random_merges()
        self._pixels = torch.randn(BATCH, 3, SIDE, SIDE)
        words = [torch.randint(VOCABULARY - 1, (BATCH, count)) for count in (*TEXT, DECODED)]
        image = torch.full((BATCH, TOKENS), VOCABULARY - 1)
        self._ids, self._decoded = torch.cat((words[0], image, words[1]), 1), words[2]
        _cast(self._model, dtype)  # to weights that the measured dtype holds, so that only the arithmetic differs
        _cast(self._model, torch.float32)
        self._wanted = self._attended(self._model, Variant("reference", "reference"))

    def check(self, variant: Variant) -> Checked:
        """How far the variant's attention is from the reference's."""
        allowed = ALLOWED.get(self._dtype, max(ALLOWED.values()))
        model = copy.deepcopy(self._model).to(self._device)
        _cast(model, self._dtype)
        try:
            found = self._attended(model, variant)
        except Exception as error:  # compilers of kernels have kinds of their own
            return Checked(None, allowed, " ".join(str(error).split()) or type(error).__name__)
        off = float((found - self._wanted).norm() / self._wanted.norm())
        return Checked(off, allowed) if math.isfinite(off) else Checked(None, allowed, "what it gives is not finite")

    @torch.no_grad()
    def _attended(self, model: Any, variant: Variant) -> Tensor:
        """What the attention layers put out, for every merged token of the prompt and of the decoding, [all, C]."""
        outputs: list[Tensor] = []
        lengths = [sum(TEXT) + TOKENS - sum(int((layer >= 0).sum()) for layer in image) for image in self._rule.into]

        def take(_module: object, _args: object, output: Any) -> None:
            rows = output[0].float().cpu()
            outputs.extend(row[:length] for row, length in zip(rows, lengths, strict=True))  # padding may be anything

        hooks = [module.register_forward_hook(take) for module in resolve(model, FAMILIES).attentions]
        try:
            with variant.on(model, {"merge": self._rule}):
                prompt = {"input_ids": self._ids, "pixel_values": self._pixels.to(model.dtype)}
                cache = None
                for words in (None, *self._decoded.split(1, 1)):
                    given = prompt if words is None else {"input_ids": words}
                    given = {name: value.to(model.device) for name, value in given.items()}
                    cache = model(**given, past_key_values=cache, use_cache=True).past_key_values
        finally:
            for hook in hooks:
                hook.remove()
        return torch.cat(outputs)


def _cast(model: Any, dtype: torch.dtype) -> None:
    """Cast the weights; rotary frequencies stay as they are, as they do when a model is loaded."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _small(text_config: Any) -> LlavaConfig:
    text = copy.deepcopy(text_config)
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    shared = text.num_attention_heads // text.num_key_value_heads
    heads = min(text.num_key_value_heads, KEY_HEADS)
    text.head_dim, text.num_key_value_heads, text.num_attention_heads = head, heads, heads * shared
    text.hidden_size = text.intermediate_size = WIDTH_PER_HEAD * heads * shared
    text.num_hidden_layers, text.vocab_size, text.pad_token_id = LAYERS, VOCABULARY, None
    if getattr(text, "layer_types", None) is not None:
        text.layer_types = text.layer_types[:LAYERS]
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=LAYERS, num_attention_heads=2, image_size=SIDE,
        patch_size=PATCH,
    )  # fmt: skip
    return LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=VOCABULARY - 1, vision_feature_layer=-1
    )


def _random_merges() -> Replay:
    """In every layer, for every image, a random half (or quarter) of the tokens at even places merge."""
    generator = np.random.default_rng(0)
    images = []
    for image in range(BATCH):
        left, layers = TOKENS, []
        for _ in range(LAYERS):
            partner = generator.integers(0, left // 2, (left + 1) // 2)
            into = np.where(generator.random(len(partner)) < 0.5 / (image + 1), partner, -1)
            left -= int((into >= 0).sum())
            layers.append(into)
        images.append(tuple(layers))
    return Replay(TOKENS, tuple(images))
