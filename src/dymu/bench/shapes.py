"""Models of a real shape with random weights: time and memory depend on the shape, not on the weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    import torch

FOLDER = Path(__file__).with_name("shapes")


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
