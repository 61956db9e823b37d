"""Average pooling: the fields of a grid become one token each."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dymu.errors import BadBudget
from dymu.reducers.keep import check_keep, in_tokens
from dymu.reducers.reducer import Reduced, Reducer, Shown, Stage, Tokens
from dymu.token_map import TokenMap, leaders_of


@dataclass(frozen=True)
class AveragePool(Reducer):
    """The grid of an image's tokens is averaged over fields as equal as possible, about `keep` of them.

    A grid of R x C tokens, `keep` being a part p of them, becomes R sqrt p x C sqrt p fields, one side rounded down or
    up and the other what comes nearest to `keep` then. Where an image is one picture, the encoder's tokens are
    averaged, else those in the prompt: of the whole image, of its tiles put together, and of each frame of a video.

    Args:
        keep: tokens of an image or video; a float up to 1 is a fraction.

    Raises:
        BadBudget: `keep` is not above 0; or in use, more than there are.
    """

    keep: int | float

    def __post_init__(self) -> None:
        check_keep(self)

    def check_fits(self, layers: int, tokens: int | None = None) -> None:
        if tokens is not None:
            self._part(tokens)

    def reduces(self, stage: Stage, shown: Shown) -> bool:
        return super().reduces(stage, shown) and (stage == "after_encoder") == shown.single

    def after_encoder(self, tokens: Tokens) -> Reduced:
        return self._pooled(tokens)

    def in_prompt(self, tokens: Tokens) -> Reduced:
        return self._pooled(tokens)

    def _part(self, tokens: int) -> float:
        part = in_tokens(self.keep, tokens) / tokens
        if part > 1:
            raise BadBudget(f"{tokens} tokens are too few to average over {self.keep:g} fields; take fewer.")
        return part

    def _pooled(self, tokens: Tokens) -> Reduced:
        field = torch.full_like(tokens.map.group, -1)
        for row, grids in enumerate(tokens.grids):
            part = self._part(sum(int((grid >= 0).sum()) for grid in grids))
            begin = 0
            for grid in grids:
                fields = _fields(grid, part)
                field[row, grid[grid >= 0]] = (begin + fields)[grid >= 0]
                begin += int(fields.max()) + 1
        first = field.gather(1, tokens.map.first()).masked_fill(~tokens.present, -1)
        return Reduced(TokenMap.from_leaders(leaders_of(first, tokens.map.tokens), tokens.present))


def _fields(grid: Tensor, part: float) -> Tensor:
    """int64 [rows, columns], the field that each cell of a grid lies in."""
    sides, wanted, scale = grid.shape, part * grid.numel(), math.sqrt(part)
    found = set[tuple[int, int]]()
    for axis, (side, other) in enumerate((sides, sides[::-1])):
        for fields in {max(int(side * scale), 1), min(math.ceil(side * scale), side)}:
            pair = fields, min(max(round(wanted / fields), 1), other)
            found.add(pair[::-1] if axis else pair)
    rows, columns = sides
    down, across = min(found, key=lambda pair: (abs(pair[0] * pair[1] - wanted), abs(pair[0] - rows * scale), pair))
    row = torch.arange(rows, device=grid.device) * down // rows
    column = torch.arange(columns, device=grid.device) * across // columns
    return row[:, None] * across + column
