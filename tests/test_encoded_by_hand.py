"""Whether what the contract compares merging with is itself right: against the library for the families that it had
first, and against loops and the stock model for encoders of every kind."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dymu
import encoded_by_hand as by_hand
import tiny
import tiny_families
from dymu.families import FAMILIES
from dymu.reducers import ThresholdMerge
from encoded_by_hand import Encoded, Encoder, Picture, encoded_by_hand
from test_layouts import Photo, Row, Video, scene

NOTHING = (2.0,) * tiny.LAYERS
SOME = ((0.9, 0.97, 2.0, 0.9), (0.3,) * tiny.LAYERS, (-1.0,) * tiny.LAYERS, (2.0, 0.5, -1.0))
ROUNDING = 1e-6
"""For what differs by rounding in float64, where transformers computes some norms and rotations in float32."""

# ----------------------------------------------------------------------------------------------- against the library

KINDS = [
    *((tower, "llama", "llava") for tower in tiny.TOWERS),
    *((tower, "llama", "vipllava") for tower in tiny.TOWERS),
    *(("clip", "llama", family) for family in tiny.ANYRES),
    *(("siglip", "llama", family) for family in tiny.ANYRES),
]


def alike(features: Tensor) -> Tensor:
    """int64 [N], for every token the first one with the same features."""
    return (torch.cdist(features, features) <= ROUNDING * features.abs().max()).int().argmax(1)


def check(model: Any, thresholds: Sequence[float], modality: str = "image", **inputs: Any) -> None:
    """Features, groups and counts are the library's."""
    with dymu.apply(model, merge=ThresholdMerge(tuple(thresholds))) as handle:
        features = tiny.features_in(model(**inputs), modality)
        items = [item for item in handle.last.items if item.video == (modality == "video")]
    expected = encoded_by_hand(model, thresholds, modality=modality, **inputs)
    assert features is not None
    tiny.close(features.double(), expected.features)
    layers = torch.cat([item.kept_by_layer for item in items], 1)
    prefix = layers[0, 0] - expected.counts[0][0]
    assert (layers - prefix).tolist() == expected.counts
    start = 0
    for item in items:
        leaders = alike(expected.features[start : start + len(item.leaders)])
        assert torch.equal(leaders[item.patch], item.leaders[item.patch])
        start += len(item.leaders)
    assert start == len(features)


@pytest.mark.parametrize("thresholds", [NOTHING, *SOME])
@pytest.mark.parametrize("name", KINDS, ids="-".join)
def test_the_library_says_the_same(name, thresholds):
    model = tiny.llava(*name)
    check(model, thresholds, **tiny.asked(model, images=2))


@pytest.mark.parametrize("layer", [1, 3, -1])
def test_layers_that_the_language_model_does_not_read_merge_nothing(layer):
    model = tiny.llava(layer=layer)
    check(model, SOME[0], **tiny.asked(model))


def test_the_first_patch_stands_for_itself_where_it_is_dropped():
    model = tiny.llava("siglip", strategy="default")
    check(model, SOME[1], **tiny.asked(model))


ROWS: list[Row] = [(3, Photo(40, 80, 1), 4), (2, Photo(28, 29, 7), Photo(84, 60, 2), 3)]
FILMS: list[Row] = [(3, Video(3, 1), 4), (2, Photo(50, 30, 2), Video(3, 4), 2)]


@pytest.mark.parametrize(
    "name", [("clip", "llama", "llava_next"), ("siglip", "qwen2", "llava_onevision")], ids="-".join
)
def test_the_library_says_the_same_of_tiles(name):
    model = tiny.llava(*name)
    check(model, SOME[0], **scene(model, ROWS))


@pytest.mark.parametrize(
    "name", [("dinov2", "llama", "llava_next_video"), ("siglip", "qwen2", "llava_onevision")], ids="-".join
)
@pytest.mark.parametrize("modality", ["image", "video"])
def test_the_library_says_the_same_of_frames(name, modality):
    model = tiny.llava(*name)
    check(model, SOME[0], modality, **scene(model, FILMS))


