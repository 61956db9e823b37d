"""The table of model families of `tiny`: what a tiny random model is built from, and how it is shown pictures."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers
from packaging import version
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

VOCAB, PAD, VIDEO_TOKEN, IMAGE_TOKEN = 64, 0, 62, 63
BEGIN, END, ROW_END = 59, 60, 61
"""Stand around an image, and behind each of its rows, where a family has such tokens."""
SIDE, PATCH, LAYERS = 28, 4, 4
PATCHES = (SIDE // PATCH) ** 2

ABILITIES = {
    "one way": "what comes later in a prompt changes nothing of what stands ahead",
    "images on a cache": "a prompt may be read in several calls of which a later one brings another image",
    "chunks": "`generate` may read a prompt in chunks that cut through images",
    "steps back": "a cache can forget its last tokens, as assisted decoding needs it",
    "saves": "its class loads what `save_pretrained` wrote",
    "repeats": "`generate` may give several answers to a prompt that shows an image",
    "repeats several": "it keeps images in order where prompts show several and get several answers",
}
"""What most stock models can do, by the name that `TinyFamily.lacks` calls it."""

Show = Callable[[Sequence[Tensor], Sequence[int]], dict[str, Any]]
"""From pictures [3, height, width] and how many of them each prompt shows to what the model takes of them."""


@dataclass(frozen=True)
class TinyFamily:
    """What a tiny random model of a family is built from, and what it takes to see pictures."""

    vision: Mapping[str, Any]
    text: Mapping[str, Any]
    """Its configs, with a `model_type` where the family leaves that open."""
    show: Show
    more: Mapping[str, Any] = field(default_factory=dict)
    """What else the whole model's config needs."""
    model_type: str | None = None
    """Where the entry is not named after it."""
    size: tuple[int, int] = (48, 48)
    """Height and width that a picture of `SIDE` pixels is resized to."""
    any_size: bool = False
    """Whether pictures of other sizes, in whole cells, are taken as they are."""
    cell: int = 2 * PATCH
    """Pixels on a side of what becomes one image token."""
    prefix: Callable[[Any], int] = lambda model: 0
    """From a model to how many class and register tokens of a picture the language model gets."""
    begin: tuple[int, ...] = (BEGIN,)
    end: tuple[int, ...] = (END,)
    """Ids ahead of an image and behind it."""
    row_end: int | None = None
    """Id behind each row of image tokens."""
    follow: Callable[[Tensor, int], dict[str, Tensor]] = lambda ids, said: {}
    """From ids [B, N], of which the model itself said so many at the end, to what it takes that follows from them."""
    joins_images: bool = False
    """Whether the features of all images of a prompt are one item, in some versions of transformers."""
    processor: tuple[str, Mapping[str, Any]] | None = None
    """Class and arguments of an image processor that makes of photos what `show` makes of pictures."""
    lacks: frozenset[str] = frozenset()
    """Of `ABILITIES`, those that the stock model does not have."""
    gained: Mapping[str, str] = field(default_factory=lambda: {"repeats several": "5.19"})
    """Of `ABILITIES`, those that it has only since some version of transformers."""
    since: str = "5.18"
    """The first version of transformers that has it."""

    @property
    def exists(self) -> bool:
        """Whether this version of transformers has it."""
        return _installed(self.since)

    def can(self, ability: str) -> bool:
        """Whether the stock model has one of `ABILITIES`."""
        assert ability in ABILITIES
        return ability not in self.lacks and _installed(self.gained.get(ability, self.since))


def _installed(since: str) -> bool:
    """Whether transformers is of this version or a later one."""
    return version.parse(transformers.__version__) >= version.parse(since)


def build(
    name: str,
    seed: int = 0,
    *,
    vision: Mapping[str, Any] | None = None,
    text: Mapping[str, Any] | None = None,
    norms: bool = True,
    **more: Any,
) -> Any:
    """A tiny random model of `FAMILIES`.

    Args:
        vision, text, more: instead of what the table says, or beside it.
        norms: whether norms, biases and scales are random too, not what models begin with.
    """
    for part, settings in (("vision_config", vision), ("text_config", text)):
        if settings is not None:
            more[part] = dict(settings)
    config = configured(name, **more)
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            sees_pixels = "patch_embed" in path or "patch_conv" in path
            if parameter.ndim > 1:
                parameter.normal_(0, 0.5 if sees_pixels else parameter.shape[-1] ** -0.5)
            elif norms:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None
    return model


