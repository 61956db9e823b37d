"""Write what was trained as files to keep, ``models/vlm``: the parts that no package has.

The tower and the projector are written whole, the language model as its low-rank updates; ``assemble.py`` adds them to
the packaged language model. No file is larger than 15 MiB. With ``--to`` it also assembles.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from training.assets import LANGUAGE
from training.vlm import base
from training.vlm.assemble import INDEX, LANGUAGE_PREFIX, PARTS, PARTS_FOLDER
from training.vlm.lora import lora_layers
from training.vlm.train import RANK, SCALE, Trainer, default_device, setup

LARGEST = 15 * 2**20
"""Bytes of a file."""

CARD = Path(__file__).with_name("MODEL_CARD.md")


def export(trainer: Trainer, target: Path) -> None:
    """Write the parts; a folder that exists is replaced once the new one is complete."""
    scratch = target.with_name(f"{target.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    tensors = {name: value.detach().to("cpu", torch.bfloat16).contiguous() for name, value in parts(trainer).items()}
    files = _shards(tensors)
    for number, shard in enumerate(files, 1):
        save_file(shard, scratch / f"trained-{number:05}-of-{len(files):05}.safetensors", metadata={"format": "pt"})
    index = {
        "language_package": LANGUAGE.file,
        "language_sha256": LANGUAGE.sha256,
        "lora_rank": RANK,
        "lora_scale": SCALE,
        "progress": asdict(trainer.progress),
        "sha256": {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(scratch.glob(PARTS))},
    }
    (scratch / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    _write_configs(trainer, scratch)
    shutil.copy(CARD, scratch / "README.md")
    for file in scratch.iterdir():  # safetensors writes for its owner alone
        file.chmod(0o644)
    shutil.rmtree(target, ignore_errors=True)
    scratch.rename(target)


def parts(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Tower and projector by the names that saved models have in every version, and the updates by their layers."""
    with tempfile.TemporaryDirectory() as folder:
        trainer.model.save_pretrained(folder)
        saved = {name: value for file in Path(folder).glob("*.safetensors") for name, value in load_file(file).items()}
    kept = {name: value for name, value in saved.items() if not name.startswith((LANGUAGE_PREFIX, "lm_head"))}
    for name, layer in lora_layers(trainer.model.model.language_model):
        kept[f"{LANGUAGE_PREFIX}{name}.lora_a"] = layer.lora_a
        kept[f"{LANGUAGE_PREFIX}{name}.lora_b"] = layer.lora_b
    return kept


def _shards(tensors: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """In order, as many into each as fit."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, value in tensors.items():
        if size + value.nbytes > LARGEST:
            shards.append({})
            size = 0
        shards[-1][name] = value
        size += value.nbytes
    return shards


def _write_configs(trainer: Trainer, folder: Path) -> None:
    """What a stock model folder holds beside weights."""
    tokenizer = trainer.processor.tokenizer
    config = trainer.model.config.to_dict()
    config["architectures"] = [type(trainer.model).__name__]
    for part in (config, config["text_config"], config["vision_config"]):
        part["dtype"] = "bfloat16"
        part.pop("_name_or_path", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    ).save_pretrained(folder)
    trainer.processor.save_pretrained(folder)


def main(
    checkpoint: Annotated[Path | None, typer.Option(help="What train.py wrote.")] = None,
    target: Annotated[Path, typer.Option(help="The folder of parts.")] = PARTS_FOLDER,
    pack: Annotated[Path | None, typer.Option(help="The training pack.")] = None,
) -> None:
    """Export a checkpoint."""
    trainer, _ = setup(pack or base.training_pack(), default_device())
    trainer.load(checkpoint or base.folder() / "checkpoint.pt")
    export(trainer, target)
    size = sum(file.stat().st_size for file in target.iterdir())
    print(f"{target}: step {trainer.progress.step}, {size / 1e6:.1f} MB in {len(list(target.iterdir()))} files")


if __name__ == "__main__":
    typer.run(main)
