"""The prompts that are measured: lengths of text, and positions of images. Their words are random."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from dymu.families.resolve import Parts

Part = int | str

PROMPTS: Mapping[str, tuple[Part, ...]] = {
    "image-text": (4, "image", 32),
    "text-image-text": (256, "image", 32),
    "two-images": (4, "image", 8, "image", 32),
}
"""By name: numbers of text tokens, and images."""


def images_in(prompt: str) -> int:
    """Images of one prompt."""
    return PROMPTS[prompt].count("image")


def ids(
    prompt: str, batch: int, image_tokens: int, image_token: int, vocabulary: int, placeholders: bool, seed: int
) -> Tensor:
    """int64 [batch, N]: prompts of random words.

    Args:
        image_tokens: for each image.
        image_token: id of the placeholder.
        vocabulary: ids are below it.
        placeholders: whether images are placeholders, or random words too.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    parts = []
    for part in PROMPTS[prompt]:
        if part == "image" and placeholders:
            parts.append(torch.full((batch, image_tokens), image_token))
        else:
            count = image_tokens if part == "image" else int(part)
            words = torch.randint(vocabulary - 1, (batch, count), generator=generator)
            parts.append(words + (words >= image_token))  # any word but the placeholder
    return torch.cat(parts, 1)


def inputs_of(parts: Parts, words: Tensor) -> dict[str, Tensor]:
    """What the model takes for prompts [B, N], but for the pixels: the ids, a mask, and, where it asks for that, which
    tokens are of images."""
    import torch

    of_image = (words == parts.placeholders["image"]).long()
    kinds = {"mm_token_type_ids": of_image, "token_type_ids": of_image}
    if parts.family.both_ways == "prefix":
        kinds["token_type_ids"] = torch.zeros_like(words)
    takes = inspect.signature(type(parts.inner).forward).parameters
    asked = {name: kind for name, kind in kinds.items() if name in takes}
    return {"input_ids": words, "attention_mask": torch.ones_like(words), **asked}
