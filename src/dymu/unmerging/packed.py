"""Rows of different numbers of merged tokens, which travel as one where nothing looks from one token to another."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """Which tokens of padded rows there are.

    Args:
        there: bool [B, M].
    """

    there: Tensor

    @cached_property
    def _index(self) -> tuple[Tensor, Tensor]:
        rows, columns = self.there.nonzero(as_tuple=True)
        return rows, columns

    def pack(self, x: Tensor) -> Tensor:
        """Padded [B, M, ...] to [1, S, ...]."""
        return x[self._index][None]

    def pad(self, x: Tensor) -> Tensor:
        """The inverse of `pack`, with zeros."""
        return x.new_zeros(*self.there.shape, *x.shape[2:]).index_put(self._index, x[0])

    def pad_heads(self, x: Tensor) -> Tensor:
        """[1, H, S, D] to [B, H, M, D]."""
        return self.pad(x.transpose(1, 2)).transpose(1, 2)

    def at(self, index: Tensor) -> Tensor:
        """int64 [1, B * k], where the tokens at int64 [B, k] of each row are among those of all."""
        before = self.there.sum(1).cumsum(0) - self.there.sum(1)
        return (index + before[:, None]).view(1, -1)
