"""The families' own processors, for the tiny models: with a tokenizer of few words, and a chat template."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BatchFeature, PreTrainedTokenizerFast
from transformers.video_utils import make_batched_metadata, make_batched_videos

import tiny
from tiny_families import BEGIN, END, FAMILIES, IMAGE_TOKEN, PATCH, ROW_END, VIDEO_TOKEN, VOCAB

TEMPLATE = "".join(
    (
        "{% for message in messages %}{% for part in message['content'] %}",
        "{% if part['type'] == 'text' %} {{ part['text'] }}",
        "{% elif part['type'] == 'image' %}<vision>{% else %}<film>{% endif %}",
        "{% endfor %}{% endfor %} :",
    )
)
"""`<vision>` and `<film>` stand for what the family writes for an image and a video."""

_NAMES = {"begin": BEGIN, "end": END, "row": ROW_END, "video": VIDEO_TOKEN, "image": IMAGE_TOKEN}
_TOKENS: dict[str, Mapping[str, str]] = {
    "internvl": {"start_image_token": "<begin>", "end_image_token": "<end>", "context_image_token": "<image>"},
    "gemma3": {"boi_token": "<begin>", "eoi_token": "<end>"},
    "smolvlm": {"fake_image_token": "<begin>", "global_image_token": "<row>", "end_of_utterance_token": "<end>"},
    "janus": {"boi_token": "<begin>", "eoi_token": "<end>"},
    "lighton_ocr": {"image_break_token": "<row>", "image_end_token": "<end>"},
}
_TOKENS["qianfan_ocr"], _TOKENS["granite_docling"] = _TOKENS["internvl"], _TOKENS["smolvlm"]
"""What a family's tokenizer names beside `image_token` and `video_token`."""
_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "internvl": {"image_seq_length": 36},
    "gemma3": {"image_seq_length": 25},
    "smolvlm": {"image_seq_len": 25},
    "mistral3": {
        "patch_size": PATCH, "spatial_merge_size": 2, "image_token": "<image>", "image_break_token": "<row>",
        "image_end_token": "<end>",
    },
    "qianfan_ocr": {"image_seq_length": 36, "image_placeholder_token": "<row>"},
    "aya_vision": {
        "patch_size": PATCH, "img_size": 48, "downsample_factor": 2, "image_token": "<image>",
        "start_of_img_token": "<begin>", "end_of_img_token": "<end>", "img_patch_token": "<image>",
        "img_line_break_token": "<row>",
    },
    "lighton_ocr": {"patch_size": PATCH, "spatial_merge_size": 2},
    "janus": {"num_image_tokens": 49},
    "deepseek_vl": {"num_image_tokens": 49},
    "granite_docling": {"image_seq_len": 25},
}  # fmt: skip
_CLASSES = {
    "qwen2_5_vl": "Qwen2_5_VLProcessor",
    "qwen3_vl": "Qwen3VLProcessor",
    "internvl": "InternVLProcessor",
    "smolvlm": "SmolVLMProcessor",
    "gemma3": "Gemma3Processor",
    "mistral3": "PixtralProcessor",
    "qwen2_vl": "Qwen2VLProcessor",
    "glm4v": "Glm4vProcessor",
    "glm46v": "Glm46VProcessor",
    "exaone4_5": "Exaone4_5_Processor",
    "hyperclovax_vision_v2": "HyperCLOVAXVisionV2Processor",
    "video_llama_3": "VideoLlama3Processor",
    "paddleocr_vl": "PaddleOCRVLProcessor",
    "lighton_ocr": "LightOnOcrProcessor",
    "aya_vision": "AyaVisionProcessor",
    "qianfan_ocr": "QianfanOCRProcessor",
    "granite_docling": "GraniteDoclingProcessor",
    "deepseek_vl": "DeepseekVLProcessor",
    "janus": "JanusProcessor",
}
PROCESSORS = tuple(name for name in _CLASSES if FAMILIES[name].exists)
"""The families that have one here."""
OF_EACH_KIND = PROCESSORS[:6]
"""Among them one of each kind."""


