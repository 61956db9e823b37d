"""Models of a real shape with random weights: time and memory depend on the shape, not on the weights."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from safetensors import safe_open

from dymu.errors import BadBudget

if TYPE_CHECKING:
    import torch

FOLDER = Path(__file__).with_name("shapes")
NEAR = 0.05
"""Largest relative distance of a budget from the recorded one that is used for it."""


class Image(msgspec.Struct, frozen=True):
    """How a model of some shape is shown an image.

    Attributes:
        pictures: that it is cut into.
        arguments: of the model besides the pixels, for each image.
    """

    pictures: int = 1
    arguments: dict[str, list[int]] = msgspec.field(name="given", default_factory=dict)


class _File(msgspec.Struct):
    config: dict[str, Any]
    image: Image = Image()


def names() -> list[str]:
    """Shapes that come with the library, one JSON file each."""
    return sorted(file.stem for file in FOLDER.glob("*.json"))


def config(name: str) -> Any:
    """The configuration of a shape, of those in `names`."""
    from transformers import AutoConfig

    return AutoConfig.for_model(**_read(name).config)


def image(name: str) -> Image:
    """How a model of a shape, of those in `names`, is shown an image."""
    return _read(name).image


def check_budget(name: str, budget: int | float) -> None:
    """Raises: BadBudget, where no merges were recorded near it for this shape."""
    vision = _read(name).config["vision_config"]
    tokens = (vision["image_size"] // vision["patch_size"]) ** 2
    file = file_for(tokens)
    if file.exists():
        with safe_open(file, "numpy") as merges:
            nearest(map(int, merges.keys()), tokens, budget, image(name).pictures)


def file_for(tokens: int) -> Path:
    """The file with the recorded merges of pictures of so many tokens."""
    return FOLDER.with_name(f"merges-{tokens}.safetensors")


def nearest(recorded: Iterable[int], tokens: int, budget: int | float, pictures: int) -> int:
    """See `dymu.bench.replay.Recorded.budget_near`, of which this is the part that needs no torch."""
    recorded, full = sorted(recorded), pictures * tokens
    asked = budget * full if isinstance(budget, float) and budget <= 1 else budget
    best = min(recorded, key=lambda one: abs(pictures * one - asked))
    if abs(pictures * best - asked) > NEAR * pictures * best:
        known = ", ".join(str(pictures * one) for one in recorded)
        raise BadBudget(
            f"merges were recorded at {known} of {full} tokens, none of them near {asked:g}; take one of those."
        )
    return best


def build(shape: Any, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Any:
    """A model of that configuration whose weights are drawn as for training from scratch, so that no dtype overflows.

    It is built on `device` and in `dtype`, so that nothing wider is ever held.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(shape, dtype=dtype)
    return model.eval()


def _read(name: str) -> _File:
    return msgspec.json.decode((FOLDER / f"{name}.json").read_bytes(), type=_File)
