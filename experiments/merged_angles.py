"""Which angles should a merged unit carry in an encoder that rotates by place: those of the mean of its places, of its
first unit, or the mean of cosines and sines?

`python -m experiments.merged_angles` merges the photos that come with the library in encoders of Qwen2.5-VL's kind with
random weights (no real ones were at hand), and compares features copied to all places with the untouched ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import dymu
from dymu.bench.workload import PHOTOS
from dymu.media.images import load
from dymu.merging import MergedTokens, encoder_layer
from dymu.reducers import FixedMerge
from dymu.token_map import take

PATCH, LAYERS, HEAD = 14, 8, 64
GRIDS = ((24, 32), (32, 24), (28, 28), (20, 40))
KEEP = (0.5, 0.3, 0.15)
RULES = ("mean of cos and sin", "mean place", "first unit")


def model(spread: float) -> Qwen2_5_VLForConditionalGeneration:
    """A tiny language model behind an encoder of random weights, most of whose layers see windows."""
    torch.manual_seed(0)
    vision = {
        "depth": LAYERS, "hidden_size": 4 * HEAD, "num_heads": 4, "intermediate_size": 512, "patch_size": PATCH,
        "spatial_merge_size": 2, "out_hidden_size": 64, "window_size": 112, "fullatt_block_indexes": [3, 7],
        "initializer_range": spread,
    }  # fmt: skip
    text = {
        "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 100, "bos_token_id": None, "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    }  # fmt: skip
    config = Qwen2_5_VLConfig(vision_config=vision, text_config=text, image_token_id=60, video_token_id=61)
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def patches() -> tuple[Tensor, Tensor]:
    """Photos as the encoder takes them: pixels [S, any], the patches of a unit together, and grids [images, 3]."""
    rows = []
    for photo, (height, width) in zip(sorted(PHOTOS.glob("*.webp")), GRIDS, strict=False):
        pixels = torch.from_numpy(np.array(load(photo).image.convert("RGB"))).permute(2, 0, 1)[None] / 127.5 - 1
        sized = interpolate(pixels, (height * PATCH, width * PATCH), mode="bilinear", antialias=True)[0]
        units = sized.view(3, height // 2, 2, PATCH, width // 2, 2, PATCH).permute(1, 4, 2, 5, 0, 3, 6)
        twice = units[:, :, :, :, :, None].expand(-1, -1, -1, -1, -1, 2, -1, -1)  # a still image is two equal frames
        rows.append(twice.reshape(height * width, -1))
    return torch.cat(rows), torch.tensor([(1, *grid) for grid in GRIDS[: len(rows)]])


@contextmanager
def rule(name: str, rotary: Any) -> Iterator[None]:
    """Within it, merged units carry the angles that the rule says."""
    stock, unmerged = MergedTokens.merge, list[MergedTokens]()

    def places(_hidden: Tensor, positions: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return positions.float(), positions.float()

    def turned(x: Tensor, angles: tuple[Tensor, Tensor], *_: Any) -> Tensor:
        cos, sin = rotary_forward(x, angles[0].flatten(0, -2))
        shape = (*angles[0].shape[:-1], -1)
        return turn(x, (cos.view(shape), sin.view(shape)))

    def of_first(self: MergedTokens, *args: Any) -> tuple[Tensor, MergedTokens]:
        if self.size is None:
            unmerged[:] = [self]
        x, state = stock(self, *args)
        (first,) = unmerged
        assert first.angles is not None
        cos, sin = (
            state.units.spread(
                state.layout.pack(take(first.layout.pad(first.units.gather(part, first.layout)), state.map.first())),
                state.layout,
            )
            for part in first.angles
        )
        return x, replace(state, angles=(cos, sin))

    rotary_forward, turn = type(rotary).forward.__get__(rotary), encoder_layer.rotated
    if name == "mean place":
        with mock.patch.object(rotary, "forward", places), mock.patch.object(encoder_layer, "rotated", turned):
            yield
    elif name == "first unit":
        with mock.patch.object(MergedTokens, "merge", of_first):
            yield
    else:
        yield


@torch.no_grad()
def main() -> None:
    pixels, grids = patches()
    print(f"relative error of the features of {len(grids)} photos, {int(grids.prod(1).sum()) // 4} units in all")
    print(f"{'weights':>8} {'kept':>5}  " + "  ".join(f"{name:>20}" for name in RULES))
    for spread in (0.05, 0.1):
        vlm = model(spread)
        untouched = torch.cat(vlm.model.get_image_features(pixels, grids).pooler_output)
        for keep in KEEP:
            errors = []
            for name in RULES:
                with dymu.apply(vlm, merge=FixedMerge(keep)), rule(name, vlm.model.visual.rotary_pos_emb):
                    merged = torch.cat(vlm.model.get_image_features(pixels, grids).pooler_output)
                errors.append(float((merged - untouched).norm() / untouched.norm()))
            print(f"{spread:>8} {keep:>5.0%}  " + "  ".join(f"{error:>20.4f}" for error in errors))


if __name__ == "__main__":
    main()
