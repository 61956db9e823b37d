"""Tiny random vision encoders by themselves, and merging in them by their own code and a mean over each group."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionTransformer
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionTransformer

import dymu
from dymu.families.resolve import find
from dymu.hooks.replaced import Method
from dymu.reducers import ThresholdMerge

LAYERS, SIDE, PATCH = 3, 32, 4
"""Of each encoder; pixels of a picture and of a patch."""
PATCHES = (SIDE // PATCH) ** 2

MERGING = (0.85, 2.0, 0.8)
"""Thresholds at which pictures merge to different numbers of tokens; the layer in the middle does not merge."""


@dataclass(frozen=True)
class Kind:
    """An encoder, and where it keeps what merging needs.

    Attributes:
        make: the encoder, of random weights.
        layers, norm1, norm2: paths.
        keys: a layer and its input after `norm1`, to the keys [1, T, C] of its attention.
        prefix: class and register tokens.
        methods: what it can be asked: from the encoder and pixels to tensors.
        heads: of a layer's attention.
        side: pixels of a picture.
        patch: pixels of a patch.
    """

    make: Callable[[], nn.Module]
    layers: str
    norm1: str
    norm2: str
    keys: Callable[[Any, Tensor], Tensor]
    prefix: int
    methods: dict[str, Callable[[Any, Tensor], Sequence[Tensor]]]
    heads: int = 2
    side: int = SIDE
    patch: int = PATCH

    @property
    def patches(self) -> int:
        return (self.side // self.patch) ** 2


def randomised(encoder: nn.Module) -> nn.Module:
    """The same, with random numbers in what begins as 0 or 1."""
    for parameter in encoder.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return encoder.eval().requires_grad_(False)


def images(side: int = SIDE) -> Tensor:
    """[3, 3, side, side]: the same smooth picture, nothing of it, half of it and all of it noisy."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.linspace(0, 3, side)
    plain = torch.stack([(rows[:, None] * (1 + channel) + rows).sin() for channel in range(3)])
    noise = torch.randn(3, 3, side, side, generator=generator)
    noisy = (torch.arange(side) < torch.arange(3)[:, None] * side // 2)[:, None, None]
    return torch.where(noisy, noise, plain)


def noisy_pictures() -> list[Image.Image]:
    """Eight, of ever finer noise."""
    numbers = np.random.default_rng(0)
    sides = range(2, 40, 5)
    return [Image.fromarray(numbers.integers(0, 256, (side, side, 3), np.uint8)).resize((40, 40)) for side in sides]


@dataclass
class ByHand:
    """What merging gives, one picture at a time.

    Attributes:
        outputs: what the method gave, float64, of all pictures.
        groups: for each picture the leaders of its patches after the last layer.
        layers: the patches left after each layer, of each picture.
    """

    outputs: list[Tensor]
    groups: list[list[int]] = field(default_factory=list)
    layers: list[list[int]] = field(default_factory=list)


def merged_by_hand(kind: Kind, encoder: nn.Module, method: str, thresholds: Sequence[float], pixels: Tensor) -> ByHand:
    """Run an encoder's own method on each picture in float64, with merging by hooks.

    All patches pass the encoder's layers. Between attention and MLP, those of a group are replaced by their mean, as
    are the angles by which a layer rotates them: attention to a merged token of size N is attention to N alike ones.
    """
    whole, by_hand = copy.deepcopy(encoder).double(), ByHand([])
    outputs = []
    for picture in pixels.double():
        run = _Run(kind, thresholds)
        hooks = run.hang_into(whole)
        outputs.append(kind.methods[method](whole, picture[None]))
        for hook in hooks:
            hook.remove()
        by_hand.groups.append(run.group)
        by_hand.layers.append(run.counts)
    by_hand.outputs = [torch.cat(parts) for parts in zip(*outputs, strict=True)]
    return by_hand


class _Run:
    def __init__(self, kind: Kind, thresholds: Sequence[float]) -> None:
        self.kind, self.thresholds = kind, thresholds
        self.group: list[int] = []
        self.order: list[int] = []
        self.counts: list[int] = []
        self.key = self.correction = torch.empty(0)

    def hang_into(self, encoder: nn.Module) -> list[Any]:
        hooks = []
        for index, layer in enumerate(find(encoder, self.kind.layers)):
            hooks += [
                layer.register_forward_pre_hook(self.before_layer, with_kwargs=True),
                find(layer, self.kind.norm1).register_forward_hook(self.after_norm1(layer)),
                find(layer, self.kind.norm2).register_forward_pre_hook(self.before_norm2(index)),
                layer.register_forward_hook(self.after_layer, prepend=True),
            ]
        return hooks

    def share(self) -> Tensor:
        """[N, N], which part of every patch each one gets."""
        group = torch.tensor(self.group)
        same = (group == group[:, None]).double()
        return same / same.sum(1, keepdim=True)

    def averaged(self, x: Tensor) -> Tensor:
        """Of [1, prefix + N, C]."""
        return torch.cat((x[:, : self.kind.prefix], self.share() @ x[:, self.kind.prefix :]), 1)

    def before_layer(self, _layer: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if not self.group:
            self.group = list(range(args[0].shape[1] - self.kind.prefix))
            self.order = list(self.group)
        if "position_embeddings" in kwargs:
            angles = tuple(self.share() @ part.double() for part in kwargs["position_embeddings"])
            kwargs = {**kwargs, "position_embeddings": angles}
        return args, kwargs

    def after_norm1(self, layer: nn.Module) -> Method:
        def note(_norm: Any, _args: Any, output: Tensor) -> None:
            keys = self.kind.keys(layer, output)[0, self.kind.prefix :]
            self.key = keys.unflatten(-1, (self.kind.heads, -1)).mean(1)

        return note

    def before_norm2(self, index: int) -> Method:
        def merge(_norm: Any, args: Any) -> Any:
            apart = (self.averaged(args[0]) - args[0]).abs().max()
            assert apart <= 1e-9 * args[0].abs().max(), f"members of one group part in the attention of layer {index}"
            if index < len(self.thresholds) and self.thresholds[index] <= 1:
                self.merge(self.thresholds[index])
            self.counts.append(len(self.order))
            self.correction = self.averaged(args[0]) - args[0]
            return (args[0] + self.correction,)

        return merge

    def after_layer(self, _layer: Any, _args: Any, output: Tensor) -> Tensor:
        """The residual goes around the norm, where the mean was taken."""
        return output + self.correction

    def merge(self, threshold: float) -> None:
        """Each patch at an even place into the most similar one at an odd place."""
        metric = nn.functional.normalize(self.key, dim=-1)
        similarity = (metric @ metric.T).tolist()
        even = [patch for place, patch in enumerate(self.order, self.kind.prefix) if place % 2 == 0]
        odd = [patch for place, patch in enumerate(self.order, self.kind.prefix) if place % 2 == 1]
        into = {}
        for patch in even:
            best = max(odd, key=similarity[patch].__getitem__)
            if similarity[patch][best] > threshold:
                into[patch] = best
        self.group = [into.get(patch, patch) for patch in self.group]
        self.order = [patch for patch in even if patch not in into] + odd


SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "patch_size": PATCH}


def _clip(**more: Any) -> Any:
    return transformers.CLIPVisionConfig(**SIZES, intermediate_size=48, image_size=SIDE, **more)


def _everything(encoder: Any, pixels: Tensor, **named: Tensor) -> list[Tensor]:
    output = encoder(pixel_values=pixels, **named, output_hidden_states=True)
    return [output.pooler_output, output.last_hidden_state, *output.hidden_states]


def _features(encoder: Any, pixels: Tensor) -> list[Tensor]:
    output = encoder(pixel_values=pixels, output_hidden_states=True)
    return [output.last_hidden_state, *output.hidden_states]


def _projected(encoder: Any, pixels: Tensor) -> list[Tensor]:
    output = encoder(pixel_values=pixels)
    return [output.image_embeds, output.last_hidden_state]


def _logits(encoder: Any, pixels: Tensor) -> list[Tensor]:
    return [encoder(pixel_values=pixels).logits]


def _maps(encoder: Any, pixels: Tensor) -> list[Tensor]:
    return list(encoder(pixel_values=pixels).feature_maps)


def patches_of(pixels: Tensor) -> Tensor:
    """[B, N, PATCH * PATCH * 3] of [B, 3, rows, columns], as Siglip2's processor makes them."""
    cut = pixels.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)
    return cut.permute(0, 2, 3, 4, 5, 1).flatten(1, 2).flatten(2)


