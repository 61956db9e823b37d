"""Where merged tokens stand in the prompt, in any family.

Families cut images into tiles, take padding off, add learned tokens at the ends of rows, shrink large images and pool
the frames of videos. The family's code does all of that once more, on signatures instead of features. The signature of
a merged token is a few random numbers, so equal signatures are equal features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import getattr_static, isfunction
from itertools import pairwise
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, one_hot, pad
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_outputs import BaseModelOutputWithPooling

from dymu.errors import BadPrompt, UnsupportedModel
from dymu.families.resolve import Modality, Parts, find
from dymu.item import Item
from dymu.merging import Pictures
from dymu.token_map import TokenMap, take

RANDOM = 56
"""Random numbers in a signature. Means over different tokens differ in the first one, maxima after a few more."""
LEVELS = 2**14
"""Steps of a random number between 0 and 1 that count as different: rounding errors are far below, and weights of a
mean that differ by less make no difference to features either."""

Modules = dict[str, Any]
"""Parts of a model by path."""

PATCH, PRESENT, PICTURE, ROW, COLUMN, SEEN = 0, 1, 2, 3, 4, slice(5, 8)
"""Channels of a signature, ahead of the random ones."""
_KNOWN = 8


def trace(
    parts: Parts,
    modality: Modality,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    pictures: Pictures,
    tokens: TokenMap,
    seen: Tensor | Sequence[Tensor],
) -> list[Item]:
    """The items of one call, as they stand in the prompt.

    A copy of a merged token is of its group. Where the family pools or shrinks, tokens are means, and equal means over
    the same tokens are one group.

    Args:
        parts: of the model.
        modality: what the items are.
        args, kwargs: what the inner module's `get_image_features` or `get_video_features` was called with.
        pictures: that they show.
        tokens: the encoder's tokens (units) of each picture, prefix included, to the merged ones.
        seen: of each picture [3, rows, columns], each token as the encoder saw it.

    Raises:
        UnsupportedModel: the family pools with learned weights.
    """
    if modality == "video" and parts.pools_with_weights:
        raise UnsupportedModel(
            "this model pools the frames of videos with learned weights, which dymu cannot follow; "
            "spatial_pool_mode average and max are known."
        )
    pixels = _pixels(modality, args, kwargs)
    items = _in_prompt(parts, modality, args, kwargs, pictures, _signatures(tokens, seen, pictures))
    leaders = _leaders(items)
    patches = [item[:, PATCH] > 0.5 for item in items]
    starts = [len(seen)]
    for item, patch in zip(reversed(items), reversed(patches), strict=True):
        starts.insert(0, round(float(item[patch, PICTURE].min())) if bool(patch.any()) else starts[0])
    of_item = [(item[:, PICTURE] - start).round().long() for item, start in zip(items, starts, strict=False)]
    if modality == "image" and parts.family.cuts_images:
        of_item = _most_of(parts, args, kwargs, pictures, starts)
    device = seen[0].device
    return [
        Item(
            leaders=leader.to(device),
            patch=patch.to(device),
            picture=picture.to(device),
            at=item[:, ROW : COLUMN + 1].to(seen[0]),
            seen=item[:, SEEN].to(seen[0]),
            shown=torch.stack(list(seen[start:end])) if start < end else seen[0].new_zeros(0, 3, 0, 0),
            video=modality == "video",
            covered=_covered(parts, pictures, pixels),
        )
        for item, patch, picture, leader, start, end in zip(
            items, patches, of_item, leaders, starts[:-1], starts[1:], strict=True
        )
    ]


def _most_of(
    parts: Parts, args: Sequence[Any], kwargs: dict[str, Any], pictures: Pictures, starts: Sequence[int]
) -> list[Tensor]:
    """int64 [N] for each image, whose pictures begin at `starts`: which of them each token shows most of."""
    lengths = [end - start for start, end in pairwise(starts)]
    number = torch.cat([torch.arange(length, device="cpu") for length in lengths])
    length = pictures.layout(number.device).length
    of_picture = one_hot(number, max(lengths)).float().repeat_interleave(length, 0)
    return [item.argmax(1) for item in _in_prompt(parts, "image", args, kwargs, pictures, of_picture)]


def _in_prompt(
    parts: Parts,
    modality: Modality,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    pictures: Pictures,
    channels: Tensor,
) -> list[Tensor]:
    """[N, K] for each item: channels [S, K] of the encoder's tokens (units), picture after picture, as the family
    arranges them, without projection.

    Learned tokens are 0 in every channel.
    """
    count, family = channels.shape[-1], parts.family
    hidden = parts.language_model.config.hidden_size
    width = -(-count // hidden) * hidden  # some families reshape features by it

    def projected(*args: Any, **named: Any) -> Tensor:
        features: Tensor = args[0] if args else next(iter(named.values()))
        if family.regroups == "projector" and pictures.side > 1:
            features = pictures.first_of_units(features)
        # The features of several layers, and of the patches of a unit, are concatenated.
        return pad(features[..., :count], (0, width - count))

    replaced: Modules = {name: channels.new_zeros(width) for name in family.learned}
    if family.projector is not None:
        replaced[family.projector] = projected
    # Some families return the frames of a video one by one.
    items = _family_code(parts, modality, args, kwargs, pictures, channels, replaced)
    return [item.reshape(-1, count if family.projector is None else width)[:, :count] for item in items]


def features_of(
    parts: Parts,
    modality: Modality,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    pictures: Pictures,
    tokens: TokenMap,
    hidden: Tensor,
) -> Any:
    """The features of each item, as the family's code arranges them.

    Args:
        parts, modality, args, kwargs, pictures, tokens: see `trace`.
        hidden: [pictures, M, C], the encoder's merged tokens in the one layer that the model reads.
    """
    dropped, (pooler, projector) = parts.dropped(), (parts.pooler, parts.projector)
    expand, merged = tokens.drop(dropped).expand, hidden[:, dropped:]
    if modality == "video" and pooler is not None and parts.family.pooler is not None:
        replaced: Modules = {parts.family.pooler: lambda _: pooler(expand(merged))}
    else:
        assert projector is not None
        replaced = {parts.family.projector or "": lambda _: expand(projector(merged))}
    nothing = hidden.new_zeros(()).expand(pictures.layout(hidden.device).total, hidden.shape[-1])
    return _family_code(parts, modality, args, kwargs, pictures, nothing, replaced)


def _family_code(
    parts: Parts,
    modality: Modality,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    pictures: Pictures,
    channels: Tensor,
    replaced: Modules,
) -> Any:
    """What the family's code makes of encoder tokens [S, C] with some parts of the model replaced."""
    family = parts.family

    def encoded(*_args: Any, **_kwargs: Any) -> BaseModelOutputWithPooling:
        if parts.merger is not None:
            patches = next(parts.tower.parameters()).new_zeros(len(pictures.grids), 1, parts.width)
            output = BaseModelOutputWithPooling(last_hidden_state=patches, pooler_output=pictures.by_rows(channels))
            output.deepstack_features = []
            return output
        if family.regroups == "tower":
            units = channels if pictures.cut else channels.unflatten(0, (len(pictures.grids), -1))
            return BaseModelOutputWithPooling(last_hidden_state=units, pooler_output=units)
        hidden = pictures.to_patches(channels)
        hidden = hidden if pictures.cut or hidden.ndim == 3 else hidden[None]
        hidden_states = (hidden,) * (len(parts.encoder_modules) + 1)
        return BaseModelOutputWithPooling(last_hidden_state=hidden, hidden_states=hidden_states)

    stand_in = StandIn(parts.inner, {f"{family.tower.split('.')[0]}.forward": encoded, **replaced})
    get_features = getattr(type(parts.inner), f"get_{modality}_features")
    return get_features(stand_in, *args, **{**kwargs, "return_dict": True}).pooler_output