class VideoPatches:
    """What the video processors of Qwen-VL do, which need torchvision: patches of two frames each."""

    merge_size, temporal_patch_size, num_frames, fps = 2, 2, 8, 2
    model_input_names = ("pixel_values_videos", "video_grid_thw")

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def __call__(self, videos: Sequence[Sequence[Image.Image]], video_metadata: Any = None, **_: Any) -> BatchFeature:
        pixels, grids = [], []
        for video in videos:
            frames = [self._processor(images=[frame], return_tensors="pt") for frame in video]
            frames += frames[-1:] * (len(frames) % 2)
            one = frames[0]["pixel_values"].shape[-1] // 2
            for first, second in zip(frames[::2], frames[1::2], strict=True):
                # A still image is two equal frames: of each patch, channel by channel, the one and then the other.
                both = [frame["pixel_values"].unflatten(-1, (3, 2, -1)) for frame in (first, second)]
                pixels.append(torch.stack((both[0][:, :, 0], both[1][:, :, 0]), 2).flatten(1))
                assert pixels[-1].shape[-1] == 2 * one
            rows, columns = frames[0]["image_grid_thw"][0, 1:].tolist()
            grids.append((len(frames) // 2, rows, columns))
        metadata = make_batched_metadata(make_batched_videos(list(videos)), video_metadata)
        made = {"pixel_values_videos": torch.cat(pixels), "video_grid_thw": torch.tensor(grids)}
        return BatchFeature({**made, "video_metadata": metadata})


def processor_for(name: str, template: bool = True) -> Any:
    """The processor of a family, with a chat template or without."""
    home = "pixtral" if name == "mistral3" else name
    with _torchvision():
        module = importlib.import_module(f"transformers.models.{home}.processing_{home}")
    if name == "smolvlm" and module.num2words is None:
        module.num2words = str  # only videos are counted in words
    kind = _without_checks(getattr(module, _CLASSES[name]))
    image_processor, tokenizer = tiny.processor(name), _tokenizer(_TOKENS.get(name, {}))
    parts = {"image_processor": image_processor, "tokenizer": tokenizer}
    if "video_processor" in kind.get_attributes():
        parts["video_processor"] = VideoPatches(image_processor)
    processor = kind(**parts, **_SETTINGS.get(name, {}))
    if template:
        around = "<begin>{}<end>" if name.startswith("qwen") else "{}"
        placeholder = getattr(processor, "image_placeholder_token", processor.image_token)
        shown = TEMPLATE.replace("<vision>", around.format(placeholder))
        processor.chat_template = shown.replace("<film>", getattr(processor, "video_token", None) or "<video>")
    return processor


def _torchvision() -> Any:
    """Stands in for torchvision, which some processors import and which nothing here needs."""
    names = ("torchvision", "torchvision.transforms", "torchvision.transforms.v2")
    return mock.patch.dict(sys.modules, {name: sys.modules.get(name) or mock.MagicMock() for name in names})


def _tokenizer(more: Mapping[str, str]) -> PreTrainedTokenizerFast:
    words = ["<pad>", "<unk>", *"USER : ASSISTANT what is this ? a red cat TILE_GLOBAL".split()]  # noqa: SIM905
    words += [f"word{i}" for i in range(len(words), min(_NAMES.values()))]
    words += [f"<{name}>" for name in sorted(_NAMES, key=_NAMES.__getitem__)]
    assert len(words) == VOCAB
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {"image_token": "<image>", "video_token": "<video>", **more}
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=[f"<{name}>" for name in _NAMES],
        extra_special_tokens=named,
    )


def _without_checks(kind: Any) -> Any:
    """A processor's class that takes any video processor."""

    def check(self: Any, name: str, argument: object) -> Any:
        return None if name == "video_processor" else kind.check_argument_for_proper_class(self, name, argument)

    return type(kind.__name__, (kind,), {"check_argument_for_proper_class": check, "__init__": kind.__init__})
