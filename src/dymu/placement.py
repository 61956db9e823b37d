"""Where merged tokens stand in the prompt, in any family's layout.

Families cut images into tiles, take padding off, add learned tokens at the ends of rows, shrink what is too large and
pool the frames of videos. None of that is written again here: the family's own code runs a second time, on signatures
instead of features. A merged token's signature is a few random numbers, so what comes out tells what stands where:
equal signatures are equal features.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_outputs import BaseModelOutputWithPooling

from dymu.errors import UnsupportedModel
from dymu.families import Modality, Parts
from dymu.placed import Placed
from dymu.token_map import TokenMap

RANDOM = 56
"""Random numbers in a signature. Means over different tokens differ in the first, largest values after a few more."""
STEPS = 2**14
"""Steps of a random number between 0 and 1 that count as different: rounding errors are far below, and weights of a
mean that differ by less make no difference to features either."""

PATCH, PRESENT, PICTURE, ROW, COLUMN, SEEN = 0, 1, 2, 3, 4, slice(5, 8)
"""What the channels of a signature say ahead of the random ones."""
_KNOWN = 8


def place(
    parts: Parts, modality: Modality, args: Sequence[Any], kwargs: dict[str, Any], tokens: TokenMap, seen: Tensor
) -> list[Placed]:
    """How the items of one call lie in the prompt.

    A place that shows one merged token is of its group. One that shows a mean over several, where the family pools or
    shrinks, is a new group; equal means over the same ones share it.

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
    signatures = _signatures(tokens, seen, parts.prefix)
    items = _laid_out(parts, modality, args, kwargs, signatures)
    leaders = _leaders(items)
    patches = [item[:, PATCH] > 0.5 for item in items]
    firsts = [item[:, PICTURE].where(patch, torch.inf).min() for item, patch in zip(items, patches, strict=True)]
    starts = [round(first) for first in torch.stack(firsts).tolist()] + [len(seen)]
    pictures = [(item[:, PICTURE] - start).round().long() for item, start in zip(items, starts, strict=False)]
    if modality == "image" and parts.family.cuts_images:
        pictures = _most_of(parts, args, kwargs, signatures, starts)
    return [
        Placed(
            leaders=leader.to(seen.device),
            patch=patch.to(seen.device),
            picture=picture.to(seen.device),
            at=item[:, ROW : COLUMN + 1].to(seen),
            seen=item[:, SEEN].to(seen),
            shown=seen[start:end],
            video=modality == "video",
        )
        for item, patch, picture, leader, start, end in zip(
            items, patches, pictures, leaders, starts[:-1], starts[1:], strict=True
        )
    ]


def _most_of(
    parts: Parts, args: Sequence[Any], kwargs: dict[str, Any], signatures: Tensor, starts: Sequence[int]
) -> list[Tensor]:
    """int64 [N] for each image, the one of its pictures that each place shows most of.

    Means over neighbouring tiles are told apart by how much of each is in them.

    Args:
        starts: where the pictures of each image begin, and where the last ends.
    """
    lengths = [end - start for start, end in pairwise(starts)]
    own = torch.cat([torch.arange(length, device=signatures.device) for length in lengths])
    parts_of = torch.zeros(*signatures.shape[:2], max(lengths), device=signatures.device)
    parts_of.scatter_(2, own[:, None, None].expand(-1, signatures.shape[1], 1), 1.0)
    return [item.argmax(1) for item in _laid_out(parts, "image", args, kwargs, parts_of)]


def _laid_out(
    parts: Parts, modality: Modality, args: Sequence[Any], kwargs: dict[str, Any], channels: Tensor
) -> list[Tensor]:
    """[N, K] of each item: what the family makes of [pictures, encoder tokens, K] channels that nothing projects.

    Learned tokens are 0 in every channel.
    """
    count = channels.shape[-1]
    # Features of several layers come joined.
    own: dict[str, Any] = {parts.family.projector: lambda features: features[..., :count]}
    own |= {name: channels.new_zeros(count) for name in parts.family.learned}
    # In transformers 5.17 some videos come frame by frame.
    return [item.flatten(0, -2) for item in _packed(parts, modality, args, kwargs, channels, own)]