def name_of(model: Any) -> str:
    """The entry that says how this model sees pictures."""
    config = model.config
    with_tower = f"{config.model_type}+{config.vision_config.model_type}"
    return with_tower if with_tower in FAMILIES else str(config.model_type)


def family_of(model: Any) -> TinyFamily:
    return FAMILIES[name_of(model)]


def configured(name: str, **more: Any) -> Any:
    """The config of an entry's model."""
    family = FAMILIES[name]
    settings = {"vision_config": dict(family.vision), "text_config": dict(family.text), **family.more, **more}
    return AutoConfig.for_model(family.model_type or name, **settings)


# ------------------------------------------------------------------------------------------------------- pictures


def squares(pictures: Sequence[Tensor], counts: Sequence[int]) -> dict[str, Any]:
    """Pictures of one size."""
    return {"pixel_values": torch.stack(list(pictures))}


def two_tiles(pictures: Sequence[Tensor], counts: Sequence[int]) -> dict[str, Any]:
    """Pictures pulled to twice their width: the whole, and two tiles of it."""
    square = torch.stack(list(pictures))
    wide = torch.nn.functional.interpolate(square, size=(SIDE, 2 * SIDE), mode="bilinear")
    tiles = torch.stack((square, wide[..., :SIDE], wide[..., SIDE:]), 1)
    return {"pixel_values": tiles, "image_sizes": torch.tensor([[SIDE, 2 * SIDE]] * len(square))}


def by_prompt(pictures: Sequence[Tensor], counts: Sequence[int]) -> dict[str, Any]:
    """Pictures of one size, as many rows as prompts; black ones fill up."""
    pixels = torch.stack(list(pictures))
    rows = pixels.new_zeros(len(counts), max(counts), *pixels.shape[1:])
    for row, own in zip(rows, pixels.split(list(counts)), strict=True):
        row[: len(own)] = own
    return {"pixel_values": rows, "pixel_attention_mask": torch.ones(*rows.shape[:2], *rows.shape[3:])}


def corners(pictures: Sequence[Tensor], counts: Sequence[int]) -> dict[str, Any]:
    """Pictures of any size, each in the upper left corner of the largest."""
    sizes = [tuple(picture.shape[1:]) for picture in pictures]
    height, width = (max(sides) for sides in zip(*sizes, strict=True))
    pixels = pictures[0].new_zeros(len(pictures), 3, height, width)
    for canvas, picture in zip(pixels, pictures, strict=True):
        canvas[:, : picture.shape[1], : picture.shape[2]] = picture
    return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}


