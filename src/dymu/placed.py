"""How one image or video lies in the prompt: what stands at every place, and where in the picture that is."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class View:
    """A grid of patches that shows an image, its tiles put together, or a frame of a video.

    Attributes:
        place: int64 [rows, columns], the item's token at each patch; -1 where the language model does not get it.
        seen: float [rows, columns, 3], each patch as the encoder saw it.
    """

    place: Tensor
    seen: Tensor


@dataclass(frozen=True, eq=False)
class Placed:
    """One item, an image or a video, of N tokens in the prompt.

    A patch is a token that shows a place in a picture (the image itself, a tile of it, a frame). Class and register
    tokens and those that the model learned, such as the newline of tiles, are none: they stand for themselves, and no
    budget counts them.

    Attributes:
        leaders: int64 [N], for every token the first one of its group; -1 for one that is gone.
        patch: bool [N].
        picture: int64 [N], which of the item's pictures it shows, or shows most of.
        at: float [N, 2], row and column of the picture's patches that it shows.
        seen: float [N, 3], what the encoder saw there.
        shown: float [pictures, 3, rows, columns], what it saw of each picture that the item was cut into.
        video: whether they are frames.
    """

    leaders: Tensor
    patch: Tensor
    picture: Tensor
    at: Tensor
    seen: Tensor
    shown: Tensor
    video: bool

    @property
    def pictures(self) -> int:
        """How many pictures the item was cut into."""
        return len(self.shown)

    @cached_property
    def group(self) -> Tensor:
        """int64 [N], the merged token behind every token, numbered by first appearance; -1 for one that is gone."""
        own = torch.arange(len(self.leaders), device=self.leaders.device)
        number = (self.leaders == own).cumsum(0) - 1
        return torch.where(self.leaders < 0, -1, number[self.leaders.clamp(min=0)])

    @cached_property
    def kept(self) -> int:
        """Merged tokens."""
        return int(self.group.max()) + 1 if len(self.group) else 0

    @cached_property
    def budgeted(self) -> int:
        """Merged tokens that a budget counts: those of patches."""
        return self.kept - int((~self.patch).sum())

    @property
    def fresh(self) -> list[int]:
        """Of each picture, the merged tokens that stand in none before."""
        own = torch.arange(len(self.leaders), device=self.leaders.device)
        leads = self.patch & (self.leaders == own)
        counts: list[int] = torch.bincount(self.picture[leads], minlength=self.pictures).tolist()
        return counts

    @cached_property
    def mixes(self) -> bool:
        """Whether the family's layout makes means over several of the encoder's tokens."""
        return bool(((self.at - self.at.round()).abs() > 1e-3)[self.patch].any())

    @cached_property
    def views(self) -> list[View]:
        """The whole image, and where it was cut into tiles these put together; or every frame of a video.

        Raises:
            ValueError: the tokens are no grids.
        """
        picture = torch.where(self.patch, self.picture, -1)
        if self.video or self.pictures == 1:
            return [self._grid(picture == number, shown) for number, shown in enumerate(self.shown)]
        whole = picture == 0
        return [self._grid(whole, self.shown[0]), self._rows(~whole & (whole.cumsum(0) > 0))]

    def _grid(self, tokens: Tensor, shown: Tensor) -> View:
        """The view of the tokens [N] of one picture, each of which may show several of its patches."""
        index = tokens.nonzero()[:, 0]
        (rows, row), (columns, column) = (
            (self.at[index, axis] * 1024).round().unique(return_inverse=True) for axis in range(2)
        )
        small = torch.full((len(rows), len(columns)), -1, device=index.device)
        small[row, column] = index
        if int((small >= 0).sum()) != len(index):
            raise ValueError(f"{len(index)} image tokens are no grid of {len(rows)} × {len(columns)} patches")
        of_row, of_column = (
            _nearest(there / 1024, size) for there, size in zip((rows, columns), shown.shape[1:], strict=True)
        )
        place = torch.where((of_row[:, None] < 0) | (of_column < 0), -1, small[of_row[:, None], of_column])
        return View(place, shown.permute(1, 2, 0))

    def _rows(self, tokens: Tensor) -> View:
        """The view of the tokens [N] of several pictures, of which every row ends with a learned token."""
        index = tokens.nonzero()[:, 0]
        patch = self.patch[index]
        rows = int((~patch).sum())
        grid = index.view(rows, -1) if rows and len(index) % rows == 0 else index[None]
        if not torch.equal(patch.view_as(grid).sum(1), patch.new_full((rows,), grid.shape[1] - 1, dtype=torch.long)):
            raise ValueError(f"{len(index)} image tokens are no rows of tiles put together")
        return View(grid[:, :-1], self.seen[grid[:, :-1]])


def _nearest(places: Tensor, size: int) -> Tensor:
    """int64 [size]: for each of so many rows or columns of patches, which of the rising `places` shows it; -1: none."""
    own = torch.arange(size, device=places.device)
    apart, nearest = (own[:, None] - places).abs().min(1)
    step = (places[1:] - places[:-1]).median() if len(places) > 1 else places.new_tensor(float(size))
    return torch.where(apart > step / 2 + 1e-3, -1, nearest)