# --------------------------------------------------------------------------------------------------- every other kind

SIGLIP = Encoder("model.vision_model", "encoder.layers", "layer_norm2", "self_attn.k_proj", heads=4)
INTERNVIT = Encoder("model.vision_tower", "encoder.layer", "layernorm_after", "attention.k_proj", heads=4, prefix=1)
QWEN = Encoder("model.visual", "blocks", "norm2", "attn.qkv", heads=4, fused=True, arrangement="packed")
SIGLIP_TOWER = replace(SIGLIP, tower="model.vision_tower")
PIXTRAL = Encoder(
    "model.vision_tower", "transformer.layers", "ffn_norm", "attention.k_proj", heads=4, arrangement="raster"
)
ENCODERS = {
    "deepseek_vl": SIGLIP,
    "janus": SIGLIP,
    "internvl": INTERNVIT,
    "qianfan_ocr": replace(INTERNVIT, layers="layers"),
    "idefics3": SIGLIP,
    "smolvlm": SIGLIP,
    "ovis2": Encoder("model.vision_tower", "transformer.encoder.layers", "rms_norm2", "attention.k_proj", heads=4),
    "aya_vision": SIGLIP_TOWER,
    "gemma3": SIGLIP_TOWER,
    "paligemma": SIGLIP_TOWER,
    "qwen2_vl": QWEN,
    "qwen2_5_vl": QWEN,
    "qwen3_vl": QWEN,
    "qwen3_5": QWEN,
    "glm4v": QWEN,
    "glm_ocr": QWEN,
    "exaone4_5": QWEN,
    "hyperclovax_vision_v2": replace(QWEN, tower="model.vision_model"),
    "paddleocr_vl": replace(SIGLIP, tower="model.visual.vision_model", arrangement="raster"),
    "mistral3": PIXTRAL,
    "llava+pixtral": PIXTRAL,
    "lighton_ocr": replace(PIXTRAL, tower="model.vision_encoder"),
    "video_llama_3": replace(SIGLIP, arrangement="packed"),
}
"""One of each kind, but for the unit, which `Case` adds."""
ROTARY = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm_ocr", "exaone4_5", "paddleocr_vl", "mistral3", "video_llama_3")
WINDOWED = ("qwen2_5_vl", "exaone4_5", "hyperclovax_vision_v2")


@functools.cache
def built(name: str) -> Any:
    """The tests only copy the models, so they may share them."""
    return tiny.build(name)


@functools.cache
def image(height: int, width: int, seed: int = 0) -> Tensor:
    """[3, height, width], fields of one colour with a little noise."""
    generator = torch.Generator().manual_seed(seed)
    fields = nn.functional.interpolate(torch.randn(1, 3, 3, 4, generator=generator), size=(height, width))[0]
    return fields + 0.1 * torch.randn(3, height, width, generator=generator)


