"""Where merged tokens stand in the prompt, in any family.

Families cut images into tiles, take padding off, add learned tokens at the ends of rows, shrink large images and pool
the frames of videos. The family's code does all of that once more, on signatures instead of features. The signature of
a merged token is a few random numbers, so equal signatures are equal features.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, one_hot
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_outputs import BaseModelOutputWithPooling

from dymu.errors import UnsupportedModel
from dymu.families.resolve import Modality, Parts
from dymu.item import Item
from dymu.token_map import TokenMap, take

RANDOM = 56
"""Random numbers in a signature. Means over different tokens differ in the first one, maxima after a few more."""
LEVELS = 2**14
"""Steps of a random number between 0 and 1 that count as different: rounding errors are far below, and weights of a
mean that differ by less make no difference to features either."""

Modules = dict[str, Any]
"""Parts of a model by name."""

PATCH, PRESENT, PICTURE, ROW, COLUMN, SEEN = 0, 1, 2, 3, 4, slice(5, 8)
"""Channels of a signature, ahead of the random ones."""
_KNOWN = 8


def trace(
    parts: Parts, modality: Modality, args: Sequence[Any], kwargs: dict[str, Any], tokens: TokenMap, seen: Tensor
) -> list[Item]:
    """The items of one call, as they stand in the prompt.

    A copy of a merged token is of its group. Where the family pools or shrinks, tokens are means, and equal means over
    the same tokens are one group.

    Args:
        parts: of the model.
        modality: what the items are.
        args, kwargs: what the inner module's `get_image_features` or `get_video_features` was called with.
        tokens: the encoder's tokens of each picture, prefix included, to the merged ones.
        seen: [pictures, 3, rows, columns], each patch as the encoder saw it.

    Raises:
        UnsupportedModel: the family pools with learned weights.
    """
    if modality == "video" and parts.pools_with_weights:
        raise UnsupportedModel(
            "this model pools the frames of videos with learned weights, which dymu cannot follow; "
            "spatial_pool_mode average and max are known."
        )
    pixels = args[0] if args else kwargs["pixel_values" if modality == "image" else "pixel_values_videos"]
    signatures = _signatures(tokens, seen, parts.prefix)
    items = _in_prompt(parts, modality, args, kwargs, signatures)
    leaders = _leaders(items)
    patches = [item[:, PATCH] > 0.5 for item in items]
    firsts = [item[:, PICTURE].where(patch, torch.inf).min() for item, patch in zip(items, patches, strict=True)]
    starts = [round(first) for first in torch.stack(firsts).tolist()] + [len(seen)]
    pictures = [(item[:, PICTURE] - start).round().long() for item, start in zip(items, starts, strict=False)]
    if modality == "image" and parts.family.cuts_images:
        pictures = _most_of(parts, args, kwargs, signatures, starts)
    return [
        Item(
            leaders=leader.to(seen.device),
            patch=patch.to(seen.device),
            picture=picture.to(seen.device),
            at=item[:, ROW : COLUMN + 1].to(seen),
            seen=item[:, SEEN].to(seen),
            shown=seen[start:end],
            video=modality == "video",
            covered=_covered(parts, pixels),
        )
        for item, patch, picture, leader, start, end in zip(
            items, patches, pictures, leaders, starts[:-1], starts[1:], strict=True
        )
    ]


def _most_of(
    parts: Parts, args: Sequence[Any], kwargs: dict[str, Any], signatures: Tensor, starts: Sequence[int]
) -> list[Tensor]:
    """int64 [N] for each image, whose pictures begin at `starts`: which of them each token shows most of."""
    lengths = [end - start for start, end in pairwise(starts)]
    number = torch.cat([torch.arange(length, device=signatures.device) for length in lengths])
    of_picture = one_hot(number, max(lengths)).float()[:, None].repeat(1, signatures.shape[1], 1)
    return [item.argmax(1) for item in _in_prompt(parts, "image", args, kwargs, of_picture)]


def _in_prompt(
    parts: Parts, modality: Modality, args: Sequence[Any], kwargs: dict[str, Any], channels: Tensor
) -> list[Tensor]:
    """[N, K] for each item: [pictures, encoder tokens, K] channels as the family arranges them, without projection.

    Learned tokens are 0 in every channel.
    """
    count = channels.shape[-1]
    # The features of several layers arrive concatenated.
    replaced: Modules = {parts.family.projector: lambda features: features[..., :count]}
    replaced |= {name: channels.new_zeros(count) for name in parts.family.learned}
    # Some families return the frames of a video one by one.
    return [item.flatten(0, -2) for item in _family_code(parts, modality, args, kwargs, channels, replaced)]


def features_of(
    parts: Parts, modality: Modality, args: Sequence[Any], kwargs: dict[str, Any], tokens: TokenMap, hidden: Tensor
) -> Any:
    """The features of each item, as the family's code arranges them.

    Args:
        parts, modality, args, kwargs, tokens: see `trace`.
        hidden: [pictures, M, C], the encoder's merged tokens in the one layer that the model reads.
    """
    expand = tokens.drop(parts.dropped()).expand
    pooler, projector = parts.pooler, parts.projector
    if modality == "video" and pooler is not None and parts.family.pooler is not None:
        replaced: Modules = {parts.family.pooler: lambda merged: pooler(expand(merged))}
    else:
        replaced = {parts.family.projector: lambda merged: expand(projector(merged))}
    return _family_code(parts, modality, args, kwargs, hidden, replaced)


def _family_code(
    parts: Parts, modality: Modality, args: Sequence[Any], kwargs: dict[str, Any], hidden: Tensor, replaced: Modules
) -> Any:
    """What the family's code makes of encoder tokens [pictures, tokens, C] with some parts of the model replaced."""
    output = BaseModelOutputWithPooling(
        last_hidden_state=hidden, hidden_states=(hidden,) * (len(parts.encoder_layers) + 1)
    )
    stand_in = _StandIn(parts.inner, {parts.family.tower: lambda *_, **__: output, **replaced})
    get_features = getattr(type(parts.inner), f"get_{modality}_features")
    return get_features(stand_in, *args, **{**kwargs, "return_dict": True}).pooler_output


