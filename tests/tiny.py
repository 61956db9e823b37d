"""Tiny random models of every described kind, and prompts for them."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
)

VOCAB, PAD, IMAGE_TOKEN = 64, 0, 63
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


def llava(
    tower: str = "clip",
    decoder: str = "llama",
    *,
    layer: int | list[int] = -2,
    strategy: str | None = None,
    seed: int = 0,
    text: dict[str, Any] | None = None,
) -> LlavaForConditionalGeneration:
    """A LLaVA of two tiny random models; SigLIP, which has no class token to drop, uses the strategy `full`."""
    torch.manual_seed(seed)
    text_config = DECODERS[decoder]()
    for name, value in (text or {}).items():
        setattr(text_config, name, value)
    vision_config = TOWERS[tower]()
    vision_config.initializer_range = 0.2
    config = LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy or ("full" if tower == "siglip" else "default"),
    )
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.5 if "patch" in name else parameter.shape[-1] ** -0.5)
    model.generation_config.pad_token_id = PAD
    return model


def tokens_per_image(model: LlavaForConditionalGeneration) -> int:
    """Placeholders that the model expects for one image."""
    tower = model.config.vision_config
    prefix = {"clip_vision_model": 1, "siglip_vision_model": 0}.get(tower.model_type, 1)
    prefix += getattr(tower, "num_register_tokens", 0)
    return PATCHES + prefix - (model.config.vision_feature_select_strategy == "default")


def pictures(count: int, seed: int = 0) -> Tensor:
    """[count, 3, SIDE, SIDE], each smoother than the one before, so that each merges to another number of tokens."""
    generator = torch.Generator().manual_seed(seed)
    images = []
    for index in range(count):
        cells = max(SIDE // (1 + 3 * index), 2)
        coarse = torch.randn(1, 3, cells, cells, generator=generator)
        images.append(torch.nn.functional.interpolate(coarse, size=(SIDE, SIDE), mode="bilinear")[0])
    return torch.stack(images)


def processor() -> CLIPImageProcessorPil:
    """An image processor that neither resizes nor crops `photos`."""
    side = {"height": SIDE, "width": SIDE}
    return CLIPImageProcessorPil(size=side, crop_size=side)


def llava_processor() -> LlavaProcessor:
    """With a tokenizer of a few words, one per token."""
    words = ["<pad>", "<unk>", *"USER : ASSISTANT what is this ? a red cat".split()]  # noqa: SIM905
    words += [f"word{i}" for i in range(len(words), IMAGE_TOKEN)] + ["<image>"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
    )
    side = {"height": SIDE, "width": SIDE}
    return LlavaProcessor(
        CLIPImageProcessorPil(size=side, crop_size=side),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def photos(count: int, seed: int = 0) -> list[Image.Image]:
    """`pictures` as images."""
    pixels = pictures(count, seed).mul(50).add(128).clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(picture) for picture in pixels]


def prompt(model: LlavaForConditionalGeneration, *parts: int | str, seed: int = 0) -> Tensor:
    """Ids [N] of a prompt: a number is that many random words, "image" the placeholders of one image."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[Tensor] = []
    for part in parts:
        if part == "image":
            ids.append(torch.full((tokens_per_image(model),), IMAGE_TOKEN))
        else:
            ids.append(torch.randint(3, IMAGE_TOKEN, (int(part),), generator=generator))
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