def patches(unit: int, frames: int, flat: bool = True) -> Show:
    """Patches of all pictures in one row: square by square of `unit` x `unit`, each patch `frames` times over."""

    def show(pictures: Sequence[Tensor], counts: Sequence[int]) -> dict[str, Any]:
        packed, grids = [], []
        for picture in pictures:
            rows, columns = picture.shape[1] // PATCH, picture.shape[2] // PATCH
            patch = picture.view(3, rows // unit, unit, PATCH, columns // unit, unit, PATCH)
            patch = patch.permute(1, 4, 2, 5, 0, 3, 6).reshape(rows * columns, 3, 1, PATCH, PATCH)
            patch = patch.expand(-1, -1, frames, -1, -1)
            packed.append(patch.flatten(1) if flat else patch.flatten(1, 2))
            grids.append((1, rows, columns))
        return {"pixel_values": torch.cat(packed), "image_grid_thw": torch.tensor(grids)}

    return show


def patches_of_own_unit(pictures: Sequence[Tensor], counts: Sequence[int]) -> dict[str, Any]:
    """Patches of all pictures in one row, of units of one patch."""
    return {**patches(1, 1)(pictures, counts), "image_merge_sizes": torch.ones(len(pictures), dtype=torch.long)}


def tiles_by_prompt(pictures: Sequence[Tensor], counts: Sequence[int]) -> dict[str, Any]:
    """As `by_prompt`, with a mask that says which pictures are there."""
    rows = by_prompt(pictures, counts)["pixel_values"]
    there = torch.arange(rows.shape[1]) < torch.tensor(list(counts))[:, None]
    return {"pixel_values": rows, "pixel_attention_mask": there}


def padded_patches(pictures: Sequence[Tensor], counts: Sequence[int]) -> dict[str, Any]:
    """Patches of each picture and their places (x, y), of empty ones (-1, -1), as many for all."""
    longest = 40 * 3**2
    pixels = pictures[0].new_zeros(len(pictures), longest, 3 * PATCH**2)
    places = torch.full((len(pictures), longest, 2), -1)
    for index, picture in enumerate(pictures):
        rows, columns = picture.shape[1] // PATCH, picture.shape[2] // PATCH
        patch = picture.view(3, rows, PATCH, columns, PATCH).permute(1, 3, 2, 4, 0).flatten(2).flatten(0, 1)
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        pixels[index, : len(patch)] = patch
        places[index, : len(patch)] = torch.stack((x, y), -1).flatten(0, 1)
    return {"pixel_values": pixels, "image_position_ids": places}


# -------------------------------------------------------------------------------------------- what follows from ids


def kinds(ids: Tensor, said: int) -> dict[str, Tensor]:
    """0 of text, 1 of images and 2 of videos."""
    return {"mm_token_type_ids": (ids == IMAGE_TOKEN).long() + 2 * (ids == VIDEO_TOKEN).long()}


def images_both_ways(ids: Tensor, said: int) -> dict[str, Tensor]:
    """1 of images, whose tokens see each other both ways."""
    return {"token_type_ids": (ids == IMAGE_TOKEN).long()}


def prompt_both_ways(ids: Tensor, said: int) -> dict[str, Tensor]:
    """0 of the prompt, which is read both ways, and 1 of what the model said."""
    return {"token_type_ids": (torch.arange(ids.shape[1]) >= ids.shape[1] - said).long().expand_as(ids)}


# ----------------------------------------------------------------------------------------------- parts of the configs

_TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def _decoder(model_type: str, **more: Any) -> dict[str, Any]:
    return {**_TEXT, "head_dim": 8, "model_type": model_type, **more}


DECODERS: dict[str, dict[str, Any]] = {
    "llama": _decoder("llama"),
    "qwen2": _decoder("qwen2"),
    "qwen3": _decoder("qwen3"),
    "mistral": _decoder("mistral", sliding_window=40),
    "gemma": _decoder("gemma"),
    "olmo": _decoder("olmo", clip_qkv=1.5),
    "olmo2": _decoder("olmo2"),
    "granite": _decoder("granite", embedding_multiplier=3.0, attention_multiplier=0.2, residual_multiplier=0.5),
    "phi3": _decoder("phi3"),
    "cohere2": _decoder(
        "cohere2", num_hidden_layers=4, sliding_window=40, layer_types=["sliding_attention", "full_attention"] * 2
    ),
    "smollm3": _decoder("smollm3", no_rope_layers=[1, 0, 1]),
    "gemma2": _decoder("gemma2", sliding_window=40, query_pre_attn_scalar=8, attn_logit_softcapping=2.0),
    "qwen3_moe": _decoder(
        "qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, decoder_sparse_step=1
    ),
}
"""Language models of the LLaVA families."""

_VIT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "patch_size": PATCH,
    "initializer_range": 0.2,
}
_SMALL = {**_VIT, "image_size": SIDE}
_SQUARE = {**_VIT, "image_size": 48}
_LARGE = {**_VIT, "image_size": 80}
_DINOV2 = {
    **{name: _SMALL[name] for name in _SMALL if name != "intermediate_size"},
    "mlp_ratio": 2,
    "layerscale_value": 0.5,
}
TOWERS: dict[str, dict[str, Any]] = {
    "clip": {**_SMALL, "model_type": "clip_vision_model"},
    "siglip": {**_SMALL, "model_type": "siglip_vision_model"},
    "dinov2": {**_DINOV2, "model_type": "dinov2"},
    "dinov2_with_registers": {**_DINOV2, "model_type": "dinov2_with_registers", "num_register_tokens": 3},
}
"""Vision towers of the LLaVA families."""
_QWEN_VIT = {
    "depth": LAYERS,
    "num_heads": 4,
    "patch_size": PATCH,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "initializer_range": 0.2,
}
_QWEN2_5_VIT = {
    **_QWEN_VIT,
    "hidden_size": 32,
    "intermediate_size": 48,
    "out_hidden_size": 32,
    "window_size": 24,
    "fullatt_block_indexes": [1, 3],
}
"""Windows of 3 x 3 units, fewer at an image's edge."""
_PIXTRAL = {**_VIT, "model_type": "pixtral", "image_size": 64}