@dataclass(frozen=True)
class Case:
    """A model with some images."""

    name: str

    @property
    def family(self) -> tiny_families.TinyFamily:
        return tiny_families.FAMILIES[self.name]

    @property
    def encoder(self) -> Encoder:
        side = self.family.cell // tiny_families.PATCH
        return replace(ENCODERS[self.name], unit=(side, side))

    @property
    def images(self) -> list[Tensor]:
        cell, size = self.family.cell, self.family.size
        sizes = (
            [(5 * cell, 7 * cell), (6 * cell, 6 * cell), (3 * cell, 10 * cell)] if self.family.any_size else [size] * 3
        )
        return [image(*size, seed) for seed, size in enumerate(sizes)]

    @property
    def units(self) -> list[int]:
        """Of each image."""
        return [math.prod(side // self.family.cell for side in one.shape[1:]) for one in self.images]

    def shown(self, images: Sequence[Tensor] | None = None) -> dict[str, Any]:
        """What the model takes to see these images in one prompt."""
        images = self.images if images is None else images
        return self.family.show(images, [len(images)])

    def encoded(self, thresholds: Sequence[float], images: Sequence[Tensor] | None = None) -> Encoded:
        return encoded_by_hand(built(self.name), thresholds, encoder=self.encoder, **self.shown(images))


@pytest.fixture(params=[name for name in ENCODERS if tiny_families.FAMILIES[name].exists])
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def leaders_of(encoded: Encoded, layer: int = -1) -> Tensor:
    """int64 [units of all pictures], what `alike` answers where no two groups are alike."""
    pictures, start = [], 0
    for leaders in encoded.leaders[layer]:
        pictures.append(leaders + start)
        start += len(leaders)
    return torch.cat(pictures)


def apart(encoded: Encoded, other: Encoded) -> float:
    """The largest difference, as part of the largest feature."""
    return float((encoded.features - other.features).abs().max() / encoded.features.abs().max())


def test_nothing_merged_is_the_stock_model(case):
    encoded = case.encoded(NOTHING)
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in case.shown().items()}
    stock = tiny.features_of(copy.deepcopy(built(case.name)).double(), **inputs)
    features = torch.cat([item.flatten(0, -2) for item in stock.pooler_output])
    tiny.close(encoded.features, features, part=ROUNDING)
    assert encoded.counts == [case.units] * tiny.LAYERS


def test_the_model_is_left_as_it_was(case):
    case.encoded(SOME[0])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in built(case.name).modules())


@pytest.mark.parametrize("thresholds", SOME)
def test_members_of_a_group_share_their_features_and_others_do_not(case, thresholds):
    encoded = case.encoded(thresholds)
    assert torch.equal(alike(encoded.features), leaders_of(encoded))


def test_a_layer_merges_where_its_threshold_lets_it(case):
    first, second, third, last = (sum(counts) for counts in case.encoded(SOME[0]).counts)
    assert sum(case.units) >= first >= second == third >= last
    assert sum(case.units) > last


def test_all_that_may_merge_does_below_every_similarity(case):
    """In a layer with windows those at the odd places of each are left, or the only one: at least a third."""
    before, prefix = case.units, case.encoder.prefix
    for layer, after in enumerate(case.encoded((-1.0,) * tiny.LAYERS).counts):
        odd = [sum(place % 2 for place in range(prefix, prefix + units)) for units in before]
        if case.name in WINDOWED and layer % 2 == 0:
            assert all(most > left >= most / 3 for most, left in zip(before, after, strict=True))
        else:
            assert after == odd
        before = after


@pytest.mark.parametrize("thresholds", SOME[:2])
def test_a_picture_gets_what_it_gets_alone(case, thresholds):
    encoded, start = case.encoded(thresholds), 0
    for number, one in enumerate(case.images):
        alone = case.encoded(thresholds, [one])
        assert [layer[0] for layer in alone.counts] == [layer[number] for layer in encoded.counts]
        assert torch.equal(alone.leaders[-1][0], encoded.leaders[-1][number])
        end = start + len(alone.features)
        tiny.close(encoded.features[start:end], alone.features, part=ROUNDING)
        start = end


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_frames_of_a_video_are_pictures(name):
    case = Case(name)
    frames = [image(40, 56, seed) for seed in range(3)]
    images = case.shown(frames)
    video = {"pixel_values_videos": images["pixel_values"], "video_grid_thw": torch.tensor([[3, 10, 14]])}
    encoded = encoded_by_hand(built(name), SOME[0], encoder=case.encoder, modality="video", **video)
    expected = case.encoded(SOME[0], frames)
    assert torch.equal(leaders_of(encoded), leaders_of(expected))
    assert torch.equal(encoded.features, expected.features)


