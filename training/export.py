"""Write ``models/demo``: a stock folder that AutoModel and AutoProcessor open with nothing else."""

import json
from pathlib import Path

import torch
import typer
from transformers import (
    BitImageProcessorPil,
    GenerationConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from training.cache import cache_root
from training.drawing import SIDE
from training.model import build_model
from training.tokenizer import CHAT_TEMPLATE, IMAGE, build_tokenizer
from training.tower import MEAN, STD

DEMO = Path(__file__).parents[1] / "models" / "demo"


def build_processor() -> LlavaProcessor:
    """The whole picture squashed to SIDE x SIDE, and the tokenizer with its chat template."""
    size = {"height": SIDE, "width": SIDE}
    images = BitImageProcessorPil(
        size=size, crop_size=size, do_center_crop=False, image_mean=list(MEAN), image_std=list(STD)
    )
    return LlavaProcessor(
        images, build_tokenizer(), patch_size=14, vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE, image_token=IMAGE, num_additional_image_tokens=1,
    )  # fmt: skip


def export_model(model: LlavaForConditionalGeneration, folder: Path = DEMO) -> None:
    """Save weights in bfloat16; the config asks for float32, which CPUs compute exactly."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, max_new_tokens=16
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    build_processor().save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for part in (config, config["text_config"], config["vision_config"]):
        part["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2) + "\n")


def main(folder: Path = DEMO) -> None:
    """Export the newest checkpoint."""
    model = build_model()
    state = torch.load(cache_root() / "checkpoint.pt", weights_only=True)
    model.load_state_dict(state["weights"], strict=False)
    export_model(model, folder)
    print(f"{folder}: step {state['step']}")


if __name__ == "__main__":
    typer.run(main)
