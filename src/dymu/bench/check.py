"""Comparison of backends with the reference; only those that agree are timed."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from dymu.bench.replay import Replay
from dymu.bench.results import Checked
from dymu.bench.variants import Variant
from dymu.families.resolve import Parts, resolve
from dymu.handle import Handle
from dymu.hooks.versions import going_on

ALLOWED = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}
"""The largest relative error (Frobenius norm) of the attention's outputs, by dtype."""

LAYERS, VOCABULARY = 2, 64
ROWS, KEY_HEADS = 8, 2
"""Rows of patches of an image that is one picture, and key heads at most: the reference takes its time."""
TEXT = (5, 19)
"""Words before and after the image."""
BATCH, DECODED = 2, 2
WIDTH_PER_HEAD = 64


class Reference:
    """A small model like the measured one, and the reference's attention outputs for a prompt.

    It keeps the family with its way to lay out tiles, the size of a head, how many query heads share a key head, rotary
    angles and windows, and has two layers, up to two key heads and coarser patches. Two images merge at random, each to
    another number of tokens, and two tokens are decoded. The reference runs in float32 on the CPU.

    Args:
        model: the measured one; the small one runs on its device and in its dtype.
        shown: the measured model's image arguments for one image twice; the pixels are replaced by noise.
    """

    def __init__(self, model: Any, shown: Mapping[str, Tensor]) -> None:
        self._device, self._dtype = model.device, model.dtype
        torch.manual_seed(0)
        parts = resolve(model)
        pixels = shown["pixel_values"]
        config = _small(parts, pictures=pixels.shape[1] if pixels.ndim > 4 else 1)
        self._model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in self._model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, parameter.shape[-1] ** -0.5)
            self._shown = {name: value.cpu() for name, value in shown.items()}
            self._shown["pixel_values"] = torch.randn(pixels.shape)
            encoded = self._model.get_image_features(**self._shown, return_dict=True)
        pictures, tokens = encoded.last_hidden_state.shape[:2]
        self._rule = _random_merges(pictures, tokens - parts.prefix)
        words = [torch.randint(VOCABULARY - 1, (BATCH, count)) for count in (*TEXT, DECODED)]
        image = torch.full((BATCH, len(encoded.pooler_output[0])), VOCABULARY - 1)
        self._ids, self._decoded = torch.cat((words[0], image, words[1]), 1), words[2]
        _cast(self._model, self._dtype)  # to weights that the measured dtype holds: only the arithmetic differs
        _cast(self._model, torch.float32)
        self._expected = self._attended(self._model, Variant("reference", "reference"))

    def check(self, variant: Variant) -> Checked:
        """Compare the variant's attention outputs with the reference's."""
        allowed = ALLOWED.get(self._dtype, max(ALLOWED.values()))
        model = copy.deepcopy(self._model).to(self._device)
        _cast(model, self._dtype)
        try:
            attended = self._attended(model, variant)
        except Exception as error:  # kernel compilers raise many kinds of errors
            return Checked(None, allowed, " ".join(str(error).split()) or type(error).__name__)
        off = float((attended - self._expected).norm() / self._expected.norm())
        return Checked(off, allowed) if math.isfinite(off) else Checked(None, allowed, "its outputs are not finite")

    @torch.no_grad()
    def _attended(self, model: Any, variant: Variant) -> Tensor:
        """Outputs of the attention layers for every merged token of the prompt and of the decoding, [all, C]."""
        outputs: list[Tensor] = []
        handle: Handle | None = None

        def take(_module: object, _args: object, output: Any) -> None:
            assert handle is not None
            rows = output[0].float().cpu()
            lengths = [sum(TEXT) + kept for kept in handle.last.kept]
            outputs.extend(row[:length] for row, length in zip(rows, lengths, strict=True))  # padding may be anything

        hooks = [module.register_forward_hook(take) for module in resolve(model).attentions]
        try:
            with variant.on(model, {"merge": self._rule}) as handle:
                prompt = {"input_ids": self._ids, **self._shown}
                prompt["pixel_values"] = prompt["pixel_values"].to(model.dtype)
                output = model(**{name: value.to(model.device) for name, value in prompt.items()}, use_cache=True)
                for words in self._decoded.split(1, 1):
                    output = model(input_ids=words.to(model.device), use_cache=True, **going_on(model, output))
        finally:
            for hook in hooks:
                hook.remove()
        return torch.cat(outputs)


def _cast(model: Any, dtype: torch.dtype) -> None:
    """Cast the weights; rotary frequencies stay as they are, as they do when a model is loaded."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _small(parts: Parts, pictures: int) -> Any:
    config, family = copy.deepcopy(parts.config), parts.family
    text = config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    shared = text.num_attention_heads // text.num_key_value_heads
    heads = min(text.num_key_value_heads, KEY_HEADS)
    text.head_dim, text.num_key_value_heads, text.num_attention_heads = head, heads, heads * shared
    text.hidden_size = text.intermediate_size = WIDTH_PER_HEAD * heads * shared
    text.num_hidden_layers, text.vocab_size, text.pad_token_id = LAYERS, VOCABULARY, None
    if getattr(text, "layer_types", None) is not None:
        text.layer_types = text.layer_types[:LAYERS]
    vision = config.vision_config
    vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers = 32, 32, LAYERS
    vision.num_attention_heads = 2
    rows = max(round(ROWS / math.sqrt(pictures)), 2)  # the side of a picture stays, by which the family cuts images
    vision.patch_size = vision.image_size // min(rows, vision.image_size)
    layers = getattr(config, family.feature_layer)
    setattr(config, family.feature_layer, -1 if isinstance(layers, int) else [-1] * len(layers))
    setattr(config, family.image_token, VOCABULARY - 1)
    return config


def _random_merges(pictures: int, tokens: int) -> Replay:
    """In every layer a random half of the A tokens merges, in pictures of the second image a quarter."""
    generator = np.random.default_rng(0)
    into_of = []
    for picture in range(pictures):
        left, layers = tokens, []
        for _ in range(LAYERS):
            partner = generator.integers(0, left // 2, left // 2)  # behind whatever prefix there are so many A and B
            merges = generator.random(len(partner)) < 0.5 / (1 + picture * BATCH // pictures)
            into = np.where(merges, partner, -1)
            left -= int((into >= 0).sum())
            layers.append(into)
        into_of.append(tuple(layers))
    return Replay(tokens, tuple(into_of))
