"""The pictures of docs/layouts.md: an image in tiles, and a video whose frames share tokens.

`python -m experiments.layout_pictures models/demo FOLDER` gives a LLaVA-OneVision the demo model's real tower, at 336
px a tile, and a small random language model, which has no say in what merges. It calibrates on photos of FOLDER and on
clips made of them, and draws one of examples/ that it has not seen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    Qwen2Config,
)

import dymu
from dymu.media.images import load

SIDE, FRAMES = 336, 12
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def model_of(folder: Path) -> LlavaOnevisionForConditionalGeneration:
    """A OneVision around the tower of a model folder."""
    demo = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    vision = demo.config.vision_config
    vision.image_size = SIDE
    text = Qwen2Config(
        vocab_size=64, hidden_size=384, intermediate_size=384, num_hidden_layers=1, num_attention_heads=6,
        num_key_value_heads=6,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlavaOnevisionForConditionalGeneration(
        LlavaOnevisionConfig(
            vision_config=vision,
            text_config=text,
            image_grid_pinpoints=pinpoints(),
            vision_feature_select_strategy="default",
            image_token_index=62,
            video_token_index=63,
        )
    )
    model.model.vision_tower = demo.model.vision_tower
    return model.eval()


def pinpoints() -> list[list[int]]:
    return [[rows * SIDE, columns * SIDE] for rows in range(1, 4) for columns in range(1, 4)]


class Processor:
    """Images in tiles and videos in frames, as the family's processors make them, without torchvision."""

    def __init__(self) -> None:
        self.image_processor = LlavaOnevisionImageProcessorPil(
            size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=pinpoints(), image_mean=MEAN, image_std=STD
        )

    def video_processor(self, videos: list[list[Image.Image]], return_tensors: str) -> dict[str, torch.Tensor]:
        pixels = [
            [(np.asarray(frame.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) / 255 - MEAN) / STD for frame in video]
            for video in videos
        ]
        return {"pixel_values_videos": torch.tensor(np.array(pixels)).permute(0, 1, 4, 2, 3).float()}


def clip(scene: Image.Image, other: Image.Image) -> list[Image.Image]:
    """A picture that goes across a still scene."""
    scene = scene.resize((640, 480))
    other = other.resize((160, 160))
    frames = []
    for number in range(FRAMES):
        frame = scene.copy()
        frame.paste(other, (-160 + round(number * 800 / (FRAMES - 1)), 240))
        frames.append(frame)
    return frames


def main(
    model_folder: Annotated[Path, typer.Argument(metavar="MODEL")],
    image_folder: Annotated[Path, typer.Argument(metavar="IMAGES")],
    photos: Annotated[int, typer.Option(help="To calibrate on, at least 12.")] = 12,
    budget: Annotated[float, typer.Option(help="Part of the tokens to keep.")] = 0.25,
    per_second: Annotated[float, typer.Option(help="Tokens per second of the video, at 4 frames a second.")] = 60,
    output: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("docs"),
) -> None:
    """Calibrate and draw."""
    model, processor = model_of(model_folder), Processor()
    paths = sorted(path for path in image_folder.rglob("*") if path.suffix in (".jpg", ".png", ".webp"))[:photos]
    thresholds = dymu.calibrate(model, processor, paths, [budget])
    samples = [load(path).image for path in paths]
    clips = [clip(scene, other) for scene, other in zip(samples[0:6], samples[6:12], strict=True)]
    thresholds = dymu.calibrate_videos(model, processor, clips, thresholds, [per_second], fps=4)
    examples = Path(__file__).parents[1] / "examples"
    photo, other = load(examples / "photo.jpg").image, load(examples / "pyramid.jpg").image
    with torch.inference_mode(), dymu.apply(model, thresholds, per_second=per_second) as handle:
        inputs: dict[str, Any] = processor.image_processor(images=[photo], return_tensors="pt")
        model.get_image_features(**inputs)
        print(f"image: {handle.last.kept} of {handle.last.original} tokens, {handle.last.items[0].pictures} pictures")
        _save(handle.last.draw(photo), output / "tiles.png")
        frames = clip(photo, other)
        model.get_video_features(processor.video_processor([frames], "pt")["pixel_values_videos"])
        print(f"video: {handle.last.kept[-1:]} of {handle.last.original[-1:]} tokens; new in each frame:")
        print(handle.last.items[-1].fresh)
        _save(handle.last.draw(frames, -1), output / "video.png")
    print(thresholds.calibrated[0], thresholds.over_time)


def _save(picture: Image.Image, path: Path) -> None:
    picture.thumbnail((1400, 1400), Image.Resampling.LANCZOS)
    picture.quantize(255, method=Image.Quantize.MEDIANCUT).save(path, optimize=True)


if __name__ == "__main__":
    typer.run(main)
