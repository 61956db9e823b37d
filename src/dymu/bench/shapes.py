"""Models of a real shape with random weights: time and memory depend on the shape, not on what the weights know."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

FOLDER = Path(__file__).with_name("shapes")


@dataclass(frozen=True)
class Image:
    """How a model of some shape is shown an image.

    Attributes:
        pictures: that it is cut into.
        given: what else the model takes with each image, by argument.
    """

    pictures: int = 1
    given: Mapping[str, list[int]] = field(default_factory=dict)


def names() -> list[str]:
    """Shapes that come with the library, one file of data each."""
    return sorted(file.stem for file in FOLDER.glob("*.json"))


def config(name: str) -> Any:
    """The configuration of a shape, of those in `names`."""
    return AutoConfig.for_model(**_read(name)["config"])


def image(name: str) -> Image:
    """How a model of a shape, of those in `names`, is shown an image."""
    return Image(**_read(name).get("image", {}))


def build(shape: Any, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Any:
    """A model of that configuration whose weights are drawn as for training from scratch, which no dtype overflows on.

    It comes into being on `device` and in `dtype`, so that nothing wider is ever held.
    """
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(shape, dtype=dtype)
    return model.eval()


def _read(name: str) -> dict[str, Any]:
    return dict(json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")))
