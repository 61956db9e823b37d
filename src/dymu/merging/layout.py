"""How the tokens of a batch lie in memory: images of one length as [B, T, C], of several lengths packed, [1, S, C]."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Layout:
    """Images of a batch that keep different numbers of tokens travel as one row, image after image, without padding.

    Projections, norms and MLPs see that row; attention and matching, which must not mix images, see it padded. That
    rule, packed wherever the lengths differ, is the faster one on a CPU at every batch, see docs/encoder.md.

    Args:
        length: int64 [B], tokens of each image.
        longest: T, the largest of them.
        total: S, their sum.
    """

    length: Tensor
    longest: int
    total: int

    @classmethod
    def equal(cls, batch: int, tokens: int, device: torch.device | str | None = None) -> Layout:
        """Every image has `tokens` tokens."""
        return cls(torch.full((batch,), tokens, device=device), tokens, batch * tokens)

    @classmethod
    def of(cls, length: Tensor) -> Layout:
        """For int64 [B] lengths. One host synchronisation."""
        if len(length) == 1:
            total = longest = int(length)
        else:
            total, longest = torch.stack((length.sum(), length.max())).tolist()
        return cls(length, longest, total)

    @property
    def batch(self) -> int:
        return self.length.shape[0]

    @property
    def packed(self) -> bool:
        """Whether the lengths differ, so that tokens travel as [1, S, C]."""
        return self.total < self.batch * self.longest

    @cached_property
    def start(self) -> Tensor:
        """int64 [B, 1], where each image begins among all S tokens."""
        return (self.length.cumsum(0) - self.length)[:, None]

    def index(self, place: Tensor) -> Tensor:
        """Places [B, ...] within each image, to those among all S tokens."""
        return place if self.batch == 1 else place + self.start

    @cached_property
    def present(self) -> Tensor:
        """bool [B, T], the places that hold a token."""
        return torch.arange(self.longest, device=self.length.device) < self.length[:, None]

    @cached_property
    def _place(self) -> Tensor:
        """int64 [B * T], the packed token at each padded place; past an image's end, any."""
        place = self.index(torch.arange(self.longest, device=self.length.device))
        return place.clamp_(max=self.total - 1).flatten()

    @cached_property
    def _slot(self) -> Tensor:
        """int64 [S], the padded place of each packed token."""
        behind = torch.arange(self.batch, device=self.length.device) * self.longest - self.start[:, 0]
        shift = behind.repeat_interleave(self.length, output_size=self.total)
        return shift + torch.arange(self.total, device=self.length.device)

    def pad(self, x: Tensor) -> Tensor:
        """Tokens as they travel, to [B, T, ...]; past an image's end stands some token, which the reader must mask."""
        if not self.packed:
            return x
        return x[0].index_select(0, self._place).view(self.batch, self.longest, *x.shape[2:])

    def pack(self, x: Tensor) -> Tensor:
        """[B, T, ...] to tokens as they travel."""
        return x.flatten(0, 1).index_select(0, self._slot)[None] if self.packed else x
