"""Vision transformers of timm."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from timm.layers import PatchDropout
from timm.models import deit, vision_transformer
from torch import Tensor, nn

import dymu
import tiny_encoders
from dymu.errors import UnsupportedModel
from dymu.reducers import ThresholdMerge
from tiny_encoders import LAYERS, MERGING, PATCH, SIDE, Kind, images

SIZES: dict[str, Any] = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": 32, "depth": LAYERS, "num_heads": 2}


def _vit(**more: Any) -> nn.Module:
    return vision_transformer.VisionTransformer(**SIZES, **{"mlp_ratio": 2, "num_classes": 5, **more})


def _features(encoder: Any, pixels: Tensor) -> list[Tensor]:
    features = encoder.forward_features(pixels)
    return [features, encoder.forward_head(features)]


def _intermediates(encoder: Any, pixels: Tensor) -> list[Tensor]:
    last, between = encoder.forward_intermediates(pixels, norm=True)
    return [last, *between]


def _with_prefix(encoder: Any, pixels: Tensor) -> list[Tensor]:
    layers = encoder.get_intermediate_layers(pixels, [0, 2], reshape=True, return_prefix_tokens=True)
    return [part for layer in layers for part in (layer if isinstance(layer, tuple) else (layer,))]


def _until_second(encoder: Any, pixels: Tensor) -> list[Tensor]:
    last, between = encoder.forward_intermediates(pixels, indices=[1], stop_early=True, output_fmt="NLC")
    return [last, *between]


VIT = Kind(
    make=_vit,
    layers="blocks",
    norm1="norm1",
    norm2="norm2",
    keys=lambda layer, x: layer.attn.qkv(x).chunk(3, -1)[1],
    prefix=1,
    methods={
        "forward": lambda encoder, pixels: [encoder(pixels)],
        "forward_features": _features,
        "forward_intermediates": _intermediates,
        "get_intermediate_layers": _with_prefix,
    },
)

KINDS = {
    "class-token": VIT,
    "registers": replace(
        VIT,
        make=lambda: _vit(reg_tokens=4, init_values=0.5, qk_norm=True, no_embed_class=True, pre_norm=True),
        prefix=5,
    ),
    "average": replace(VIT, make=lambda: _vit(class_token=False, global_pool="avg"), prefix=0),
    "average-with-prefix": replace(VIT, make=lambda: _vit(global_pool="avg", pool_include_prefix=True)),
    "average-and-largest": replace(VIT, make=lambda: _vit(global_pool="avgmax")),
    "attention-pooling": replace(VIT, make=lambda: _vit(class_token=False, global_pool="map"), prefix=0),
    "no-pooling": replace(VIT, make=lambda: _vit(global_pool="", num_classes=0)),
    "distilled": replace(
        VIT, make=lambda: deit.VisionTransformerDistilled(**SIZES, mlp_ratio=2, num_classes=5), prefix=2
    ),
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


def test_layers_that_are_left_out_report_those_that_ran() -> None:
    encoder = tiny_encoders.randomised(_vit())
    by_hand = tiny_encoders.merged_by_hand(replace(VIT, methods={"": _until_second}), encoder, "", MERGING, images())
    with dymu.apply(encoder, merge=ThresholdMerge(MERGING)) as handle:
        outputs = _until_second(encoder, images())
        assert handle.last.layers == [list(counts) for counts in zip(*by_hand.layers, strict=True)]
        assert len(handle.last.layers) == 2
    for output, expected in zip(outputs, by_hand.outputs, strict=True):
        assert tiny_encoders.apart(output, expected) < 1e-4


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda: _vit(block_fn=vision_transformer.ResPostBlock), "ResPostBlock"),
        (lambda: _vit(block_fn=vision_transformer.ParallelScalingBlock), "ParallelScalingBlock"),
        (lambda: _vit(scale_attn_norm=True), "layer 0"),
        (lambda: timm.create_model("eva02_tiny_patch14_224", img_size=28, depth=1), "timm.Eva"),
        (lambda: timm.create_model("naflexvit_base_patch16_gap", embed_dim=32, depth=1, num_heads=2), "timm.NaFlexVit"),
        (lambda: timm.create_model("resnet10t"), "timm.ResNet"),
    ],
)
def test_what_is_not_described_is_refused(make: Any, part: str) -> None:
    encoder = tiny_encoders.randomised(make())
    with pytest.raises(UnsupportedModel, match=part):
        dymu.apply(encoder, merge=ThresholdMerge(MERGING))


def test_dropped_patches_are_refused_while_they_are_dropped() -> None:
    encoder = tiny_encoders.randomised(_vit(patch_drop_rate=0.5))
    assert isinstance(encoder.patch_drop, PatchDropout)
    with dymu.apply(encoder, merge=ThresholdMerge(MERGING)):
        encoder(images())
        encoder.train()
        with pytest.raises(UnsupportedModel, match="patch dropout"):
            encoder(images())


def test_pictures_that_the_encoder_pads_are_refused() -> None:
    encoder = tiny_encoders.randomised(
        _vit(class_token=False, global_pool="avg", dynamic_img_size=True, dynamic_img_pad=True)
    )
    with dymu.apply(encoder, merge=ThresholdMerge(MERGING)) as handle:
        encoder(images()[..., :-PATCH, :])
        assert handle.last.items[0].grids[0].shape == (SIDE // PATCH - 1, SIDE // PATCH)
        with pytest.raises(UnsupportedModel, match="whole patches"):
            encoder(images()[..., :-1, :])


def test_masks_and_checkpointing_are_refused() -> None:
    encoder = tiny_encoders.randomised(_vit())
    tokens = 1 + VIT.patches
    with dymu.apply(encoder, merge=ThresholdMerge(MERGING)):
        shows_all = encoder(images(), attn_mask=torch.ones(tokens, tokens, dtype=torch.bool))
        assert torch.equal(shows_all, encoder(images()))
        with pytest.raises(UnsupportedModel, match="attn_mask"):
            encoder(images(), attn_mask=torch.ones(tokens, tokens, dtype=torch.bool).tril())
        with pytest.raises(UnsupportedModel, match="is_causal"):
            encoder(images(), is_causal=True)
        encoder.set_grad_checkpointing()
        with torch.enable_grad(), pytest.raises(UnsupportedModel, match="checkpointing"):
            encoder(images())
