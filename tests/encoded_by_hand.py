"""Merging in the encoder once more, by transformers' own code and a mean over each group; of the library, only
descriptions."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn

from dymu.choices import Arrangement
from dymu.families.resolve import Modality, find, resolve


@dataclass(frozen=True)
class Encoder:
    """Where a model keeps what merging needs. A path may hold alternatives, see `dymu.families.resolve.find`.

    Attributes:
        tower: path from the model to its encoder.
        layers: from there to its layers.
        norm2: from a layer to what comes first behind the residual of attention.
        key: from a layer to the projection to keys, or to queries, keys and values.
        heads: of queries, which share the width of the encoder. There may be fewer of keys and values.
        fused: whether `key` projects to queries, keys and values, in this order.
        arrangement: of patches. Layers tell `packed` pictures apart by `cu_seqlens`.
        prefix: leading tokens of a picture that never merge, though they count where tokens are paired.
        unit: rows and columns of the patches that the family turns into one token.
        depth: layers that merge; None: all, since the last one is read.
    """

    tower: str
    layers: str
    norm2: str
    key: str
    heads: int
    fused: bool = False
    arrangement: Arrangement = "batch"
    prefix: int = 0
    unit: tuple[int, int] = (1, 1)
    depth: int | None = None


@dataclass
class Picture:
    """What attends to itself in full: an image, a tile or a frame. Its units are numbered in raster order.

    Attributes:
        rows: of each unit, where its patches stand among those of all pictures when the first layer gets them.
        order: the units that are left, as they stand. A merged unit goes by the one that the others merged into.
        window: of each unit.
        prefix: see `Encoder`.
        group: of each unit the one that it is merged into.
    """

    rows: list[list[int]]
    order: list[int]
    window: list[int]
    prefix: int
    group: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.group = list(range(len(self.rows)))

    def merge(self, key: Tensor, threshold: float, windowed: bool) -> None:
        """Merge each unit at an even place into the most similar one at an odd place, where that is above `threshold`.

        Args:
            key: [rows of all pictures, D], the mean over heads.
            windowed: whether every window is by itself: places count anew in each, and others are out of reach.
        """
        metric = nn.functional.normalize(torch.stack([key[rows].mean(0) for rows in self.rows]), dim=-1)
        similarity = (metric @ metric.T).tolist()
        row = {unit: self.window[unit] if windowed else 0 for unit in self.order}
        rows = [[unit for unit in self.order if row[unit] == number] for number in sorted(set(row.values()))]
        even = [unit for units in rows for place, unit in enumerate(units, self.prefix) if place % 2 == 0]
        odd = [unit for units in rows for place, unit in enumerate(units, self.prefix) if place % 2 == 1]
        into = {}
        for unit in even:
            reach = [other for other in odd if row[other] == row[unit]]
            if reach:
                best = max(reach, key=similarity[unit].__getitem__)
                if similarity[unit][best] > threshold:
                    into[unit] = best
        self.group = [into.get(unit, unit) for unit in self.group]
        left = [unit for unit in even if unit not in into] + odd
        self.order = sorted(left, key=self.window.__getitem__)

    @property
    def leaders(self) -> Tensor:
        """int64 [units], for every unit the first one of its group."""
        return torch.tensor([self.group.index(unit) for unit in self.group])


@dataclass(frozen=True)
class Encoded:
    """What an encoder gave.

    Attributes:
        leaders: after each layer that may merge, of each picture: int64 [units], for every unit, in raster order, the
            first one of its group.
        output: what the stock method returned, in float64: its features are copied to all members of a group.
    """

    leaders: list[list[Tensor]]
    output: Any

    @property
    def features(self) -> Tensor:
        """[tokens of all items, C], `pooler_output`."""
        return torch.cat([item.flatten(0, -2) for item in self.output.pooler_output])

    @property
    def counts(self) -> list[list[int]]:
        """After each layer that may merge, the units left of each picture."""
        return [[len(leaders.unique()) for leaders in layer] for layer in self.leaders]


def encoded_by_hand(
    model: Any,
    thresholds: Sequence[float],
    *,
    encoder: Encoder | None = None,
    modality: Modality = "image",
    **inputs: Any,
) -> Encoded:
    """Run the stock method `get_{modality}_features` with an encoder in which units merge.

    Attention to one token whose size is N is attention to N copies of it. So all patches pass the stock encoder, and in
    each layer, between attention and MLP, the patches of a merged unit are replaced by their means over its members, as
    are the angles by which the layer rotates them. What merges is decided in loops, on the keys ahead of any norm of
    keys and of rotation. It is computed in float64 as far as transformers lets it (some norms and rotations stay in
    float32).

    Args:
        thresholds: one per layer; nothing merges above 1, or past their end.
        encoder: of the model; None: as the library describes it.
        inputs: what the model takes; what the method does not take is left out.

    Raises:
        AssertionError: members of a group differ behind an attention: the description misses what tells them apart.
    """
    stock = copy.deepcopy(model).double()
    method = f"get_{modality}_features"
    get_features = getattr(stock if hasattr(stock, method) else stock.model, method)
    arguments = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
        if name in inspect.signature(get_features).parameters or name.startswith(f"{modality}_")
    }
    call = functools.partial(get_features, **arguments, return_dict=True)
    encoder = encoder or described(stock, modality, arguments)
    run = _Run(stock, encoder, thresholds, _pictures(stock, encoder, call, arguments))
    return Encoded(run.leaders, call())


def described(model: Any, modality: Modality, arguments: dict[str, Any]) -> Encoder:
    """The encoder of a model that the library describes, for a call with these arguments."""
    parts = resolve(model)
    side = parts.side(modality, arguments)
    kind, strategy = parts.tower_kind, parts.family.select_strategy
    key = kind.qkv or kind.key
    assert key is not None
    return Encoder(
        tower=f"{parts.family.inner}.{parts.family.tower}",
        layers=kind.layers,
        norm2=kind.norm2,
        key=key,
        heads=parts.heads,
        fused=kind.qkv is not None,
        arrangement=kind.arrangement,
        prefix=max(parts.prefix, parts.dropped(None if strategy is None else arguments.get(strategy))),
        unit=(side, side),
        depth=max(parts.feature_layers(arguments)),
    )


def mean_angles(share: Tensor, angles: Tensor) -> Tensor:
    """The mean over each group of the cosines, or of the sines, of all patches, [S, D]."""
    return share @ angles.double()


class _Run:
    """The hooks of one call. Tensors of all patches are [S, C] here, in the order that the first layer gets."""

    def __init__(self, model: Any, encoder: Encoder, thresholds: Sequence[float], pictures: list[Picture]) -> None:
        self.encoder, self.thresholds, self.pictures = encoder, thresholds, pictures
        self.leaders: list[list[Tensor]] = []
        self.key = self.correction = torch.empty(0)
        self.place = torch.empty(0, dtype=torch.long)
        self.windowed = False
        tower = find(model, encoder.tower)
        layers = list(find(tower, encoder.layers))[: encoder.depth]
        for index, layer in enumerate(layers):
            layer.register_forward_pre_hook(self.before_layer, with_kwargs=True)
            find(layer, encoder.key).register_forward_hook(self.after_key)
            find(layer, encoder.norm2).register_forward_pre_hook(functools.partial(self.before_mlp, index))
            layer.register_forward_hook(self.after_layer, prepend=True)
        tower.register_forward_hook(self.after_tower)

    def share(self, rows: int) -> Tensor:
        """[S, S], which part of every patch each one gets."""
        label = torch.arange(rows)
        for picture in self.pictures:
            for unit, leader in enumerate(picture.group):
                label[picture.rows[unit]] = torch.tensor(picture.rows[leader])
        same = (label == label[:, None]).double()
        return same / same.sum(1, keepdim=True)

    def before_layer(self, _layer: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Let merged units stand in their windows, with the mean of their members' angles."""
        x, kwargs = args[0], dict(kwargs)
        rows = x[..., 0].numel()
        self.place = torch.arange(rows)
        self.windowed = False
        if self.encoder.arrangement == "packed":
            windows: list[list[int]] = []
            for picture in self.pictures:
                units = sorted(range(len(picture.rows)), key=picture.rows.__getitem__)
                for window in sorted(set(picture.window)):
                    inside = [unit for unit in units if picture.window[picture.group[unit]] == window]
                    windows.append([row for unit in inside for row in picture.rows[unit]])
            self.place = torch.tensor([row for window in windows for row in window])
            self.windowed = len(kwargs["cu_seqlens"]) > len(self.pictures) + 1
            if self.windowed:
                lengths = [0, *(len(window) for window in windows if window)]
                kwargs["cu_seqlens"] = torch.tensor(lengths).cumsum(0, dtype=kwargs["cu_seqlens"].dtype)
        if (angles := kwargs.get("position_embeddings")) is not None:
            share = self.share(rows)
            kwargs["position_embeddings"] = tuple(mean_angles(share, part)[self.place] for part in angles)
        return (x.flatten(0, -2)[self.place].view_as(x), *args[1:]), kwargs

    def after_key(self, _module: Any, args: Any, output: Tensor) -> None:
        heads = self.encoder.heads
        key = self.in_order(output).unflatten(-1, (-1, args[0].shape[-1] // heads))
        if self.encoder.fused:
            key = key[:, heads : (heads + key.shape[1]) // 2]
        self.key = key.mean(1)

    def before_mlp(self, index: int, _module: Any, args: Any) -> Any:
        x = self.in_order(args[0])
        apart = (x - self.share(len(x)) @ x).abs().max()
        assert apart <= 1e-6 * x.abs().max(), f"members of one group differ behind the attention of layer {index}"
        if index < len(self.thresholds) and self.thresholds[index] <= 1:
            for picture in self.pictures:
                picture.merge(self.key, self.thresholds[index], self.windowed)
        self.leaders.append([picture.leaders for picture in self.pictures])
        averaged = self.share(len(x)) @ x
        self.correction = averaged - x
        return (averaged[self.place].view_as(args[0]),)

    def after_layer(self, _layer: Any, _args: Any, output: Any) -> Any:
        """The residual goes around the norm, where the mean was taken."""
        x = output[0] if isinstance(output, tuple) else output
        corrected = (self.in_order(x) + self.correction).view_as(x)
        return (corrected, *output[1:]) if isinstance(output, tuple) else corrected

    def after_tower(self, _tower: Any, _args: Any, output: Any) -> Any:
        """What earlier layers gave is averaged over the groups at the end: features of several layers are joined."""
        if getattr(output, "hidden_states", None) is not None:
            states = list(output.hidden_states)
            for layer, x in enumerate(states[: len(self.leaders) + 1]):
                if x is not None:
                    rows = x.flatten(0, -2)
                    states[layer] = (self.share(len(rows)) @ rows).view_as(x)
            output.hidden_states = tuple(states)
        return output

    def in_order(self, x: Tensor) -> Tensor:
        return x.flatten(0, -2)[self.place.argsort()]


def _pictures(model: Any, encoder: Encoder, call: Callable[[], Any], arguments: dict[str, Any]) -> list[Picture]:
    """Where the units of every picture stand when the first layer gets them."""
    tower, prefix, unit = find(model, encoder.tower), encoder.prefix, encoder.unit
    entering, segments = _dry_run(tower, encoder, call)
    if encoder.arrangement == "batch":
        batch, tokens = entering.shape[:2]
        patches = tokens - prefix
        columns = isqrt(patches) if unit != (1, 1) else patches
        assert unit == (1, 1) or columns**2 == patches, "families regroup pictures of one size as squares"
        return [
            _in_raster(number * tokens + prefix, patches // columns, columns, unit, prefix) for number in range(batch)
        ]
    if encoder.arrangement == "raster":
        pictures, start = [], 0
        for height, width in _shapes(tower, arguments):
            pictures.append(_in_raster(start, height, width, unit, prefix))
            start += height * width
        return pictures
    size = unit[0] * unit[1]
    full, finest = min(segments, key=len), max(segments, key=len)
    number = range(len(entering))
    if finest != full:  # the patches of a window were put together
        number = _dry_run(tower, encoder, call, tower.get_input_embeddings())[0][:, 0].tolist()
    pictures = []
    for start, end in pairwise(full):
        rows = sorted(range(start, end, size), key=number.__getitem__)
        window = [sum(row >= begin for begin in finest) for row in rows]
        order = sorted(range(len(rows)), key=rows.__getitem__)
        pictures.append(Picture([list(range(row, row + size)) for row in rows], order, window, prefix))
    return pictures


def _shapes(tower: Any, arguments: dict[str, Any]) -> list[list[int]]:
    """Rows and columns of patches of each picture, by what the model is told of its images or videos."""
    for name in ("image_grid_thw", "video_grid_thw"):
        if name in arguments:
            return [[rows, columns] for frames, rows, columns in arguments[name].tolist() for _ in range(frames)]
    return (arguments["image_sizes"] // tower.config.patch_size).tolist()


def _in_raster(start: int, height: int, width: int, unit: tuple[int, int], prefix: int) -> Picture:
    """A picture of so many patches in raster order, the first of which stands at row `start`."""
    assert height % unit[0] == width % unit[1] == 0
    rows = [
        [start + (row + i) * width + column + j for i in range(unit[0]) for j in range(unit[1])]
        for row in range(0, height, unit[0])
        for column in range(0, width, unit[1])
    ]
    return Picture(rows, list(range(len(rows))), [0] * len(rows), prefix)


def _dry_run(
    tower: Any, encoder: Encoder, call: Callable[[], Any], numbered: nn.Module | None = None
) -> tuple[Tensor, list[list[int]]]:
    """What the first layer gets, and the `cu_seqlens` of each layer. In the output of `numbered`, if there is one, each
    row holds its number."""
    entering: list[Tensor] = []
    segments: list[list[int]] = []

    def note(_layer: Any, args: Any, kwargs: dict[str, Any]) -> None:
        entering.append(args[0])
        segments.append(kwargs["cu_seqlens"].tolist() if encoder.arrangement == "packed" else [])

    def number(_module: Any, _args: Any, output: Tensor) -> Tensor:
        return torch.arange(len(output))[:, None].expand_as(output).to(output.dtype)

    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in find(tower, encoder.layers)]
    if numbered is not None:
        hooks.append(numbered.register_forward_hook(number))
    call()
    for hook in hooks:
        hook.remove()
    return entering[0], segments