def _sized(name: str, side: int, **more: Any) -> tuple[str, dict[str, Any]]:
    """An image processor that makes squares of so many pixels."""
    return name, {"size": {"height": side, "width": side}, **more}


def _longest(name: str, side: int, **more: Any) -> tuple[str, dict[str, Any]]:
    """One for pictures of at most so many pixels on a side."""
    return name, {"size": {"longest_edge": side}, **more}


def _patched(name: str, *, unit: int = 2, frames: int = 2, pixels: int = 40**2) -> tuple[str, dict[str, Any]]:
    """One for patches of pictures of any size, of so many pixels at least."""
    return name, {
        "patch_size": PATCH,
        "merge_size": unit,
        "temporal_patch_size": frames,
        "size": {"shortest_edge": pixels, "longest_edge": 4 * pixels},
    }


_QWEN_PROCESSOR = _patched("Qwen2VLImageProcessorPil")
_TILE_PROCESSOR = _sized("GotOcr2ImageProcessorPil", 48)
_IMAGE_ID = {"image_token_id": IMAGE_TOKEN}
_IMAGE_AND_VIDEO_ID = {**_IMAGE_ID, "video_token_id": VIDEO_TOKEN}
_QWEN_IDS = {**_IMAGE_AND_VIDEO_ID, "vision_start_token_id": BEGIN, "vision_end_token_id": END}
_WIDE = (40, 56)


