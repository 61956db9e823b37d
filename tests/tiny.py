"""Tiny random models of every described kind, and prompts for them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from packaging import version
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    BatchFeature,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    GemmaConfig,
    GraniteConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaNextVideoProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

VOCAB, PAD, VIDEO_TOKEN, IMAGE_TOKEN = 64, 0, 62, 63
SIDE, PATCH, LAYERS = 28, 4, 4
PATCHES = (SIDE // PATCH) ** 2

_VISION = {
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": PATCH,
}
_TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
}

TOWERS = {
    "clip": lambda: CLIPVisionConfig(**_VISION, intermediate_size=48),
    "siglip": lambda: SiglipVisionConfig(**_VISION, intermediate_size=48),
    "dinov2": lambda: Dinov2Config(**_VISION, mlp_ratio=2, layerscale_value=0.5),
    "dinov2_with_registers": lambda: Dinov2WithRegistersConfig(
        **_VISION, mlp_ratio=2, layerscale_value=0.5, num_register_tokens=3
    ),
}
DECODERS = {
    "llama": lambda: LlamaConfig(**_TEXT),
    "qwen2": lambda: Qwen2Config(**_TEXT),
    "qwen3": lambda: Qwen3Config(**_TEXT),
    "mistral": lambda: MistralConfig(**_TEXT, sliding_window=40),
}
UNDESCRIBED_DECODERS = {
    "gemma": lambda: GemmaConfig(**_TEXT),
    "olmo2": lambda: Olmo2Config(**_TEXT),
    "granite": lambda: GraniteConfig(
        **_TEXT, embedding_multiplier=3.0, attention_multiplier=0.2, residual_multiplier=0.5
    ),
    "phi3": lambda: Phi3Config(**_TEXT),
}
"""Decoders that transformers knows and the library does not: one that is described moves up to `DECODERS`."""

ANYRES = ("llava_next", "llava_next_video", "llava_onevision")
"""Families that cut an image into tiles. Their tests show images twice as wide as high: two tiles of `SIDE` pixels."""
PINPOINTS = [[rows * SIDE, columns * SIDE] for rows in range(1, 7) for columns in range(1, 7)]

FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llava": (LlavaConfig, LlavaForConditionalGeneration, {}),
    "vipllava": (VipLlavaConfig, VipLlavaForConditionalGeneration, {"vision_feature_layers": (-2, 1, 2)}),
    "llava_next": (LlavaNextConfig, LlavaNextForConditionalGeneration, {"image_grid_pinpoints": PINPOINTS}),
    "llava_next_video": (
        LlavaNextVideoConfig,
        LlavaNextVideoForConditionalGeneration,
        {"image_grid_pinpoints": PINPOINTS, "video_token_index": VIDEO_TOKEN},
    ),
    "llava_onevision": (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        {"image_grid_pinpoints": PINPOINTS, "video_token_index": VIDEO_TOKEN, "vision_feature_layer": -1},
    ),
}


def llava(
    tower: str = "clip",
    decoder: str = "llama",
    family: str = "llava",
    *,
    layer: int | list[int] | None = None,
    strategy: str | None = None,
    seed: int = 0,
    text: dict[str, Any] | None = None,
) -> Any:
    """A model of two tiny random models; SigLIP, which has no class token to drop, uses the strategy `full`."""
    torch.manual_seed(seed)
    text_config = (DECODERS | UNDESCRIBED_DECODERS)[decoder]()
    for name, value in (text or {}).items():
        setattr(text_config, name, value)
    vision_config = TOWERS[tower]()
    vision_config.initializer_range = 0.2
    make_config, make_model, settings = FAMILIES[family]
    more = dict(settings) if family == "vipllava" else {"vision_feature_layer": -2, **settings}
    if layer is not None:
        more["vision_feature_layer"] = layer
    if family != "vipllava":
        more["vision_feature_select_strategy"] = strategy or ("full" if tower == "siglip" else "default")
    config = make_config(vision_config=vision_config, text_config=text_config, image_token_index=IMAGE_TOKEN, **more)
    model = make_model(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.5 if "patch" in name else parameter.shape[-1] ** -0.5)
    model.generation_config.pad_token_id = PAD
    return model


def cuts_tiles(model: Any) -> bool:
    return model.config.model_type in ANYRES


def tokens_per_picture(model: Any) -> int:
    """Tokens of one picture that the language model gets."""
    tower = model.config.vision_config
    prefix = {"clip_vision_model": 1, "siglip_vision_model": 0}.get(tower.model_type, 1)
    prefix += getattr(tower, "num_register_tokens", 0)
    return PATCHES + prefix - (getattr(model.config, "vision_feature_select_strategy", "default") == "default")


def tokens_per_image(model: Any) -> int:
    """Placeholders that the model expects for one image of `shown`: two tiles, newlines, and the whole image."""
    side = SIDE // PATCH
    return tokens_per_picture(model) + (side * (2 * side + 1) if cuts_tiles(model) else 0)


def shown(model: Any, pictures: Tensor | None) -> dict[str, Any]:
    """What the model takes to see images of [B, 3, SIDE, SIDE] pixels, or of twice their width where it cuts tiles."""
    if pictures is None:
        return {}
    if not cuts_tiles(model):
        return {"pixel_values": pictures}
    wide = torch.nn.functional.interpolate(pictures, size=(SIDE, 2 * SIDE), mode="bilinear")
    tiles = torch.stack((pictures, wide[..., :SIDE], wide[..., SIDE:]), 1)
    return {"pixel_values": tiles, "image_sizes": torch.tensor([[SIDE, 2 * SIDE]] * len(pictures))}


REPEATS_RIGHT = version.parse(transformers.__version__) >= version.parse("5.19")
"""Whether the stock model keeps several images of one prompt in order where beams repeat them."""


def features_in(out: Any, modality: str = "image") -> Tensor | None:
    """The features [tokens of all items, C] that a call gives back beside its logits, if it was shown any.

    Whole outputs of the encoder from transformers 5.24 on, tensors of all items before.
    """
    if (encoded := out.get(f"{modality}_outputs")) is not None:
        return torch.cat([item.flatten(0, -2) for item in encoded.pooler_output])
    features = out.get(f"{modality}_hidden_states")
    return None if features is None else features.flatten(0, -2)


def close(actual: Tensor, expected: Tensor, part: float = 1e-5) -> None:
    """Assert that nothing is off by more than this part of the largest expected magnitude."""
    assert torch.isfinite(expected).all()
    torch.testing.assert_close(actual, expected, atol=part * float(expected.abs().max()), rtol=0)


def pictures(count: int, seed: int = 0) -> Tensor:
    """[count, 3, SIDE, SIDE], each smoother than the one before, so that each merges to another number of tokens."""
    generator = torch.Generator().manual_seed(seed)
    images = []
    for index in range(count):
        cells = max(SIDE // (1 + 3 * index), 2)
        coarse = torch.randn(1, 3, cells, cells, generator=generator)
        images.append(torch.nn.functional.interpolate(coarse, size=(SIDE, SIDE), mode="bilinear")[0])
    return torch.stack(images)


def processor(family: str = "llava") -> Any:
    """The family's image processor. That of `llava` and `vipllava` neither resizes nor crops `photos`."""
    side = {"height": SIDE, "width": SIDE}
    if family == "llava_onevision":
        return LlavaOnevisionImageProcessorPil(size=side, image_grid_pinpoints=PINPOINTS)
    if family in ANYRES:
        return LlavaNextImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=side, image_grid_pinpoints=PINPOINTS)
    return CLIPImageProcessorPil(size=side, crop_size=side)


