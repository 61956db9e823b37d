"""Which parts of a picture became one token, how many they are, and after which encoder layer."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dymu.handle import Handle
from dymu.item import Item
from dymu.media.drawing import recognise
from dymu.reducers import Candidates, FixedMerge, Reduced, Reducer, Shown, SomeMerge, Stage, Tokens
from dymu.report import Report
from dymu.token_map import TokenMap

BEHIND = -1
"""In place of a layer: tokens merged behind the encoder, such as where they stand in the prompt."""


@dataclass(frozen=True, eq=False)
class Watching(Reducer):
    """Another reducer, of which it is remembered what had merged ahead of each layer, and at the end.

    Attributes:
        maps: of each picture's tokens (units).
        shown: what the call showed; one entry.
    """

    rule: Reducer
    maps: list[TokenMap] = field(default_factory=list)
    shown: list[Shown] = field(default_factory=list)

    @classmethod
    @contextmanager
    def of(cls, handle: Handle) -> Iterator[Watching]:
        """Watches, within `handle.at`, the calls of this thread."""
        state = handle._state
        before = state.rules
        assert isinstance(before, Reducer)
        watching = cls(before)
        try:
            state.rules = watching
            yield watching
        finally:
            state.rules = before

    @property
    def share(self) -> FixedMerge | None:
        """See `ThresholdMerge.share`."""
        return getattr(self.rule, "share", None)

    def check_shown(self, shown: Shown, images: Collection[int] | None = None) -> None:
        self.rule.check_shown(shown, images)

    def reduces(self, stage: Stage, shown: Shown) -> bool:
        return stage == "after_encoder" or self.rule.reduces(stage, shown)

    def in_layer(self, candidates: Candidates) -> Tensor | SomeMerge | None:
        self.maps.append(candidates.state.map.drop(candidates.prefix))
        if not self.shown:
            self.shown.append(candidates.shown)
        return self.rule.in_layer(candidates)

    def after_encoder(self, tokens: Tokens) -> Reduced | None:
        self.maps.append(tokens.map)
        return self.rule.after_encoder(tokens) if self.rule.reduces("after_encoder", tokens.shown) else None

    def in_prompt(self, tokens: Tokens) -> Reduced | None:
        return self.rule.in_prompt(tokens)

    def layers(self) -> tuple[Tensor, Tensor]:
        """int64 [pictures, units] both: the layer (1, 2, ...) after which the group of each last grew, 0 for none; and
        how many are in it."""
        sizes = torch.stack([m.size().gather(1, m.group.clamp(min=0)) for m in self.maps])
        grew = sizes[1:] != sizes[:-1]
        number = torch.arange(1, len(sizes), device=sizes.device)[:, None, None]
        return (grew * number).amax(0), sizes[-1].long()


@dataclass(frozen=True)
class Group:
    """Tokens that became one.

    Attributes:
        size: how many of the picture's tokens.
        layer: after which encoder layer the last of them joined; 0: it stands for itself; `BEHIND`; None: not known.
        cells: rows and columns of the patches, [n, 2].
        colour: their mean.
    """

    size: int
    layer: int | None
    cells: np.ndarray
    colour: tuple[int, int, int]


@dataclass(frozen=True)
class Groups:
    """All groups of one picture, the largest first.

    Attributes:
        grid: rows and columns of the patches.
        box: what these cover, (left, top, right, bottom) in widths and heights of the picture.
        size: width and height of the picture as it is shown.
    """

    groups: list[Group]
    grid: tuple[int, int]
    box: tuple[float, float, float, float]
    size: tuple[int, int]


def groups_of(report: Report, watching: Watching, image: Image.Image, longest: int) -> Groups | None:
    """The groups of the one image of a call, on a picture of at most so many pixels; None: they cannot be drawn."""
    try:
        view = report.groups(image, slice(None))
        picture, fit = recognise(image, view.seen.float().cpu().numpy(), view.covered)
    except (ValueError, IndexError):  # it finds each patch in the image by its colours, and there may be none
        return None
    numbers = view.token.cpu().numpy()
    scale = min(longest / max(picture.size), 1.0)
    size = (max(round(picture.width * scale), 1), max(round(picture.height * scale), 1))
    rows, columns = numbers.shape
    colours = _colours(picture, fit.box, rows, columns)
    sizes, layers = _by_group(report.items, watching)
    groups = []
    for number in np.unique(numbers[numbers >= 0]):
        cells = np.argwhere(numbers == number)
        red, green, blue = colours[cells[:, 0], cells[:, 1]].mean(0).round().astype(int).tolist()
        groups.append(Group(sizes[number], layers[number], cells, (red, green, blue)))
    groups.sort(key=lambda group: -group.size)
    return Groups(groups, (rows, columns), fit.box, size)


def _colours(picture: Image.Image, box: tuple[float, float, float, float], rows: int, columns: int) -> np.ndarray:
    """[rows, columns, 3]: the colour of each patch."""
    left, top, right, bottom = box
    edges = (left * picture.width, top * picture.height, right * picture.width, bottom * picture.height)
    fine = picture.transform((columns * 8, rows * 8), Image.Transform.EXTENT, edges, Image.Resampling.BILINEAR)
    return np.asarray(fine.resize((columns, rows), Image.Resampling.BOX), dtype=np.float32)


def _by_group(items: list[Item], watching: Watching) -> tuple[list[int], list[int | None]]:
    """The size and the layer of each group, counted over the items one after the other."""
    sizes, layers = list[int](), list[int | None]()
    try:
        joined, in_encoder = watching.layers()
        location = watching.shown[0].location
    except (RuntimeError, IndexError, ValueError):  # pictures of which the encoder ran in several goes
        location = None
    begin = 0
    for item in items:
        count = torch.bincount(item.group[item.group >= 0], minlength=item.kept)
        layer = torch.zeros(len(item.leaders), dtype=torch.long, device=item.leaders.device)
        if location is not None:
            own = slice(begin, begin + item.pictures)
            unit = _unit_of(item, location[own])
            layer = joined[own].flatten()[unit]
            layer[count[item.group.clamp(min=0)] > in_encoder[own].flatten()[unit]] = BEHIND
        begin += item.pictures
        of_group = torch.full((item.kept,), BEHIND, device=layer.device)
        there = item.group >= 0
        of_group = of_group.scatter_reduce(0, item.group[there], layer[there], "amax")
        sizes += count.tolist()
        layers += [
            0 if size == 1 else None if location is None else last
            for size, last in zip(count.tolist(), of_group.tolist(), strict=True)
        ]
    return sizes, layers


def _unit_of(item: Item, location: Tensor) -> Tensor:
    """int64 [N]: for each token of an item the unit of its pictures, counted over these, that shows the same place."""
    centre = (item.location[:, :2] + item.location[:, 2:]).to(location) / 2
    of_units = (location[..., :2] + location[..., 2:]) / 2
    unit = torch.zeros(len(centre), dtype=torch.long, device=centre.device)
    for picture in range(item.pictures):
        tokens = (item.patch & (item.picture == picture)).nonzero()[:, 0]
        if len(tokens):
            apart = torch.cdist(centre[tokens].nan_to_num(9.0), of_units[picture].nan_to_num(-9.0))
            unit[tokens] = picture * location.shape[1] + apart.argmin(1)
    return unit