def _axes(*sections: int, **more: Any) -> dict[str, Any]:
    """A text config whose positions have an axis for each section of the angles."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections), **more}
    return {**_TEXT, "rope_parameters": rope}


ANYRES = ("llava_next", "llava_next_video", "llava_onevision")
"""Families that cut an image into tiles. Their tests show images twice as wide as high: two tiles of `SIDE` pixels."""
PINPOINTS = [[rows * SIDE, columns * SIDE] for rows in range(1, 7) for columns in range(1, 7)]


def _prefix_tokens(model: Any) -> int:
    tower, strategy = model.config.vision_config, getattr(model.config, "vision_feature_select_strategy", "default")
    prefix = (tower.model_type != "siglip_vision_model") + getattr(tower, "num_register_tokens", 0)
    return int(prefix) - (strategy == "default")


def _llava(tower: str, decoder: str, *, tiles: bool = False, **more: Any) -> TinyFamily:
    """Text stands right beside an image."""
    if tiles:
        more["image_grid_pinpoints"] = PINPOINTS
    return TinyFamily(
        vision=TOWERS[tower],
        text=DECODERS[decoder],
        more={"image_token_index": IMAGE_TOKEN, "vision_feature_layer": -2, **more},
        show=two_tiles if tiles else squares,
        size=(SIDE, SIDE),
        cell=PATCH,
        prefix=_prefix_tokens,
        begin=(),
        end=(),
    )


_packed = functools.partial(
    TinyFamily,
    more=_IMAGE_AND_VIDEO_ID,
    processor=_QWEN_PROCESSOR,
    show=patches(unit=2, frames=2),
    size=_WIDE,
    any_size=True,
)
"""The patches of all images follow each other, unit by unit."""
_REPEATS_LATE = {"repeats": "5.21", "repeats several": "5.21"}
"""Before, the patches of an image were repeated, not the image."""
_on_axes = functools.partial(_packed, more=_QWEN_IDS, follow=kinds, lacks=frozenset({"images on a cache"}))
"""So do they, and positions have axes, which the stock model cannot tell on a cache."""

_IDEFICS3 = TinyFamily(
    vision=_SQUARE,
    text=_decoder("llama"),
    more={**_IMAGE_ID, "scale_factor": 2, "pad_token_id": PAD},
    processor=_longest("Idefics3ImageProcessorPil", 48, max_image_size={"longest_edge": 48}, do_image_splitting=False),
    show=by_prompt,
    joins_images=True,
)
_QWEN3_VIT = {
    **_QWEN_VIT,
    "hidden_size": 32,
    "intermediate_size": 48,
    "out_hidden_size": 32,
    "num_position_embeddings": 49,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
# The epsilon is large, for norms of next to nothing, of which a random hybrid has many, would blow rounding up.
_QWEN3_5 = _on_axes(
    vision=_QWEN3_VIT,
    text={
        **_axes(2, 1, 1, mrope_interleaved=True, partial_rotary_factor=0.5),
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "head_dim": 16,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "rms_norm_eps": 1e-2,
    },
    lacks=frozenset({"images on a cache", "steps back"}),
    gained=_REPEATS_LATE,
)
_GLM_VIT = {**_QWEN_VIT, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32, "image_size": SIDE}
_GLM4V = _on_axes(
    vision=_GLM_VIT,
    text={**_axes(2, 1, 1, partial_rotary_factor=0.5), "head_dim": 16},
    more={**_IMAGE_AND_VIDEO_ID, "image_start_token_id": BEGIN, "image_end_token_id": END},
    processor=_patched("Glm4vImageProcessorPil", pixels=2 * 40**2),
    lacks=frozenset({"images on a cache", "repeats several"}),
)
_GEMMA3 = TinyFamily(
    vision={**_LARGE, "model_type": "siglip_vision_model"},
    text=_decoder(
        "gemma3_text",
        query_pre_attn_scalar=8,
        sliding_window=24,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
        },
    ),
    more={
        "image_token_index": IMAGE_TOKEN,
        "boi_token_index": BEGIN,
        "eoi_token_index": END,
        "mm_tokens_per_image": 25,
    },
    processor=_sized("Gemma3ImageProcessorPil", 80),
    show=squares,
    size=(80, 80),
    cell=16,
    follow=images_both_ways,
    lacks=frozenset({"images on a cache", "chunks"}),
)
_PALIGEMMA = TinyFamily(
    vision={**TOWERS["siglip"], "projection_dim": 32},
    text=DECODERS["gemma"],
    more={"image_token_index": IMAGE_TOKEN, "projection_dim": 32, "hidden_size": 32, "vocab_size": VOCAB},
    processor=_sized("SiglipImageProcessorPil", SIDE),
    show=squares,
    size=(SIDE, SIDE),
    cell=PATCH,
    begin=(),
    end=(),
    follow=prompt_both_ways,
    lacks=frozenset({"one way", "images on a cache", "chunks"}),
)

FAMILIES: dict[str, TinyFamily] = {
    "llava": _llava("clip", "llama"),
    "vipllava": replace(
        _llava("clip", "llama"), more={"image_token_index": IMAGE_TOKEN, "vision_feature_layers": (-2, 1, 2)}
    ),
    "llava_next": _llava("clip", "mistral", tiles=True),
    "llava_next_video": _llava("dinov2", "llama", tiles=True, video_token_index=VIDEO_TOKEN),
    "llava_onevision": _llava(
        "siglip", "qwen2", tiles=True, video_token_index=VIDEO_TOKEN, vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    ),
    "deepseek_vl": TinyFamily(
        vision=TOWERS["siglip"],
        text=_decoder("llama"),
        more=_IMAGE_ID,
        processor=_sized("DeepseekVLImageProcessorPil", SIDE, min_size=PATCH),
        show=squares,
        size=(SIDE, SIDE),
        cell=PATCH,
    ),
    "janus": TinyFamily(
        vision={**_SMALL, "mlp_ratio": 1.5, "projection_dim": 32, "num_image_tokens": PATCHES},
        text=_decoder("llama"),
        more={
            **_IMAGE_ID,
            "vq_config": {
                "base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "embed_dim": 4,
                "num_embeddings": 16, "latent_channels": 32, "projection_dim": 32, "image_token_embed_dim": 32,
            },
        },
        processor=_sized("JanusImageProcessorPil", SIDE, min_size=PATCH),
        show=squares,
        size=(SIDE, SIDE),
        cell=PATCH,
    ),
    "internvl": TinyFamily(
        vision={**_SQUARE, "use_qk_norm": True, "norm_type": "rms_norm"},
        text=_decoder("qwen2"),
        more={**_IMAGE_ID, "image_seq_length": 36},
        processor=_TILE_PROCESSOR,
        show=squares,
    ),
    "qianfan_ocr": TinyFamily(
        vision=_SQUARE,
        text=_decoder("qwen3"),
        more={**_IMAGE_ID, "image_seq_length": 36},
        processor=_TILE_PROCESSOR,
        show=squares,
    ),
    "idefics3": _IDEFICS3,
    "smolvlm": replace(
        _IDEFICS3, vision=_LARGE, more={**_IMAGE_ID, "scale_factor": 4, "pad_token_id": PAD}, size=(80, 80), cell=16,
        processor=_longest(
            "SmolVLMImageProcessorPil", 80, max_image_size={"longest_edge": 80}, do_image_splitting=False
        ),
    ),
    "ovis2": TinyFamily(
        vision={**_SQUARE, "hidden_stride": 2, "vocab_size": 40, "num_visual_indicator_tokens": 5},
        text=_decoder("qwen2"),
        more={
            **_IMAGE_ID, "visual_indicator_token_ids": [57, 58, 59, 60, 61], "vocab_size": VOCAB, "hidden_size": 32,
        },
        processor=_sized("Ovis2ImageProcessorPil", 48, crop_to_patches=False),
        show=squares,
        begin=(57, 59),
        end=(58,),
        lacks=frozenset({"chunks"}),
        since="5.20",  # its encoder's config had no name
    ),
    "qwen2_vl": _on_axes(
        vision={**_QWEN_VIT, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}, text=_axes(2, 1, 1)
    ),
    "qwen2_5_vl": _on_axes(
        vision=_QWEN2_5_VIT,
        text=_axes(2, 1, 1),
    ),
    "paddleocr_vl": TinyFamily(
        vision={**_SMALL, "spatial_merge_size": 2},
        text={**_axes(2, 1, 1), "head_dim": 8},
        more=_QWEN_IDS,
        processor=_patched("PaddleOCRVLImageProcessorPil", frames=1),
        show=patches(unit=1, frames=1, flat=False),
        size=_WIDE,
        any_size=True,
        follow=kinds,
        lacks=frozenset({"images on a cache"}),
        gained=_REPEATS_LATE,
    ),
    "mistral3": TinyFamily(
        vision=_PIXTRAL,
        text=_decoder("mistral", sliding_window=None),
        more={"image_token_index": IMAGE_TOKEN, "spatial_merge_size": 2},
        processor=_longest("PixtralImageProcessorPil", 64, patch_size={"height": 8, "width": 8}),
        show=corners,
        size=_WIDE,
        any_size=True,
        begin=(),
        row_end=ROW_END,
    ),
    "llava+pixtral": TinyFamily(
        model_type="llava",
        vision=_PIXTRAL,
        text=_decoder("mistral", sliding_window=None),
        more={
            "image_token_index": IMAGE_TOKEN, "vision_feature_layer": -1, "vision_feature_select_strategy": "full",
        },
        processor=_longest("PixtralImageProcessorPil", 64, patch_size={"height": PATCH, "width": PATCH}),
        show=corners,
        size=(24, 32),
        cell=PATCH,
        any_size=True,
        begin=(),
        row_end=ROW_END,
    ),
    "lighton_ocr": TinyFamily(
        vision=_PIXTRAL,
        text=_decoder("qwen3"),
        more={**_IMAGE_ID, "spatial_merge_size": 2},
        processor=_longest("PixtralImageProcessorPil", 64, patch_size={"height": 8, "width": 8}),
        show=corners,
        size=_WIDE,
        any_size=True,
    ),
    "video_llama_3": TinyFamily(
        vision=_VIT,
        text=_decoder("qwen2"),
        more=_IMAGE_AND_VIDEO_ID,
        processor=_patched("VideoLlama3ImageProcessorPil", unit=1, frames=1, pixels=24**2),
        show=patches_of_own_unit,
        size=(24, 32),
        cell=PATCH,
        any_size=True,
    ),
    "hyperclovax_vision_v2": _packed(
        vision={**_QWEN2_5_VIT, "model_type": "qwen2_5_vl_vision"},
        text=_decoder(
            "hyperclovax", embedding_multiplier=3.0, attention_multiplier=0.2, residual_multiplier=0.5,
            logits_scaling=0.5, use_post_norm=True,
        ),
    ),
    "qwen3_vl": _on_axes(
        vision={**_QWEN3_VIT, "deepstack_visual_indexes": [1, 2]},
        text=_axes(2, 1, 1, mrope_interleaved=True) | {"head_dim": 8},
    ),
    "cosmos3_omni": _on_axes(
        vision={**_QWEN3_VIT, "deepstack_visual_indexes": [1, 2], "model_type": "qwen3_vl_vision"},
        text=_axes(2, 1, 1, mrope_interleaved=True) | {"head_dim": 8, "model_type": "qwen3_vl_text"},
    ),
    "qwen3_vl_moe": _on_axes(
        vision={**_QWEN3_VIT, "deepstack_visual_indexes": [1, 2]},
        text=_axes(2, 1, 1, mrope_interleaved=True) | {"head_dim": 8, **_EXPERTS, "decoder_sparse_step": 1},
    ),
    "granite_docling": TinyFamily(
        vision={**_LARGE, "out_hidden_size": 32, "scale_factor": 4, "deepstack_visual_indexes": [1, 2]},
        text={
            **_TEXT, "embedding_multiplier": 3.0, "logits_scaling": 0.5, "residual_multiplier": 0.5,
            "attention_multiplier": 0.2,
        },
        more={**_IMAGE_ID, "pad_token_id": PAD},
        processor=_sized("GraniteDoclingImageProcessorPil", 80),
        show=tiles_by_prompt,
        size=(80, 80),
        cell=16,
        joins_images=True,
        since="5.23",
    ),
    "qwen3_5": _QWEN3_5,
    "qwen3_5_moe": replace(
        _QWEN3_5, text={**_QWEN3_5.text, **_EXPERTS, "shared_expert_intermediate_size": 16}
    ),
    "glm4v": _GLM4V,
    "glm46v": replace(
        _GLM4V, vision={**_GLM_VIT, "model_type": "glm4v_vision"}, text={**_GLM4V.text, "model_type": "glm4v_text"},
        processor=_patched("Glm46VImageProcessorPil", pixels=2 * 40**2),
    ),
    "glmga": replace(
        _GLM4V, vision={**_GLM_VIT, "model_type": "glm4v_vision"}, text={**_GLM4V.text, "model_type": "glm4v_text"},
        processor=_patched("GlmgaImageProcessorPil", pixels=2 * 40**2),
    ),
    "glm_ocr": replace(_GLM4V, processor=_patched("Glm46VImageProcessorPil", pixels=2 * 40**2)),
    "glm4v_moe": replace(
        _GLM4V,
        text={
            **_GLM4V.text, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
            "first_k_dense_replace": 1, "n_shared_experts": 1,
        },
    ),
    "aya_vision": TinyFamily(
        vision={**_SQUARE, "model_type": "siglip_vision_model"},
        text=DECODERS["cohere2"],
        more={"image_token_index": IMAGE_TOKEN, "vision_feature_layer": -1},
        processor=_TILE_PROCESSOR,
        show=squares,
    ),
    "cohere2_vision": TinyFamily(
        vision={**_SQUARE, "model_type": "siglip_vision_model"},
        text=DECODERS["cohere2"],
        more={**_IMAGE_ID, "alignment_intermediate_size": 48},
        processor=_TILE_PROCESSOR,
        show=squares,
    ),
    "exaone4_5": _packed(
        vision={**_QWEN2_5_VIT, "num_key_value_heads": 2},
        text=_decoder(
            "exaone4", sliding_window=24, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
        ),
        gained=_REPEATS_LATE,
    ),
    "gemma3": _GEMMA3,
    "shieldgemma2": replace(_GEMMA3, lacks=_GEMMA3.lacks | {"saves"}),
    "paligemma": _PALIGEMMA,
    "paligemma+gemma2": replace(
        _PALIGEMMA, model_type="paligemma", text=DECODERS["gemma2"], since="5.21",  # before, SDPA left the soft-cap out
    ),
    "gemma4": TinyFamily(
        vision={
            **_VIT, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "pooling_kernel_size": 3,
            "position_embedding_size": 64, "use_clipped_linears": False, "standardize": True,
        },
        text={
            **_TEXT, "num_hidden_layers": 4, "head_dim": 8, "global_head_dim": 16, "num_global_key_value_heads": 1,
            "sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2, "attention_k_eq_v": True, "use_double_wide_mlp": True,
            "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 4, "final_logit_softcapping": 5.0,
            "use_bidirectional_attention": "vision", "rms_norm_eps": 1e-2,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
                "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 1e5},
            },
        },
        more={**_IMAGE_AND_VIDEO_ID, "boi_token_id": BEGIN, "eoi_token_id": END},
        processor=("Gemma4ImageProcessorPil", {"patch_size": PATCH, "pooling_kernel_size": 3, "max_soft_tokens": 70}),
        show=padded_patches,
        size=(60, 84),
        cell=3 * PATCH,
        any_size=True,
        follow=kinds,
        lacks=frozenset({"images on a cache", "chunks"}),
    ),
}  # fmt: skip
