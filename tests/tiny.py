"""Tiny random models of every described kind, and prompts for them."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Sequence
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
    LlavaNextProcessor,
    LlavaNextVideoProcessor,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

import tiny_families
from tiny_families import (
    ANYRES,
    FAMILIES,
    IMAGE_TOKEN,
    LAYERS,
    PAD,
    PATCH,
    PATCHES,
    PINPOINTS,
    SIDE,
    TOWERS,
    VIDEO_TOKEN,
    VOCAB,
    TinyFamily,
    build,
    configured,
    family_of,
    name_of,
)

__all__ = ["LAYERS", "TOWERS", "VOCAB", "build", "configured"]
"""What the tests take from the table through this module."""

UNDESCRIBED: set[str] = set()
"""Decoders that transformers knows and the library does not: one that is described leaves this set."""
DECODERS = {name: text for name, text in tiny_families.DECODERS.items() if name not in UNDESCRIBED}
UNDESCRIBED_DECODERS = {name: text for name, text in tiny_families.DECODERS.items() if name in UNDESCRIBED}
AS_THEY_BEGIN = ("llama", "qwen2", "qwen3", "mistral")
"""Decoders whose norms are not random within `llava`: the seeds of many tests were chosen so."""


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
    more: dict[str, Any] = {}
    if layer is not None:
        more["vision_feature_layer"] = layer
    if family != "vipllava":
        more["vision_feature_select_strategy"] = strategy or ("full" if tower == "siglip" else "default")
    return build(
        family,
        seed,
        vision=TOWERS[tower],
        text={**tiny_families.DECODERS[decoder], **(text or {})},
        norms=decoder not in AS_THEY_BEGIN,
        **more,
    )


def can(model: Any, ability: str) -> bool:
    """Whether the stock model has one of `tiny_families.ABILITIES`."""
    return family_of(model).can(ability)


def cuts_tiles(model: Any) -> bool:
    return model.config.model_type in ANYRES


def tokens_per_picture(model: Any) -> int:
    """Tokens of one picture of `shown` that the language model gets."""
    family = family_of(model)
    return (family.size[0] // family.cell) * (family.size[1] // family.cell) + family.prefix(model)


def tokens_per_image(model: Any) -> int:
    """Placeholders that the model expects for one image of `shown`: some get two tiles, newlines and the whole."""
    side = SIDE // PATCH
    return tokens_per_picture(model) + (side * (2 * side + 1) if cuts_tiles(model) else 0)


def image(model: Any, picture: Tensor | None = None) -> Tensor:
    """Ids [N] of one image, with those around it and behind its rows.

    Args:
        picture: [3, height, width]; one of `SIDE` x `SIDE` pixels unless given.
    """
    family = family_of(model)
    height, width = family.size if picture is None else _fit(family, picture).shape[1:]
    if family.row_end is not None:
        row = [IMAGE_TOKEN] * (width // family.cell) + [family.row_end]
        placeholders = row * (height // family.cell)
    elif not family.any_size or picture is None:
        placeholders = [IMAGE_TOKEN] * tokens_per_image(model)
    else:
        placeholders = [IMAGE_TOKEN] * (height // family.cell) * (width // family.cell)
    return torch.tensor([*family.begin, *placeholders, *family.end])


def shown(
    model: Any, pictures: Sequence[Tensor] | Tensor | None, counts: Sequence[int] | None = None
) -> dict[str, Any]:
    """What the model takes to see pictures.

    Args:
        pictures: [B, 3, SIDE, SIDE], or a list of pictures of other sizes where the family takes `any_size`.
        counts: how many of them each prompt shows; unless given, one.
    """
    if pictures is None or len(pictures) == 0:
        return {}
    family = family_of(model)
    counts = [1] * len(pictures) if counts is None else counts
    return family.show([_fit(family, picture) for picture in pictures], counts)


def fitted(model: Any, picture: Tensor) -> Tensor:
    """[3, height, width], a picture as the model sees it."""
    return _fit(family_of(model), picture)


def _fit(family: TinyFamily, picture: Tensor) -> Tensor:
    """[3, height, width] as the family sees it."""
    size = tuple(picture.shape[1:])
    if size == family.size or (family.any_size and size != (SIDE, SIDE)):
        return picture
    return torch.nn.functional.interpolate(picture[None], size=family.size, mode="bilinear")[0]


def inputs(
    model: Any,
    prompts: Tensor | Sequence[Tensor],
    pictures: Sequence[Tensor] | Tensor | None = None,
    side: str = "left",
    said: int = 0,
) -> dict[str, Any]:
    """All that the model takes for prompts that show pictures.

    Args:
        prompts: ids [N] or [B, N], or a list of ids [N] that are padded on a `side`.
        pictures: of all prompts one after the other, see `shown`.
        said: how many ids at the end the model itself said.
    """
    if isinstance(prompts, Tensor):
        asked: dict[str, Any] = {"input_ids": prompts if prompts.ndim == 2 else prompts[None]}
    else:
        asked = pad(list(prompts), side)
    asked |= family_of(model).follow(asked["input_ids"], said)
    counts = [int(count) // tokens_per_image(model) for count in (asked["input_ids"] == IMAGE_TOKEN).sum(1)]
    return {**asked, **shown(model, pictures, counts)}


def features_of(model: Any, **seen: Any) -> Any:
    """What `get_image_features` answers, which some families have on the inner model alone."""
    return (model if hasattr(model, "get_image_features") else model.model).get_image_features(**seen)


def seen(model: Any, photos: Sequence[Image.Image]) -> dict[str, Any]:
    """What `get_image_features` takes for so many prompts of one photo each, by the family's image processor."""
    name = name_of(model)
    images: Any = [[photo] for photo in photos] if FAMILIES[name].joins_images else list(photos)
    processed = processor(name)(images=images, return_tensors="pt")
    takes = inspect.signature(type(model.model).get_image_features).parameters
    return {name: value for name, value in processed.items() if name in takes}


