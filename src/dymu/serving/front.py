"""The vision half of a model by itself, for whoever builds prompts: what stands in one for each image."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging

import dymu
from dymu.calibration.samples import arguments_for
from dymu.choices import Unmerge
from dymu.counts import Count
from dymu.errors import BadImage
from dymu.families.resolve import Parts, resolve
from dymu.prompting import adds_special_tokens, items_by_prompt, pixels_for, placeholder_of
from dymu.thresholds import Thresholds
from dymu.token_map import TokenMap
from dymu.unmerging import place_leaders
from dymu.unmerging.prompt import NewTokens

KEPT_BYTES = 2**29
"""Features of so many bytes are kept, for images that come again."""
SIZES = [(1024 * rows, 1024 * columns) for rows in range(1, 17) for columns in range(1, 17)]
"""Heights and widths of images of which one has as many tokens as any."""


@dataclass(frozen=True)
class InPrompt:
    """An image as it stands in a prompt, of L tokens if none had merged.

    Attributes:
        ids: T tokens: what the family writes around images, and one placeholder for each of M merged tokens.
        features: [M, C], what the language model gets for the placeholders.
        position: int64 [T, axes], of each, counted from the first of the L.
        advance: int64 [], by how much the text behind stands further on than the text ahead.
        group: int64 [L], which of the T stands for each.
    """

    ids: list[int]
    features: Tensor
    position: Tensor
    advance: Tensor
    group: Tensor


class Front:
    """Encodes images with merging, on the CPU and without a language model. One thread at a time; others wait.

    Args:
        source: a model's folder or hub name.
        thresholds: of its encoder.
        unmerge: how the language model will attend to merged tokens, which says where these stand.
        dtype: of the weights, and of what the language model gets.
    """

    def __init__(
        self,
        source: str,
        thresholds: Thresholds,
        unmerge: Unmerge,
        *,
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.processor = AutoProcessor.from_pretrained(source, revision=revision)
        self._source, self._revision, self._thresholds, self._unmerge = source, revision, thresholds, unmerge
        self._dtype, self._lock = dtype, threading.Lock()
        self._kept = dict[bytes, InPrompt]()

    @cached_property
    def longest(self) -> int:
        """Tokens of an image, at most, with nothing merged, as far as the processor says."""
        (ids,) = self._ids(pixels_for(self.processor, [Image.new("RGB", (64, 64))]))
        counts: list[int] = self.processor._get_num_multimodal_tokens(image_sizes=SIZES)["num_image_tokens"]
        return max(len(ids), *counts)

    @cached_property
    def image_token(self) -> int:
        """The placeholder in a prompt."""
        return int(self.processor.tokenizer.convert_tokens_to_ids(self.processor.image_token))

    @cached_property
    def target(self) -> list[int]:
        """What stands in a text for an image."""
        ids: list[int] = self.processor.tokenizer.encode(placeholder_of(self.processor), add_special_tokens=False)
        return ids

    @cached_property
    def _applied(self) -> tuple[Any, Parts, dymu.Handle]:
        """The model without its language model; that is loaded with one layer, and left."""
        config = AutoConfig.from_pretrained(self._source, revision=self._revision)
        text = config.get_text_config()
        text.num_hidden_layers = 1
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:1]
        said = logging.get_verbosity()
        try:
            logging.set_verbosity_error()  # or it reports every weight of the layers that are left
            model: Any = AutoModelForImageTextToText.from_pretrained(
                self._source, revision=self._revision, config=config, dtype=self._dtype
            ).eval()
        finally:
            logging.set_verbosity(said)
        handle = dymu.apply(model, self._thresholds, budget=self._thresholds.budgets[0])
        parts = resolve(model)
        for module in (parts.language_model, model.get_output_embeddings()):
            module.to("meta")
        return model, parts, handle

    def __call__(self, images: Sequence[Image.Image], count: Count | None) -> list[InPrompt]:
        """The images, each as it stands in a prompt; those of late that come again are not encoded again.

        Args:
            count: what each keeps; None: nothing merges.
        """
        keys = [hashlib.sha256(f"{image.mode} {image.size} {count!r} ".encode() + image.tobytes()) for image in images]
        by_key = dict(zip((key.digest() for key in keys), images, strict=True))
        with self._lock:
            found = {key: self._kept.pop(key) for key in by_key if key in self._kept}
            missing = [key for key in by_key if key not in found]
            if missing:
                encoded = self._encoded([by_key[key] for key in missing], count)
                found |= dict(zip(missing, encoded, strict=True))
            self._kept |= found  # behind all others
            while sum(one.features.nbytes for one in self._kept.values()) > KEPT_BYTES:
                self._kept.pop(next(iter(self._kept)))
        return [found[key.digest()] for key in keys]

    @torch.inference_mode()
    def _encoded(self, images: Sequence[Image.Image], count: Count | None) -> list[InPrompt]:
        inputs = pixels_for(self.processor, images)
        rows = self._ids(inputs)
        model, parts, handle = self._applied
        arguments = arguments_for(parts, "image", self.processor, inputs)
        if count is None:
            with handle.disabled():
                encoded = parts.inner.get_image_features(**arguments).pooler_output
        else:
            handle.set_budget(count.budget, at_most=count.at_most, exactly=count.exactly)
            prompts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            encoded = parts.inner.get_image_features(**arguments, **prompts).pooler_output
        features = torch.cat([feature.flatten(0, -2) for feature in encoded])
        grids = arguments.get("image_grid_thw", [None] * len(rows))
        positions = [_positions(parts, row, grid) for row, grid in zip(rows, grids, strict=True)]
        if count is None:
            leaders = [[torch.arange(row.count(self.image_token))] for row in rows]
        else:
            items = items_by_prompt(model, inputs, handle.last.items)
            leaders = [[item.leaders for item in of_image] for of_image in items]
        if (most := max(map(len, rows))) > self.longest:
            raise BadImage(
                f"an image has {most:,} tokens, more than the {self.longest:,} reckoned with: make it smaller."
            )
        by_image = features.split([row.count(self.image_token) for row in rows])
        return [self._placed(*one) for one in zip(rows, positions, leaders, by_image, strict=True)]

    def _ids(self, inputs: Any) -> list[list[int]]:
        """The tokens of every image, without padding and what a tokenizer writes ahead of a prompt."""
        tokenizer = self.processor.tokenizer
        special = tokenizer.encode("", add_special_tokens=adds_special_tokens(tokenizer, ""))
        rows = [
            ids[mask.bool()].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        ]
        return [row[len(special) :] if special and row[: len(special)] == special else row for row in rows]

    def _placed(self, row: list[int], positions: Tensor, items: list[Tensor], features: Tensor) -> InPrompt:
        """An image whose L tokens are `row` at positions [L, axes], from the leaders of its items and the features of
        its placeholders."""
        ids = torch.tensor(row)[None]
        shown = ids == self.image_token
        index = torch.arange(len(row))[None]
        tokens = TokenMap.from_leaders(place_leaders(index, shown, items))
        new = NewTokens.of(tokens, positions[None], self._unmerge)
        place = new.representative[0]
        merged = place[shown[0, place]]
        of_placeholder = shown[0].cumsum(0) - 1
        return InPrompt(
            ids[0, place].tolist(),
            features[of_placeholder[merged]],
            positions[place],
            positions.max() + 1,
            new.map.group[0],
        )


def _positions(parts: Parts, row: list[int], grid: Tensor | None) -> Tensor:
    """int64 [L, axes] of the tokens of an image, counted from the first one, by the family's own rule."""
    if grid is None or not hasattr(parts.inner, "get_rope_index"):
        return torch.arange(len(row))[:, None]
    ids = torch.tensor([row])
    kinds = (ids == parts.placeholders["image"]).int()
    positions, _ = parts.inner.get_rope_index(ids, mm_token_type_ids=kinds, image_grid_thw=grid[None])
    by_token: Tensor = positions[:, 0].T
    return by_token
