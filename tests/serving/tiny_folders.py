"""Tiny random models with their processors, as folders that vLLM takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
    Qwen2VLVideoProcessor,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

SPECIAL = ("<pad>", "<unk>", "<image>", "<begin>", "<end>", "<video>")
PROMPTS = {
    "internvl": "USER : {} what is this ? ASSISTANT :",
    "qwen2_5_vl": "USER : <begin> {} <end> what is this ? ASSISTANT :",
}
"""By model type; `{}` stands for an image."""
TEXT: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 64, "max_position_embeddings": 1024, "initializer_range": 0.4,
}  # fmt: skip


def save(model_type: str, folder: Path) -> None:
    """Write the model and its processor."""
    torch.manual_seed(0)
    model, processor = {"internvl": _internvl, "qwen2_5_vl": _qwen2_5_vl}[model_type](_tokenizer())
    model.save_pretrained(folder)
    processor.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    processor.save_pretrained(folder)


def _tokenizer() -> PreTrainedTokenizerFast:
    words = [*SPECIAL, *(word for word in PROMPTS["internvl"].split() if word != "{}")]
    words = list(dict.fromkeys(words))
    words += [f"word{number}" for number in range(len(words), TEXT["vocab_size"])]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {"start_image_token": "<begin>", "end_image_token": "<end>", "context_image_token": "<image>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=list(SPECIAL[2:]),
        extra_special_tokens={**named, "image_token": "<image>", "video_token": "<video>"},
    )


def _internvl(tokenizer: Any) -> tuple[Any, Any]:
    """Images are cut into up to twelve tiles of 36 tokens: more of a picture of 4 to 3 than of any square."""
    vision = {
        "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
        "image_size": [48, 48], "patch_size": [4, 4], "use_qk_norm": True, "norm_type": "rms_norm",
    }  # fmt: skip
    config = InternVLConfig(
        vision_config=vision, text_config={"model_type": "qwen2", **TEXT}, image_token_id=2, image_seq_length=36,
        downsample_ratio=0.5,
    )  # fmt: skip
    to_pixels = GotOcr2ImageProcessorPil(
        size={"height": 48, "width": 48}, crop_to_patches=True, min_patches=1, max_patches=12
    )
    return InternVLForConditionalGeneration(config), InternVLProcessor(
        image_processor=to_pixels, tokenizer=tokenizer, video_processor=InternVLVideoProcessor(), image_seq_length=36
    )


def _qwen2_5_vl(tokenizer: Any) -> tuple[Any, Any]:
    """Images of sizes of their own, encoded in windows."""
    vision = {
        "hidden_size": 64, "intermediate_size": 64, "depth": 4, "num_heads": 4, "patch_size": 4,
        "spatial_merge_size": 2, "out_hidden_size": 64, "window_size": 24, "fullatt_block_indexes": [1, 3],
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    config = Qwen2_5_VLConfig(
        vision_config=vision, text_config={**TEXT, "rope_parameters": rope}, image_token_id=2, video_token_id=5,
        vision_start_token_id=3, vision_end_token_id=4,
    )  # fmt: skip
    to_pixels = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 64, "longest_edge": 96 * 96}, patch_size=4, merge_size=2
    )
    return Qwen2_5_VLForConditionalGeneration(config), Qwen2_5_VLProcessor(
        image_processor=to_pixels, tokenizer=tokenizer, video_processor=Qwen2VLVideoProcessor()
    )
