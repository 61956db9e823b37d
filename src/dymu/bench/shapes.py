"""Models of a real shape with random weights: time and memory depend on the shape, not on what the weights know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, LlavaConfig

FOLDER = Path(__file__).with_name("shapes")


def names() -> list[str]:
    """Shapes that come with the library, one file of data each."""
    return sorted(file.stem for file in FOLDER.glob("*.json"))


def config(name: str) -> LlavaConfig:
    """The configuration of a shape, of those in `names`."""
    found = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return LlavaConfig.from_dict(found["config"])


def build(shape: LlavaConfig, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Any:
    """A LLaVA of that shape whose weights are drawn as for training from scratch, which no dtype overflows on.

    It comes into being on `device` and in `dtype`, so that nothing wider is ever held.
    """
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(shape, dtype=dtype)
    return model.eval()