def features_of(
    parts: Parts, modality: Modality, args: Sequence[Any], kwargs: dict[str, Any], tokens: TokenMap, hidden: Tensor
) -> Any:
    """Features as the family packs them, of what its encoder leaves.

    Args:
        parts, modality, args, kwargs, tokens: see `place`.
        hidden: [pictures, M, C], the encoder's merged tokens in the one layer that the model reads.
    """
    expand = tokens.drop(parts.dropped()).expand
    pools = modality == "video" and parts.pooler is not None
    own = {parts.family.projector: parts.projector if pools else lambda merged: expand(parts.projector(merged))}
    if pools and parts.family.pooler is not None:
        own[parts.family.pooler] = lambda merged: parts.pooler(expand(merged))  # type: ignore[misc]
    return _packed(parts, modality, args, kwargs, hidden, own)


def _packed(
    parts: Parts, modality: Modality, args: Sequence[Any], kwargs: dict[str, Any], hidden: Tensor, own: dict[str, Any]
) -> Any:
    """What the family's code makes of encoder tokens [pictures, tokens, C], with some parts of the model's `own`."""
    output = BaseModelOutputWithPooling(
        last_hidden_state=hidden, hidden_states=(hidden,) * (len(parts.encoder_layers) + 1)
    )
    stand_in = _StandIn(parts.inner, {parts.family.tower: lambda *_, **__: output, **own})
    get_features = getattr(type(parts.inner), f"get_{modality}_features")
    return get_features(stand_in, *args, **{**kwargs, "return_dict": True}).pooler_output


def _signatures(tokens: TokenMap, seen: Tensor, prefix: int) -> Tensor:
    """float64 [pictures, encoder tokens, channels]"""
    device = torch.device("cpu") if seen.device.type == "mps" else seen.device  # it has no float64
    pictures, patches = tokens.batch, tokens.tokens - prefix
    columns = seen.shape[-1]
    own = torch.arange(patches, device=device)
    signatures = torch.zeros(pictures, tokens.tokens, _KNOWN + RANDOM, dtype=torch.float64, device=device)
    shows = signatures[:, prefix:]
    shows[..., PATCH] = 1
    shows[..., PICTURE] = torch.arange(pictures, device=device)[:, None]
    shows[..., ROW], shows[..., COLUMN] = own // columns, own % columns
    shows[..., SEEN] = seen.flatten(2).mT
    generator = torch.Generator(device).manual_seed(0)
    random = torch.rand(pictures, tokens.width, RANDOM, generator=generator, dtype=torch.float64, device=device)
    group = tokens.group.to(device)
    signatures[..., PRESENT] = group >= 0
    random = random.gather(1, group.clamp(min=0)[..., None].expand(-1, -1, RANDOM))
    signatures[..., _KNOWN:] = random * signatures[..., PRESENT, None]
    return signatures


def seen_by(pixels: Tensor, patches: int) -> Tensor:
    """Pictures [pictures, 3, height, width] averaged over each of `patches` patches: [pictures, 3, rows, columns]."""
    return adaptive_avg_pool2d(pixels.detach().float(), grid(patches, *pixels.shape[-2:]))


def grid(patches: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of the patches of a picture."""
    rows = max(round((patches * height / width) ** 0.5), 1)
    return rows, patches // rows


def _leaders(items: Sequence[Tensor]) -> list[Tensor]:
    """int64 [N] for the signatures [N, channels] of each item: the first token with the same; -1: it is gone."""
    channels = torch.Generator().manual_seed(1)
    factors = torch.randint(-(2**62), 2**62, (RANDOM,), generator=channels).to(items[0].device)
    hashes = pad_sequence([((item[:, _KNOWN:] * STEPS).round().long() * factors).sum(1) for item in items], True)
    hashes, order = hashes.sort(dim=1, stable=True)
    first = torch.arange(hashes.shape[1], device=hashes.device).expand_as(hashes)
    begins = torch.ones_like(hashes, dtype=torch.bool)
    begins[:, 1:] = hashes[:, 1:] != hashes[:, :-1]
    first = torch.where(begins, first, 0).cummax(1).values
    padded = torch.empty_like(order).scatter_(1, order, order.gather(1, first))
    found = []
    for item, leaders in zip(items, padded, strict=True):
        own = torch.arange(len(item), device=item.device)
        leaders = torch.where(item[:, PATCH] > 0.5, leaders[: len(item)], own)
        gone = (item[:, PATCH] > 0.5) & (item[:, PRESENT] < 0.5 / STEPS)
        found.append(torch.where(gone, -1, leaders))
    return found


class _StandIn:
    """A model's inner module with some parts of its own."""

    def __init__(self, inner: nn.Module, own: dict[str, Any]) -> None:
        self._inner = inner
        self.__dict__.update(own)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if isinstance(value, MethodType) and value.__self__ is self._inner:
            return MethodType(value.__func__, self)
        return value
