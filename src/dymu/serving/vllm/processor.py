"""Images on their way into vLLM's prompts: the merging encoder runs here, so that counts are known before the engine
sees a prompt."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import torch
from PIL import Image
from transformers import BatchFeature
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.media import MediaWithBytes
from vllm.multimodal.parse import ImageProcessorItems, MultiModalDataParser
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
    PromptUpdateDetails,
)

from dymu.errors import DymuError
from dymu.media import images as media
from dymu.serving.asked import count_of
from dymu.serving.front import Front, InPrompt
from dymu.serving.vllm import room_for
from dymu.thresholds import Thresholds
from dymu.version import __version__

FIELDS = ("features", "ids", "position", "advance", "group")


class Blank(Image.Image):
    """Stands for the image of most tokens while vLLM measures memory; it is not encoded."""


@functools.lru_cache(maxsize=1)
def _front(model: str, revision: str | None, thresholds: str, unmerge: Any, dtype: torch.dtype) -> Front:
    return Front(model, _decoded(thresholds), unmerge, revision=revision, dtype=dtype)


def _decoded(thresholds: str) -> Thresholds:
    return msgspec.json.decode(thresholds.encode(), type=Thresholds)


class Parser(MultiModalDataParser):
    """Reads images as all of dymu does; vLLM would clip those of 16 bits."""

    def _parse_image_data(self, data: Any) -> ImageProcessorItems | None:
        """Raises: ValueError, where these are no images."""
        if data is None:
            return None
        if self.is_embeddings(data) or isinstance(data, Mapping):
            raise ValueError("embeddings and rows of images are not taken: send the images.")
        alone = Image.Image | MediaWithBytes | str | os.PathLike | bytes
        one = isinstance(data, alone) or getattr(data, "ndim", 0) == 3
        return ImageProcessorItems([_read(item) for item in ([data] if one else data)])


def _read(item: Any) -> Image.Image:
    item = item.media if isinstance(item, MediaWithBytes) else item
    if isinstance(item, Blank):
        return item
    if item is None:
        raise ValueError("an image has a name and no content: send the image every time.")
    try:
        return media.load(item, "an image").image
    except DymuError as error:
        raise ValueError(str(error)) from error


class Info(BaseProcessingInfo):
    """What vLLM asks about the images of a model."""

    @property
    def own(self) -> dict[str, Any]:
        """What `dymu.serving.vllm.options` wrote into the config."""
        own: dict[str, Any] = self.get_hf_config().dymu
        return own

    @functools.cached_property
    def thresholds(self) -> Thresholds:
        return _decoded(self.own["thresholds"])

    @functools.cached_property
    def digest(self) -> str:
        """Of the thresholds, the default budget, the form and dymu's version, none of which a request names."""
        return hashlib.sha256(json.dumps([self.own, __version__], sort_keys=True).encode()).hexdigest()

    @property
    def front(self) -> Front:
        config = self.ctx.model_config
        return _front(config.model, config.revision, self.own["thresholds"], self.own["unmerge"], config.dtype)

    def get_data_parser(self) -> Parser:
        return Parser(expected_hidden_size=None)

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        return {"image": self.front.longest}


class Dummy(BaseDummyInputsBuilder[Info]):
    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return str(self.info.front.processor.image_token) * mm_counts.get("image", 0)

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> Any:
        blank = Blank()
        blank.im, blank._mode, blank._size = Image.new("RGB", (64, 64)).im, "RGB", (64, 64)
        return {"image": [blank] * mm_counts.get("image", 0)}


def _key(ahead: str, image: Image.Image) -> str:
    shown = f"{ahead} {type(image).__name__} {image.mode} {image.size} "
    return hashlib.sha256(shown.encode() + image.tobytes()).hexdigest()


class Processor(BaseMultiModalProcessor[Info]):
    """Gives vLLM what stands in a prompt for each image: its tokens, their features and their places."""

    def _call_hf_processor(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, Any]) -> BatchFeature:
        asked = self.info.ctx.get_merged_mm_kwargs(hf_kwargs)
        budget = asked.pop("budget", self.info.own["budget"])
        if asked:
            raise ValueError(
                f"mm_processor_kwargs takes budget, and not {', '.join(map(repr, asked))}: leave that out."
            )
        images = list(hf_data["images"])
        try:
            count = count_of(budget, self.info.thresholds, self.info.own["counting"])
            if all(isinstance(image, Blank) for image in images):
                shown = [self._blank()] * len(images)
            else:
                shown = self.info.front(images, count)
        except DymuError as error:
            raise ValueError(str(error)) from error
        return BatchFeature(
            {
                "image_features": [one.features for one in shown],
                "image_ids": [torch.tensor(one.ids) for one in shown],
                "image_position": [one.position for one in shown],
                "image_advance": [one.advance for one in shown],
                "image_group": [one.group for one in shown],
            }
        )

    def _blank(self) -> InPrompt:
        front = self.info.front
        ids = [front.image_token] * front.longest
        width = self.info.get_hf_config().get_text_config().hidden_size
        features = torch.zeros(len(ids), width, dtype=self.info.ctx.model_config.dtype)
        index = torch.arange(len(ids))
        return InPrompt(ids, features, index[:, None], torch.tensor(len(ids)), index)

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Raises: ValueError, where the prompt has other placeholders than those of its images, or merging takes more
        out of it than there are positions for."""
        (target,), images = self.info.front.target, inputs.mm_data_items.get_all_counts().get("image", 0)
        if inputs.prompt.count(target) != images:
            raise ValueError(
                f"the prompt has {inputs.prompt.count(target)} placeholders of images, and {images} images: write one "
                "for each, and none in the text."
            )
        made = super().apply(inputs, timing_ctx)
        shown = [item for item in made["mm_kwargs"].get("image", ()) if item is not None]
        taken = sum(int(item["image_advance"].data) - len(item["image_position"].data) for item in shown)
        room = room_for(self.info.ctx.model_config, self.info.own)
        if taken > room:
            raise ValueError(
                f"merging takes {taken:,} tokens out of this prompt, and the server has positions for {room:,}: send "
                "fewer images, or start it with a smaller --max-model-len."
            )
        return made

    def _get_mm_hashes(self, inputs: Any) -> Any:
        """Keys of cached images and prefixes, of all that decides what an image becomes: vLLM's own would be the name
        that a client gives an image, whatever the image is."""
        ahead = json.dumps([self.info.digest, dict(inputs.hf_processor_mm_kwargs)], sort_keys=True, default=str)
        images = inputs.mm_data_items.get("image", ())
        return {"image": [_key(ahead, image) for image in images]} if images else {}

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Any
    ) -> Mapping[str, MultiModalFieldConfig]:
        return {
            f"image_{name}": MultiModalFieldConfig.batched("image", keep_on_cpu=name != "features") for name in FIELDS
        }

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any
    ) -> Sequence[PromptReplacement]:
        front = self.info.front

        def replacement(item: int) -> Any:
            ids = out_mm_kwargs["image"][item]["image_ids"].data.tolist()
            return PromptUpdateDetails.select_token_id(ids, front.image_token)

        return [PromptReplacement(modality="image", target=front.target, replacement=replacement)]