def llava_processor() -> LlavaProcessor:
    """With a tokenizer of a few words, one per token."""
    return full_processor("llava")


class VideoProcessor:
    """What the families' video processors do, which need torchvision."""

    def __call__(self, videos: list[list[Image.Image]], **_: Any) -> BatchFeature:
        frames = [processor()(images=video, return_tensors="pt")["pixel_values"] for video in videos]
        return BatchFeature({"pixel_values_videos": torch.stack(frames)})


def full_processor(family: str) -> Any:
    """The family's processor, for a tower with a class token that is dropped; llava_onevision's for one without."""
    full = _full_processor(family)
    if family in ("llava_onevision", "llava_next_video"):
        full.video_processor = VideoProcessor()
    return full


def _full_processor(family: str) -> Any:
    if family == "llava_onevision":
        return _no_videos(LlavaOnevisionProcessor)(
            image_processor=processor(family),
            tokenizer=_tokenizer(),
            num_image_tokens=PATCHES,
            vision_feature_select_strategy="full",
        )
    kind = {"llava_next": LlavaNextProcessor, "llava_next_video": _no_videos(LlavaNextVideoProcessor)}.get(family)
    return (kind or LlavaProcessor)(
        image_processor=processor(family),
        tokenizer=_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def _tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<unk>", *"USER : ASSISTANT what is this ? a red cat".split()]  # noqa: SIM905
    words += [f"word{i}" for i in range(len(words), VIDEO_TOKEN)] + ["<video>", "<image>"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=["<video>", "<image>"],
    )


def _no_videos(kind: Any) -> Any:
    """A processor's class that works without a video processor."""

    def check(self: Any, name: str, argument: object) -> Any:
        return None if name == "video_processor" else kind.check_argument_for_proper_class(self, name, argument)

    return type(kind.__name__, (kind,), {"check_argument_for_proper_class": check, "__init__": kind.__init__})


def photos(count: int, seed: int = 0) -> list[Image.Image]:
    """`pictures` as images."""
    pixels = pictures(count, seed).mul(50).add(128).clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(picture) for picture in pixels]


def prompt(model: Any, *parts: int | str, seed: int = 0) -> Tensor:
    """Ids [N] of a prompt: a number is that many random words, "image" the placeholders of one image."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[Tensor] = []
    for part in parts:
        if part == "image":
            ids.append(torch.full((tokens_per_image(model),), IMAGE_TOKEN))
        else:
            ids.append(torch.randint(3, VIDEO_TOKEN, (int(part),), generator=generator))
    return torch.cat(ids)


def pad(rows: list[Tensor], side: str = "left") -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` [B, N] of prompts of different lengths."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), PAD)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(longest - len(row), None) if side == "left" else slice(0, len(row))
        ids[index, place], mask[index, place] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def asked(model: Any, seed: int = 0, images: int = 1) -> dict[str, Any]:
    """What the model takes for one prompt that shows so many pictures."""
    ids = prompt(model, 4, *["image"] * images, 7, seed=seed)[None]
    return {"input_ids": ids, **shown(model, pictures(images, seed))}


def answer(model: Any, **inputs: Any) -> Any:
    """Its greedy answer of six tokens."""
    options = {"do_sample": False, "max_new_tokens": 6, "suppress_tokens": [IMAGE_TOKEN], **inputs}
    return model.generate(**options)