def _signatures(tokens: TokenMap, seen: Tensor, prefix: int) -> Tensor:
    """float64 [pictures, encoder tokens, channels]"""
    device = torch.device("cpu") if seen.device.type == "mps" else seen.device  # it has no float64
    pictures, patches = tokens.batch, tokens.tokens - prefix
    columns = seen.shape[-1]
    index = torch.arange(patches, device=device)
    signatures = torch.zeros(pictures, tokens.tokens, _KNOWN + RANDOM, dtype=torch.float64, device=device)
    shows = signatures[:, prefix:]
    shows[..., PATCH] = 1
    shows[..., PICTURE] = torch.arange(pictures, device=device)[:, None]
    shows[..., ROW], shows[..., COLUMN] = index // columns, index % columns
    shows[..., SEEN] = seen.flatten(2).mT
    generator = torch.Generator(device).manual_seed(0)
    random = torch.rand(pictures, tokens.width, RANDOM, generator=generator, dtype=torch.float64, device=device)
    group = tokens.group.to(device)
    signatures[..., PRESENT] = group >= 0
    signatures[..., _KNOWN:] = take(random, group.clamp(min=0)) * signatures[..., PRESENT, None]
    return signatures


def _patch_sides(parts: Parts) -> tuple[int, int]:
    """Pixels of a patch, high and wide."""
    sides: int | tuple[int, int] = parts.tower.config.patch_size
    return (sides, sides) if isinstance(sides, int) else sides


def grid(parts: Parts, pixels: Tensor) -> tuple[int, int]:
    """Rows and columns of the patches of pictures [..., height, width]; what is left over at the ends is not seen."""
    height, width = _patch_sides(parts)
    return pixels.shape[-2] // height, pixels.shape[-1] // width


def _covered(parts: Parts, pixels: Tensor) -> tuple[float, float]:
    """See `Item.covered`."""
    (height, width), (rows, columns) = _patch_sides(parts), grid(parts, pixels)
    return rows * height / pixels.shape[-2], columns * width / pixels.shape[-1]


def seen_by(parts: Parts, pixels: Tensor) -> Tensor:
    """Pictures [pictures, 3, height, width] averaged over each patch: [pictures, 3, rows, columns]."""
    return avg_pool2d(pixels.detach().float(), _patch_sides(parts))


def locations(items: Sequence[Item], rows: int, columns: int) -> Tensor:
    """See `dymu.reducers.Shown.location`. Computed from where two tokens at opposite corners of each picture lie.

    Args:
        items: with nothing merged.
    """
    boxes = []
    for item in items:
        centre = (item.location[:, :2] + item.location[:, 2:]).flip(1) / 2  # row, then column, as `at`
        for number in range(item.pictures):
            tokens = item.patch & (item.picture == number)
            top, bottom = _edges(item.at[tokens, 0], centre[tokens, 0], rows)
            left, right = _edges(item.at[tokens, 1], centre[tokens, 1], columns)
            sides = (left.expand(rows, -1), top[:, None].expand(-1, columns),
                     right.expand(rows, -1), bottom[:, None].expand(-1, columns))  # fmt: skip
            boxes.append(torch.stack(sides, -1).flatten(0, 1))
    return torch.stack(boxes)


def _edges(at: Tensor, centre: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Where each of `size` rows of patches begins and ends, by the rows `at` that some tokens show and the centres of
    what they show."""
    if not len(at):
        nothing = centre.new_full((size,), torch.nan)
        return nothing, nothing
    low, high = at.argmin(), at.argmax()
    apart = at[high] - at[low]
    each = (centre[high] - centre[low]) / apart if apart > 0 else centre.new_tensor(1 / size)
    middle = centre[low] + (torch.arange(size, device=at.device) - at[low]) * each
    return middle - each / 2, middle + each / 2


def _leaders(items: Sequence[Tensor]) -> list[Tensor]:
    """int64 [N] for the signatures [N, channels] of each item: the first token with the same; -1: it is dropped."""
    channels = torch.Generator("cpu").manual_seed(1)
    factors = torch.randint(-(2**62), 2**62, (RANDOM,), generator=channels, device="cpu").to(items[0].device)
    hashes = pad_sequence([((item[:, _KNOWN:] * LEVELS).round().long() * factors).sum(1) for item in items], True)
    hashes, order = hashes.sort(dim=1, stable=True)
    first = torch.arange(hashes.shape[1], device=hashes.device).expand_as(hashes)
    begins = torch.ones_like(hashes, dtype=torch.bool)
    begins[:, 1:] = hashes[:, 1:] != hashes[:, :-1]
    first = torch.where(begins, first, 0).cummax(1).values
    padded = torch.empty_like(order).scatter_(1, order, order.gather(1, first))
    of_items = []
    for item, leaders in zip(items, padded, strict=True):
        patch, index = item[:, PATCH] > 0.5, torch.arange(len(item), device=item.device)
        leaders = torch.where(item[:, PRESENT] < 0.5 / LEVELS, -1, leaders[: len(item)])
        of_items.append(torch.where(patch, leaders, index))
    return of_items


class _StandIn:
    """A model's inner module with some parts replaced."""

    def __init__(self, inner: nn.Module, replaced: Modules) -> None:
        self._inner = inner
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if isinstance(value, MethodType) and value.__self__ is self._inner:
            return MethodType(value.__func__, self)
        return value