def test_features_of_earlier_layers_are_in_the_groups_of_theirs():
    encoded, vision = Case("qwen3_vl").encoded(SOME[0]), built("qwen3_vl").config.vision_config
    stages = zip(vision.deepstack_visual_indexes, encoded.output.deepstack_features, strict=True)
    for layer, features in stages:
        assert torch.equal(alike(torch.cat(list(features))), leaders_of(encoded, layer))
    assert not torch.equal(leaders_of(encoded, vision.deepstack_visual_indexes[0]), leaders_of(encoded))


def test_the_library_describes_the_same_encoder(case):
    model = built(case.name)
    if model.config.model_type not in FAMILIES:
        pytest.skip("the library does not describe it")
    encoded, expected = encoded_by_hand(model, SOME[0], **case.shown()), case.encoded(SOME[0])
    assert torch.equal(leaders_of(encoded), leaders_of(expected))
    assert torch.equal(encoded.features, expected.features)


# ---------------------------------------------------------------------------------------------------------- wrong rules


@pytest.mark.parametrize("name", ROTARY)
def test_the_angles_of_the_first_member_are_noticed(name, monkeypatch):
    expected = Case(name).encoded(SOME[0])
    monkeypatch.setattr(by_hand, "mean_angles", lambda share, angles: angles.double()[share.argmax(1)])
    assert apart(Case(name).encoded(SOME[0]), expected) > 1e-3


@pytest.mark.parametrize("name", ROTARY)
def test_members_with_angles_of_their_own_are_noticed(name, monkeypatch):
    monkeypatch.setattr(by_hand, "mean_angles", lambda share, angles: angles.double())
    with pytest.raises(AssertionError, match="members of one group differ behind the attention of layer 1"):
        Case(name).encoded(SOME[0])


def test_partners_from_other_windows_are_noticed(monkeypatch):
    expected, merge = Case("qwen2_5_vl").encoded(SOME[0]), Picture.merge
    monkeypatch.setattr(Picture, "merge", lambda self, key, threshold, windowed: merge(self, key, threshold, False))
    assert apart(Case("qwen2_5_vl").encoded(SOME[0]), expected) > 1e-3


def test_a_class_token_that_does_not_count_is_noticed(monkeypatch):
    expected, merge = Case("internvl").encoded(SOME[0]), Picture.merge

    def uncounted(picture: Picture, *args: Any) -> None:
        picture.prefix = 0
        merge(picture, *args)

    monkeypatch.setattr(Picture, "merge", uncounted)
    assert apart(Case("internvl").encoded(SOME[0]), expected) > 1e-3


# ------------------------------------------------------------------------------------------------------------- in loops


@dataclass
class Unit:
    """A merged unit: its patches [4, C], the cosines and sines of each [4, D / 2], members and window."""

    x: Tensor
    cos: Tensor
    sin: Tensor
    members: list[int]
    window: tuple[int, int]


@pytest.mark.parametrize("thresholds", [NOTHING, *SOME, (0.9,) * tiny.LAYERS])
def test_a_loop_over_merged_units_says_the_same(thresholds):
    case = Case("qwen2_5_vl")
    encoded, start = case.encoded(thresholds), 0
    for number, one in enumerate(case.images):
        units = one_by_one(copy.deepcopy(built(case.name)).double(), case.shown([one]), thresholds)
        leaders, features = torch.empty_like(encoded.leaders[-1][number]), {}
        for unit, feature in units:
            leaders[unit.members] = min(unit.members)
            features |= dict.fromkeys(unit.members, feature)
        assert torch.equal(encoded.leaders[-1][number], leaders)
        expected = torch.stack([features[member] for member in range(len(leaders))])
        tiny.close(encoded.features[start : start + len(leaders)], expected, part=ROUNDING)
        start += len(leaders)