def order_of(parts: Parts, args: Sequence[Any], kwargs: Mapping[str, Any], pictures: Pictures) -> Tensor | None:
    """See `Pictures.order`. The encoder's own code says it, run without its layers on these arguments."""
    kind, like = parts.tower_kind, next(parts.tower.parameters())
    if parts.merger is None or pictures.arrangement != "packed":
        return None
    numbers = torch.arange(pictures.layout(like.device).total, device=like.device)[:, None]
    patches = like.new_zeros(len(numbers) * pictures.side**2, parts.width)
    replaced = {kind.layers: (), kind.merger: lambda *_: numbers, kind.embedder: lambda *_: patches}
    tower = StandIn(parts.tower, {path: part for path, part in replaced.items() if path is not None})
    order: Tensor = tower(*args, **kwargs).pooler_output[:, 0]
    return None if torch.equal(order, numbers[:, 0]) else order


def _signatures(tokens: TokenMap, seen: Tensor | Sequence[Tensor], pictures: Pictures) -> Tensor:
    """float64 [S, channels] of the encoder's tokens (units), picture after picture."""
    device = seen[0].device
    device = torch.device("cpu") if device.type == "mps" else device  # it has no float64
    layout, prefix = pictures.layout(device), pictures.prefix
    picture = torch.arange(layout.batch, device=device).repeat_interleave(layout.length)
    columns = torch.tensor([columns for _, columns in pictures.unit_grids], device=device)[picture]
    index = layout.position - prefix
    shows = index >= 0
    signatures = torch.zeros(layout.total, _KNOWN + RANDOM, dtype=torch.float64, device=device)
    signatures[:, PATCH] = shows.double()
    known = torch.stack((picture, index // columns, index % columns), 1).double()
    signatures[:, PICTURE : COLUMN + 1] = pictures.by_layers(known * shows[:, None])
    colours = torch.cat([part.flatten(1).mT for part in seen]).to(device, torch.float64)
    signatures[shows, SEEN] = pictures.by_layers(colours)
    generator = torch.Generator(device).manual_seed(0)
    random = torch.rand(len(seen), tokens.width, RANDOM, generator=generator, dtype=torch.float64, device=device)
    group = tokens.group.to(device)
    there = layout.pack(group).flatten() >= 0
    signatures[:, PRESENT] = there.double()
    signatures[:, _KNOWN:] = layout.pack(take(random, group.clamp(min=0))).flatten(0, 1) * there[:, None]
    return signatures


def _pixels(modality: Modality, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """Of a call of the inner module's `get_image_features` or `get_video_features`."""
    pixels: Tensor = args[0] if args else kwargs["pixel_values" if modality == "image" else "pixel_values_videos"]
    return pixels


def pictures_of(parts: Parts, modality: Modality, arguments: Mapping[str, Any], pixels: Tensor) -> Pictures:
    """The pictures that the encoder gets.

    Args:
        modality, arguments: of the call of `get_image_features` or `get_video_features`.
        pixels: the encoder's first argument.

    Raises:
        BadPrompt: the patches of a picture are not whole units, or it is not said how large it is.
    """
    kind, family = parts.tower_kind, parts.family
    if kind.arrangement in ("packed", "padded"):
        named = ((name or "").format(modality=modality) for name in (family.grid, family.unit) if "{" in (name or ""))
        missing = [name for name in named if arguments.get(name) is None]
        if missing:
            raise BadPrompt(
                f"the {modality}s come without {' and '.join(missing)}, so that it is not known where each begins and "
                "ends; give the model all that its processor makes of them."
            )
    side = parts.side(modality, arguments)
    sizes = arguments.get((family.grid or "").format(modality=modality))
    length = 0
    if sizes is None or kind.arrangement == "batch":
        grids = [_grid(parts, *pixels.shape[-2:])] * len(pixels)
    else:
        sizes = torch.as_tensor(sizes, device="cpu")
        if sizes.ndim == 4:  # in older transformers: the frames of each video
            sizes = sizes.flatten(0, 1)
        length = sizes.shape[1] if sizes.ndim == 3 else 0
        of_items = sizes.tolist() if not length else _padded_grids(sizes)
        grids = []
        for *frames, height, width in of_items:
            if frames:
                grids += [(height, width)] * frames[0]
            else:
                grids.append((height, width) if length else _grid(parts, height, width))
    for rows, columns in grids:
        if rows % side or columns % side:
            raise BadPrompt(
                f"a picture of {rows} × {columns} patches does not come out even in units of {side} × {side}, which "
                "this model makes one token of; let the model's own processor set the size of its pictures."
            )
    within = parts.merger is not None and kind.taps is None
    regroups = not within and (side > 1 or family.regroups == "tower")
    cut = sizes is not None and kind.arrangement != "batch" and (len(of_items[0]) == 3 or length > 0)
    return Pictures(tuple(grids), side, parts.prefix, kind.arrangement, regroups, cut, length)


def _padded_grids(positions: Tensor) -> list[list[int]]:
    """Rows and columns of each picture, by the column and row [pictures, P, 2] of each patch, -1 for padding.

    Raises:
        BadPrompt: patches do not come row after row, and then padding.
    """
    there = positions[..., 0] >= 0
    grids = []
    for places, exist in zip(positions, there, strict=True):
        columns, rows = (places.amax(0) + 1).tolist()
        raster = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).flip(1)
        if int(exist.sum()) != len(raster) or not torch.equal(places[: len(raster)].cpu(), raster.view(-1, 2)):
            raise BadPrompt(
                "the patches of a picture do not come row after row with padding behind, as its positions say, which "
                "dymu cannot follow; give pixels and positions as the model's own processor makes them."
            )
        grids.append([rows, columns])
    return grids


def _grid(parts: Parts, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of the patches of a picture; what is left over at the ends is not seen."""
    rows, columns = parts.patch_sides
    return height // rows, width // columns


def _covered(parts: Parts, pictures: Pictures, pixels: Tensor) -> tuple[float, float]:
    """See `Item.covered`."""
    if pictures.arrangement != "batch":
        return 1.0, 1.0
    (height, width), (rows, columns) = parts.patch_sides, pictures.grids[0]
    return rows * height / pixels.shape[-2], columns * width / pixels.shape[-1]


def pixels_of(pictures: Pictures, parts: Parts, pixels: Tensor) -> Tensor | Sequence[Tensor]:
    """Of each picture what the encoder gets of it: [3, height, width], or its patches [N, ...]."""
    if pictures.arrangement == "batch":
        return pixels
    if pictures.cut:
        counts = [rows * columns for rows, columns in pictures.grids]
        patches = pixels[pictures.there(pixels.device)] if pictures.length else pixels
        split: Sequence[Tensor] = patches.reshape(sum(counts), -1).split(counts)
        return split
    height, width = parts.patch_sides
    return [
        picture[:, : rows * height, : columns * width]
        for picture, (rows, columns) in zip(pixels, pictures.grids, strict=True)
    ]


def seen_by(pictures: Pictures, parts: Parts, pixels: Tensor) -> Tensor | Sequence[Tensor]:
    """Of each picture [3, rows, columns]: the mean colour of each unit."""
    of_each = pixels_of(pictures, parts, pixels.detach())
    height, width = (patch * pictures.side for patch in parts.patch_sides)
    if isinstance(of_each, Tensor):
        return avg_pool2d(of_each.float(), (height, width))
    if not pictures.cut:
        return [avg_pool2d(picture.float(), (height, width)) for picture in of_each]
    channels_last = pictures.arrangement == "padded"
    shape, pixel = ((-1, 3), 1) if channels_last else ((3, -1), 2)
    colours = torch.cat([patches.unflatten(1, shape).float().mean(pixel) for patches in of_each])
    units = pictures.to_units(colours).unflatten(0, (-1, pictures.side**2)).mean(1)
    grids = pictures.unit_grids
    split = units.split([rows * columns for rows, columns in grids])
    return [part.mT.unflatten(1, shape) for part, shape in zip(split, grids, strict=True)]


def locations(items: Sequence[Item], pictures: Pictures) -> Tensor:
    """See `dymu.reducers.Shown.location`. Computed from where two tokens at opposite corners of each picture lie.

    Args:
        items: with nothing merged.
        pictures: that they show.
    """
    boxes = []
    sizes = iter(pictures.unit_grids)
    for item in items:
        centre = (item.location[:, :2] + item.location[:, 2:]).flip(1) / 2  # row, then column, as `at`
        for number, (rows, columns) in zip(range(item.pictures), sizes, strict=False):
            tokens = item.patch & (item.picture == number)
            top, bottom = _edges(item.at[tokens, 0], centre[tokens, 0], rows)
            left, right = _edges(item.at[tokens, 1], centre[tokens, 1], columns)
            sides = (left.expand(rows, -1), top[:, None].expand(-1, columns),
                     right.expand(rows, -1), bottom[:, None].expand(-1, columns))  # fmt: skip
            boxes.append(torch.stack(sides, -1).flatten(0, 1))
    of_layers = pictures.by_layers(torch.cat(boxes)).split([len(box) for box in boxes])
    return pad_sequence(list(of_layers), True, torch.nan)


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


class StandIn:
    """A module with some parts, at dotted paths, replaced; its own methods run on these."""

    def __init__(self, module: nn.Module, replaced: Modules) -> None:
        self._module = module
        within: dict[str, Modules] = {}
        for path, part in replaced.items():
            name, _, rest = path.partition(".")
            if rest:
                within.setdefault(name, {})[rest] = part
            else:
                self.__dict__[name] = part
        self.__dict__.update({name: StandIn(find(module, name), parts) for name, parts in within.items()})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        method = getattr_static(type(self._module), name, None)
        return MethodType(method, self) if isfunction(method) else getattr(self._module, name)