REPEATS_RIGHT = version.parse(transformers.__version__) >= version.parse("5.19")
"""Whether the stock model keeps several images of one prompt in order where beams repeat them."""


def features_in(out: Any, modality: str = "image") -> Tensor | None:
    """The features [tokens of all items, C] that a call gives back beside its logits, if it was shown any.

    Whole outputs of the encoder from transformers 5.24 on; before, tensors of all items from most families.
    """
    encoded = out.get(f"{modality}_outputs", out.get(f"{modality}_hidden_states"))
    if encoded is None:
        return None
    features = getattr(encoded, "pooler_output", encoded)
    return torch.cat([item.flatten(0, -2) for item in ([features] if isinstance(features, Tensor) else features)])


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


def uneven(model: Any, count: int, seed: int = 0) -> list[Tensor]:
    """`pictures`, each of another size where the family takes any."""
    family = family_of(model)
    sizes = [family.size, (2 * family.cell, 5 * family.cell), (4 * family.cell, 3 * family.cell)]
    return [
        torch.nn.functional.interpolate(picture[None], size=size, mode="bilinear")[0] if family.any_size else picture
        for picture, size in zip(pictures(count, seed), itertools.cycle(sizes))
    ]


def processor(family: str = "llava") -> Any:
    """The family's image processor. That of `llava` and `vipllava` neither resizes nor crops `photos`."""
    if (kind := FAMILIES[family].processor) is not None:
        name, settings = kind
        return getattr(transformers, name)(**settings)
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


def prompt(model: Any, *parts: int | str | Tensor, seed: int = 0) -> Tensor:
    """Ids [N] of a prompt: a number is that many random words, "image" an image, a picture [3, H, W] an image of it."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[Tensor] = []
    for part in parts:
        if isinstance(part, Tensor):
            ids.append(image(model, part))
        elif part == "image":
            ids.append(image(model))
        else:
            ids.append(torch.randint(3, min(specials(model)), (int(part),), generator=generator))
    return torch.cat(ids)


def specials(model: Any) -> list[int]:
    """Ids that are no words: a model that says one says an image to a later turn."""
    family = family_of(model)
    around = {*family.begin, *family.end} | ({family.row_end} if family.row_end is not None else set())
    return [*sorted(around), VIDEO_TOKEN, IMAGE_TOKEN]


def pad(rows: list[Tensor], side: str = "left") -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` [B, N] of prompts of different lengths."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), PAD)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(longest - len(row), None) if side == "left" else slice(0, len(row))
        ids[index, place], mask[index, place] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def going_on(model: Any, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """What the model takes for ids [B, n] that follow on a cache, with the mask [B, N] of all ids so far.

    A model whose positions have several axes wants to be told them: after its images they are behind the ids' places.
    """
    behind = getattr(model.model, "rope_deltas", None)
    positions = {} if behind is None else {"position_ids": (mask.cumsum(1) - 1)[:, -ids.shape[1] :] + behind}
    return {"input_ids": ids, "attention_mask": mask, **positions}


def asked(model: Any, seed: int = 0, images: int = 1) -> dict[str, Any]:
    """What the model takes for one prompt that shows so many pictures."""
    ids = prompt(model, 4, *["image"] * images, 7, seed=seed)
    return inputs(model, ids, pictures(images, seed))


def answer(model: Any, **inputs: Any) -> Any:
    """Its greedy answer of six tokens."""
    options = {"do_sample": False, "max_new_tokens": 6, "suppress_tokens": specials(model), **inputs}
    return model.generate(**options)