def _cut(encoder: Any, pixels: Tensor) -> list[Tensor]:
    patches = patches_of(pixels)
    shapes = torch.tensor([[SIDE // PATCH] * 2] * len(pixels))
    present = torch.ones(patches.shape[:2], dtype=torch.int64)
    return _everything(encoder, patches, pixel_attention_mask=present, spatial_shapes=shapes)


def _cut_logits(encoder: Any, pixels: Tensor) -> list[Tensor]:
    shapes = torch.tensor([[SIDE // PATCH] * 2] * len(pixels))
    return [encoder(patches_of(pixels), pixel_attention_mask=None, spatial_shapes=shapes).logits]


TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}

CLIP = Kind(
    make=lambda: transformers.CLIPVisionModel(_clip()),
    layers="encoder.layers",
    norm1="layer_norm1",
    norm2="layer_norm2",
    keys=lambda layer, x: layer.self_attn.k_proj(x),
    prefix=1,
    methods={"forward": _everything},
)

CLIP_WITH_PROJECTION = replace(
    CLIP,
    make=lambda: transformers.CLIPVisionModelWithProjection(_clip(projection_dim=8)),
    layers="vision_model.encoder.layers",
    methods={"forward": _projected},
)

SIGLIP = replace(
    CLIP,
    make=lambda: transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(**SIZES, intermediate_size=48, image_size=SIDE)
    ),
    prefix=0,
)

SIGLIP2 = replace(
    SIGLIP,
    make=lambda: transformers.Siglip2VisionModel(
        transformers.Siglip2VisionConfig(**SIZES, intermediate_size=48, num_patches=PATCHES)
    ),
    methods={"forward": _cut},
)

IDEFICS3 = replace(
    SIGLIP,
    make=lambda: Idefics3VisionTransformer(
        transformers.Idefics3VisionConfig(**SIZES, intermediate_size=48, image_size=SIDE)
    ),
    methods={"forward": _features},
)

SMOLVLM = replace(
    IDEFICS3,
    make=lambda: SmolVLMVisionTransformer(
        transformers.SmolVLMVisionConfig(**SIZES, intermediate_size=48, image_size=SIDE)
    ),
)

SIGLIP_CLASSIFIER = replace(
    SIGLIP,
    make=lambda: transformers.SiglipForImageClassification(
        transformers.SiglipConfig(
            vision_config={**SIZES, "intermediate_size": 48, "image_size": SIDE}, text_config=TEXT
        )
    ),
    layers="vision_model.encoder.layers",
    methods={"forward": _logits},
)

SIGLIP2_CLASSIFIER = replace(
    SIGLIP2,
    make=lambda: transformers.Siglip2ForImageClassification(
        transformers.Siglip2Config(
            vision_config={**SIZES, "intermediate_size": 48, "num_patches": PATCHES}, text_config=TEXT
        )
    ),
    layers="vision_model.encoder.layers",
    methods={"forward": _cut_logits},
)

DINOV2 = Kind(
    make=lambda: transformers.Dinov2Model(transformers.Dinov2Config(**SIZES, image_size=SIDE, mlp_ratio=2)),
    layers="encoder.layer",
    norm1="norm1",
    norm2="norm2",
    keys=lambda layer, x: layer.attention.k_proj(x),
    prefix=1,
    methods={"forward": _everything},
)

DINOV2_CLASSIFIER = replace(
    DINOV2,
    make=lambda: transformers.Dinov2ForImageClassification(
        transformers.Dinov2Config(**SIZES, image_size=SIDE, mlp_ratio=2, num_labels=5)
    ),
    layers="dinov2.encoder.layer",
    methods={"forward": _logits},
)

DINOV2_BACKBONE = replace(
    DINOV2,
    make=lambda: transformers.Dinov2Backbone(
        transformers.Dinov2Config(**SIZES, image_size=SIDE, mlp_ratio=2, out_features=["stage1", "stage3"])
    ),
    methods={"forward": _maps},
)

DINOV2_WITH_REGISTERS = replace(
    DINOV2,
    make=lambda: transformers.Dinov2WithRegistersModel(
        transformers.Dinov2WithRegistersConfig(**SIZES, image_size=SIDE, mlp_ratio=2, num_register_tokens=4)
    ),
    prefix=5,
)

DINOV3 = replace(
    DINOV2,
    make=lambda: transformers.DINOv3ViTModel(
        transformers.DINOv3ViTConfig(**SIZES, intermediate_size=48, image_size=SIDE, num_register_tokens=3)
    ),
    layers="model.layer",
    prefix=4,
)

DINOV2_WITH_REGISTERS_CLASSIFIER = replace(
    DINOV2_WITH_REGISTERS,
    make=lambda: transformers.Dinov2WithRegistersForImageClassification(
        transformers.Dinov2WithRegistersConfig(**SIZES, image_size=SIDE, mlp_ratio=2, num_register_tokens=4)
    ),
    layers="dinov2_with_registers.encoder.layer",
    methods={"forward": _logits},
)

DINOV3_BACKBONE = replace(
    DINOV3,
    make=lambda: transformers.DINOv3ViTBackbone(
        transformers.DINOv3ViTConfig(
            **SIZES, intermediate_size=48, image_size=SIDE, num_register_tokens=3, out_features=["stage1", "stage3"]
        )
    ),
    methods={"forward": _maps},
)

DINOV3_GATED = replace(
    DINOV3,
    make=lambda: transformers.DINOv3ViTModel(
        transformers.DINOv3ViTConfig(
            **SIZES, intermediate_size=48, image_size=SIDE, num_register_tokens=0, use_gated_mlp=True
        )
    ),
    prefix=1,
)

KINDS = {
    "clip": CLIP,
    "clip-with-projection": CLIP_WITH_PROJECTION,
    "siglip": SIGLIP,
    "siglip2": SIGLIP2,
    "siglip-classifier": SIGLIP_CLASSIFIER,
    "siglip2-classifier": SIGLIP2_CLASSIFIER,
    "idefics3": IDEFICS3,
    "smolvlm": SMOLVLM,
    "dinov2": DINOV2,
    "dinov2-classifier": DINOV2_CLASSIFIER,
    "dinov2-backbone": DINOV2_BACKBONE,
    "dinov2-with-registers": DINOV2_WITH_REGISTERS,
    "dinov2-with-registers-classifier": DINOV2_WITH_REGISTERS_CLASSIFIER,
    "dinov3": DINOV3,
    "dinov3-backbone": DINOV3_BACKBONE,
    "dinov3-gated": DINOV3_GATED,
}


def apart(x: Tensor, expected: Tensor) -> float:
    """Of the largest magnitude expected."""
    assert x.shape == expected.shape
    return float((x.double() - expected.double()).abs().max() / expected.abs().max())


def check_by_hand(kind: Kind, encoder: nn.Module) -> None:
    """Every method of the encoder gives what merging by hand gives, and the report tells what merged."""
    pixels = images(kind.side)
    for name, method in kind.methods.items():
        by_hand = merged_by_hand(kind, encoder, name, MERGING, pixels)
        with dymu.apply(encoder, merge=ThresholdMerge(MERGING)) as handle:
            outputs = method(encoder, pixels)
            assert len(set(handle.last.kept)) == len(pixels), "all pictures merge alike, which tests less"
            assert handle.last.kept == [len(set(group)) for group in by_hand.groups]
            assert handle.last.layers == [list(counts) for counts in zip(*by_hand.layers, strict=True)]
            for number, group in enumerate(by_hand.groups):
                leaders = [group.index(patch) for patch in group]
                assert handle.last.items[number].leaders.tolist() == leaders
        assert len(outputs) == len(by_hand.outputs)
        for output, expected in zip(outputs, by_hand.outputs, strict=True):
            assert apart(output, expected) < 1e-4, name


def check_untouched(kind: Kind, encoder: nn.Module) -> None:
    """With thresholds above 1 nothing changes; nor behind the handle's end, bit by bit."""
    pixels = images(kind.side)
    for method in kind.methods.values():
        before = method(encoder, pixels)
        with dymu.apply(encoder, merge=ThresholdMerge((2.0,) * LAYERS)) as handle:
            for output, expected in zip(method(encoder, pixels), before, strict=True):
                assert apart(output, expected) < 1e-5
            assert handle.last.kept == handle.last.original == [kind.patches] * len(pixels)
        assert all(map(torch.equal, method(encoder, pixels), before))
    assert dymu.handle_of(encoder) is None


def check_alone(kind: Kind, encoder: nn.Module) -> None:
    """Beside a picture of NaN, each picture gets what it gets alone."""
    pixels = images(kind.side)
    beside = torch.cat((pixels, torch.full_like(pixels[:1], torch.nan)))
    with dymu.apply(encoder, merge=ThresholdMerge(MERGING)) as handle:
        for method in kind.methods.values():
            together = method(encoder, beside)
            kept = handle.last.kept
            for number, picture in enumerate(pixels):
                alone = method(encoder, picture[None])
                assert handle.last.kept == kept[number : number + 1]
                for output, expected in zip(together, alone, strict=True):
                    assert apart(output[number : number + 1], expected) < 1e-4