def one_by_one(model: Any, inputs: dict[str, Any], thresholds: Sequence[float]) -> list[tuple[Unit, Tensor]]:
    """Merged units and the feature of each, of a Qwen2.5-VL that sees one image: every unit once, with its size, and
    one query after the other."""
    tower, heads = model.model.visual, model.config.vision_config.num_heads
    rows, columns = (side // 2 for side in inputs["image_grid_thw"][0, 1:].tolist())
    side = tower.window_size // tower.patch_size // 2
    embedded = tower.patch_embed(inputs["pixel_values"].double()).unflatten(0, (-1, 4))
    size = embedded.shape[-1] // heads
    units = []
    for window, row, column in sorted(
        ((row // side, column // side), row, column) for row in range(rows) for column in range(columns)
    ):
        n = row * columns + column
        places = [(2 * row + i, 2 * column + j) for i in range(2) for j in range(2)]
        turns = [[place * 10000 ** (-4 * f / size) for place in patch for f in range(size // 4)] for patch in places]
        angles = torch.tensor(turns, dtype=torch.float64)
        units.append(Unit(embedded[n], angles.cos(), angles.sin(), [n], window))

    def turned(heads: Tensor, unit: Unit) -> Tensor:
        one, other = heads.chunk(2, -1)
        cos, sin = unit.cos[:, None], unit.sin[:, None]
        return torch.cat((one * cos - other * sin, other * cos + one * sin), -1)

    for index, layer in enumerate(tower.blocks):
        whole = index in model.config.vision_config.fullatt_block_indexes
        parts = [layer.attn.qkv(layer.norm1(unit.x)).view(4, 3, heads, size).unbind(1) for unit in units]
        metric = [normed(key.mean((0, 1))) for _, key, _ in parts]
        keys = [turned(key, unit) for (_, key, _), unit in zip(parts, units, strict=True)]
        attended = []
        for (query, _, _), unit in zip(parts, units, strict=True):
            seen = [n for n, other in enumerate(units) if whole or other.window == unit.window]
            key, value = torch.cat([keys[n] for n in seen]), torch.cat([parts[n][2] for n in seen])
            sizes = torch.tensor([len(units[n].members) for n in seen for _ in range(4)], dtype=torch.float64)
            patches = torch.zeros(4, heads, size, dtype=torch.float64)
            for patch, turn in enumerate(turned(query, unit)):
                for head in range(heads):
                    logits = key[:, head] @ turn[head] / size**0.5 + sizes.log()
                    patches[patch, head] = logits.softmax(0) @ value[:, head]
            attended.append(unit.x + layer.attn.proj(patches.flatten(1)))
        for unit, x in zip(units, attended, strict=True):
            unit.x = x
        threshold = (*thresholds, *NOTHING)[index]
        if threshold <= 1:
            row = [None if whole else unit.window for unit in units]
            place = [row[:n].count(row[n]) for n in range(len(units))]
            joins: dict[int, list[Unit]] = {n: [units[n]] for n in range(len(units)) if place[n] % 2}
            stayed = []
            for n in range(len(units)):
                if place[n] % 2:
                    continue
                best, similarity = None, threshold
                for other in joins:
                    if row[other] == row[n] and float(metric[n] @ metric[other]) > similarity:
                        best, similarity = other, float(metric[n] @ metric[other])
                if best is None:
                    stayed.append(units[n])
                else:
                    joins[best].append(units[n])
            units = stayed + [joined(group) for group in joins.values()]
            units.sort(key=lambda unit: unit.window)
        for unit in units:
            unit.x = unit.x + layer.mlp(layer.norm2(unit.x))
    return [(unit, tower.merger(unit.x)[0]) for unit in units]


def normed(x: Tensor) -> Tensor:
    return x / x.norm()


def joined(group: list[Unit]) -> Unit:
    """One unit of several, in the window of the first."""
    total = sum(len(unit.members) for unit in group)
    x, cos, sin = (
        sum(len(unit.members) * getattr(unit, name) for unit in group) / total for name in ("x", "cos", "sin")
    )
    return Unit(x, cos, sin, [member for unit in group for member in unit.members], group[0].window)
