"""Vision towers of open_clip, its wrapper of timm's, and models that hold one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import open_clip
import pytest
import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import linear

import dymu
import tiny_encoders
from dymu.errors import AlreadyApplied, DymuError, UnsupportedModel
from dymu.reducers import ThresholdMerge
from dymu.thresholds import Encoder
from tiny_encoders import LAYERS, MERGING, PATCH, SIDE, Kind, images


def _tower(**more: Any) -> nn.Module:
    return VisionTransformer(SIDE, PATCH, width=32, layers=LAYERS, heads=2, mlp_ratio=2, output_dim=8, **more)


def _intermediates(encoder: Any, pixels: Tensor) -> list[Tensor]:
    output = encoder.forward_intermediates(pixels, output_extra_tokens=True)
    prefix = output.get("image_intermediates_prefix", [])
    return [output["image_features"], *output["image_intermediates"], *prefix]


TOWER = Kind(
    make=_tower,
    layers="transformer.resblocks",
    norm1="ln_1",
    norm2="ln_2",
    keys=lambda layer, x: linear(x, layer.attn.in_proj_weight, layer.attn.in_proj_bias).chunk(3, -1)[1],
    prefix=1,
    methods={"forward": lambda encoder, pixels: [encoder(pixels)], "forward_intermediates": _intermediates},
)

TIMM = Kind(
    make=lambda: TimmModel("test_vit", embed_dim=8, pool="avg"),
    layers="trunk.blocks",
    norm1="norm1",
    norm2="norm2",
    keys=lambda layer, x: layer.attn.qkv(x).chunk(3, -1)[1],
    prefix=1,
    methods=TOWER.methods,
    side=160,
    patch=16,
)

KINDS = {
    "class-token": TOWER,
    "layer-scale": replace(TOWER, make=lambda: _tower(ls_init_value=0.5, no_ln_pre=True)),
    "average": replace(TOWER, make=lambda: _tower(pool_type="avg", final_ln_after_pool=True)),
    "attention-pooling": replace(TOWER, make=lambda: _tower(attentional_pool=True, attn_pooler_queries=5)),
    "all-tokens": replace(
        TOWER,
        make=lambda: _tower(output_tokens=True),
        methods={"forward": lambda encoder, pixels: list(encoder(pixels))},
    ),
    "timm": TIMM,
}


@pytest.fixture(params=KINDS)
def kind(request: Any) -> Kind:
    return KINDS[request.param]


@pytest.fixture
def encoder(kind: Kind) -> nn.Module:
    return tiny_encoders.randomised(kind.make())


def test_merged_outputs_equal_merging_by_hand(kind: Kind, encoder: nn.Module) -> None:
    tiny_encoders.check_by_hand(kind, encoder)


def test_nothing_merged_is_the_untouched_encoder_and_removal_restores_it(kind: Kind, encoder: nn.Module) -> None:
    tiny_encoders.check_untouched(kind, encoder)


def test_an_image_gets_in_a_batch_what_it_gets_alone(kind: Kind, encoder: nn.Module) -> None:
    tiny_encoders.check_alone(kind, encoder)


@pytest.mark.parametrize("whole", [open_clip.CLIP, open_clip.CustomTextCLIP])
def test_a_model_encodes_images_with_its_tower(whole: Any) -> None:
    tower = {"image_size": SIDE, "patch_size": PATCH, "width": 32, "layers": LAYERS, "head_width": 16, "mlp_ratio": 2}
    text = {"context_length": 7, "vocab_size": 11, "width": 16, "heads": 2, "layers": 1}
    model = tiny_encoders.randomised(whole(8, tower, text))
    words = torch.arange(7)[None]
    stock_words = model.encode_text(words)
    with dymu.apply(model.visual, merge=ThresholdMerge(MERGING)):
        merged = model.encode_image(images())
        with pytest.raises(AlreadyApplied):
            dymu.apply(model, merge=ThresholdMerge(MERGING))
    with dymu.apply(model, merge=ThresholdMerge(MERGING)) as handle:
        assert torch.equal(model.encode_image(images()), merged)
        assert torch.equal(model(images(), words)[0], torch.nn.functional.normalize(merged, dim=-1))
        assert torch.equal(model.encode_text(words), stock_words)
        assert max(handle.last.kept) < TOWER.patches


@pytest.mark.parametrize("more", [{"qk_norm": True}, {"scale_heads": True}, {"block_type": "custom"}])
def test_blocks_of_other_kinds_are_refused(more: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModel, match=r"attn\.num_heads|layer 0"):
        dymu.apply(tiny_encoders.randomised(_tower(**more)), merge=ThresholdMerge(MERGING))


def test_thresholds_come_of_the_towers_own_transform() -> None:
    tower = tiny_encoders.randomised(_tower())
    transform = open_clip.image_transform(SIDE, is_train=False)
    thresholds = dymu.calibrate(tower, transform, tiny_encoders.noisy_pictures(), [16, 0.5], progress=False)
    assert [entry.achieved for entry in thresholds.calibrated] == [16, 32]
    assert thresholds.encoder == Encoder("open_clip.VisionTransformer", LAYERS, LAYERS, 32, 2, 64)
    kept = 0
    with dymu.apply(tower, thresholds, budget=16) as handle:
        for picture in tiny_encoders.noisy_pictures():
            tower(transform(picture)[None])
            kept += handle.last.kept[0]
    assert kept == 16 * len(tiny_encoders.noisy_pictures())
    with pytest.raises(DymuError, match="no pixels of images"):
        dymu.calibrate(tower, "a name", tiny_encoders.noisy_pictures(), 16, progress=False)
