"""One image or video in the prompt: what each of its tokens shows, and which tokens share a merged one."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class View:
    """A grid of patches that shows an image, its tiles put together, or a frame of a video.

    Attributes:
        token: int64 [rows, columns], the item's token at each patch; -1 where the language model does not get it.
        seen: float [rows, columns, 3], each patch as the encoder saw it.
        covered: see `Item.covered`.
    """

    token: Tensor
    seen: Tensor
    covered: tuple[float, float] = (1.0, 1.0)


@dataclass(frozen=True, eq=False, repr=False)
class Item:
    """One image or video, of N tokens in the prompt.

    A patch is a token that shows a part of a picture: of the image itself, a tile of it, or a frame. Class, register
    and learned tokens, such as the newline of tiles, stand for themselves, and no budget counts them.

    Attributes:
        leaders: int64 [N], for every token the first one of its group; -1 for dropped tokens.
        patch: bool [N], whether the token is a patch.
        picture: int64 [N], which of the item's pictures it shows most of.
        at: float [N, 2], the row and column of that picture's patches.
        seen: float [N, 3], the colour that the encoder saw there.
        shown: float [pictures, 3, rows, columns], the colours of every picture that the item was cut into.
        video: whether the pictures are frames.
        covered: the part of a picture's height, and of its width, that its patches cover, from the upper left corner.
        kept_by_layer: int64 [layers, pictures], the tokens left of each picture after every encoder layer that may
            merge; none where no encoder ran.
        chosen_for: int64 [words], the ids of the prompt that a reducer has read to choose these tokens; None: it read
            none.
    """

    leaders: Tensor
    patch: Tensor
    picture: Tensor
    at: Tensor
    seen: Tensor
    shown: Tensor
    video: bool
    covered: tuple[float, float] = (1.0, 1.0)
    kept_by_layer: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.int64, device="cpu"))
    chosen_for: Tensor | None = None

    def __repr__(self) -> str:
        what = f"video of {self.pictures} frames" if self.video else f"image in {self.pictures} parts"
        what = "image" if self.pictures == 1 and not self.video else what
        return f"<dymu {what}: kept {self.kept} of {len(self.leaders)} tokens>"

    @property
    def pictures(self) -> int:
        """How many pictures the item was cut into."""
        return len(self.shown)

    @cached_property
    def group(self) -> Tensor:
        """int64 [N], the merged token behind every token, numbered by first appearance; -1 for dropped tokens."""
        index = torch.arange(len(self.leaders), device=self.leaders.device)
        number = (self.leaders == index).cumsum(0) - 1
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
        """Of each picture, how many merged tokens no earlier picture has."""
        index = torch.arange(len(self.leaders), device=self.leaders.device)
        leads = self.patch & (self.leaders == index)
        counts: list[int] = torch.bincount(self.picture[leads], minlength=self.pictures).tolist()
        return counts

    @cached_property
    def mixes(self) -> bool:
        """Whether some tokens are means over several of the encoder's."""
        return bool(((self.at - self.at.round()).abs() > 1e-3)[self.patch].any())

    @cached_property
    def grids(self) -> list[Tensor]:
        """int64 [rows, columns] for each view: the token that shows each part of it; -1 where there is none.

        Raises:
            ValueError: the tokens are no grids.
        """
        if self.apart:
            return [self._grid(number)[0] for number in range(self.pictures)]
        return [self._grid(0)[0], self._tiles()]

    @cached_property
    def location(self) -> Tensor:
        """float [N, 4], the part of the user's picture that each token shows: left, top, right, bottom in widths and
        heights of it (of what the processor left of it, where that crops); nan for tokens that are no patches. Of tiles
        that the family does not put together, the part of the tile.

        Raises:
            ValueError: see `grids`.
        """
        boxes = torch.full((len(self.leaders), 4), torch.nan, dtype=torch.float32, device=self.leaders.device)
        for grid in self.grids:
            size = torch.tensor(grid.shape, dtype=torch.float32, device=grid.device).flip(0)
            column_row = (grid >= 0).nonzero().flip(1)
            boxes[grid[grid >= 0]] = torch.cat((column_row / size, (column_row + 1) / size), 1)
        return boxes

    @cached_property
    def views(self) -> list[View]:
        """The whole image, and where it was cut into tiles these put together; or every frame of a video, or every tile
        that the family does not put together.

        Raises:
            ValueError: see `grids`.
        """
        if self.apart:
            return [self._view(number) for number in range(self.pictures)]
        tiles = self.grids[1]
        return [self._view(0), View(tiles, self.seen[tiles])]

    @property
    def apart(self) -> bool:
        """Whether every picture stands by itself: frames, and tiles that the family does not put together."""
        return self.video or self.pictures == 1 or bool(self.patch.all())

    def _grid(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """The tokens of one picture as a grid, and the rows and columns of its patches that they show, rising."""
        tokens = (self.patch & (self.picture == number)).nonzero()[:, 0]
        (rows, row), (columns, column) = (
            (self.at[tokens, axis] * 1024).round().unique(return_inverse=True) for axis in range(2)
        )
        grid = torch.full((len(rows), len(columns)), -1, device=tokens.device)
        grid[row, column] = tokens
        if int((grid >= 0).sum()) != len(tokens):
            raise ValueError(f"{len(tokens)} image tokens are no grid of {len(rows)} × {len(columns)} patches")
        return grid, rows / 1024, columns / 1024

    def _view(self, number: int) -> View:
        """One picture, of which each token may show several patches."""
        grid, rows, columns = self._grid(number)
        shown = self.shown[number]
        row, column = (_nearest(lines, size) for lines, size in zip((rows, columns), shown.shape[1:], strict=True))
        token = torch.where((row[:, None] < 0) | (column < 0), -1, grid[row[:, None], column])
        return View(token, shown.permute(1, 2, 0), self.covered)

    def _tiles(self) -> Tensor:
        """The tokens of the tiles put together, whose rows each end with a learned token."""
        whole = self.patch & (self.picture == 0)
        index = (~whole & (whole.cumsum(0) > 0)).nonzero()[:, 0]
        patch = self.patch[index]
        rows = int((~patch).sum())
        grid = index.view(rows, -1) if rows and len(index) % rows == 0 else index[None]
        if not torch.equal(patch.view_as(grid).sum(1), patch.new_full((rows,), grid.shape[1] - 1, dtype=torch.long)):
            raise ValueError(f"{len(index)} image tokens are no rows of tiles put together")
        return grid[:, :-1]


def _nearest(lines: Tensor, size: int) -> Tensor:
    """int64 [size]: for each of so many rows or columns of patches, which of the rising `lines` shows it; -1: none."""
    index = torch.arange(size, device=lines.device)
    apart, nearest = (index[:, None] - lines).abs().min(1)
    spacing = (lines[1:] - lines[:-1]).median() if len(lines) > 1 else lines.new_tensor(float(size))
    return torch.where(apart > spacing / 2 + 1e-3, -1, nearest)
