"""How the tokens of a batch lie in memory: images of one length as [B, T, C], of several lengths packed, [1, S, C]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

BUCKET, SHORT = 4, 1024
"""Images of similar length that a CPU's attention takes at a time; more of them where they are so short that together
they have no more than so many tokens."""


def bucket_size(device: torch.device, batch: int, longest: int) -> int:
    """How many images attention takes at a time, padded to the longest of them.

    A CPU pays for padding as for tokens: at 16 images buckets of 4 save a seventh of the encoder's time, and buckets
    of 2 no more (docs/encoder.md). A GPU takes all at once, since it pays for calls: not yet measured.
    """
    return max(BUCKET, SHORT // max(longest, 1)) if device.type == "cpu" else batch


@dataclass(frozen=True, eq=False)
class Layout:
    """Images of a batch that keep different numbers of tokens travel as one row, image after image, without padding.

    Projections, norms and MLPs see that row. Matching, which must not mix images, sees it padded, and attention in
    buckets: padded batches of images of similar length.

    Args:
        length: int64 [B], tokens of each image.
        lengths: the same, known to the host.
    """

    length: Tensor
    lengths: tuple[int, ...]

    @classmethod
    def equal(cls, batch: int, tokens: int, device: torch.device | str | None = None) -> Layout:
        """Every image has `tokens` tokens."""
        return cls(torch.full((batch,), tokens, device=device), (tokens,) * batch)

    @classmethod
    def of(cls, length: Tensor) -> Layout:
        """For int64 [B] lengths. One host synchronisation."""
        return cls(length, tuple(length.tolist()))

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @cached_property
    def longest(self) -> int:
        """T."""
        return max(self.lengths)

    @cached_property
    def total(self) -> int:
        """S."""
        return sum(self.lengths)

    @cached_property
    def packed(self) -> bool:
        """Whether the lengths differ, so that tokens travel as [1, S, C]."""
        return self.total < self.batch * self.longest

    @cached_property
    def start(self) -> Tensor:
        """int64 [B, 1], where each image begins among all S tokens."""
        return (self.length.cumsum(0) - self.length)[:, None]

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Of the tokens as they travel, without channels."""
        return (1, self.total) if self.packed else (self.batch, self.longest)

    @cached_property
    def position(self) -> Tensor:
        """int64 [S], where each token stands within its image."""
        return self._range(self.total) - self.start[:, 0].repeat_interleave(self.length, output_size=self.total)

    def index(self, position: Tensor) -> Tensor:
        """Positions [B, ...] within each image, to positions among all S tokens."""
        return position if self.batch == 1 else position + self.start

    @cached_property
    def present(self) -> Tensor:
        """bool [B, T], whether there is a token."""
        return self._range(self.longest) < self.length[:, None]

    def pad(self, x: Tensor) -> Tensor:
        """Tokens as they travel, to [B, T, ...]; past an image's end stands its last token, which the reader must mask.

        It is never another image's, whose NaN or infinities would pass a weight of 0.
        """
        return _taken(x, self._padded) if self.packed else x

    def pack(self, x: Tensor) -> Tensor:
        """[B, T, ...] to tokens as they travel."""
        return x.flatten(0, 1).index_select(0, self._padded_row)[None] if self.packed else x

    def split(self, x: Tensor) -> list[Tensor]:
        """Tokens as they travel, to [b, t, ...] for each bucket, like `pad`."""
        if not self.packed:
            return [x]
        return [_taken(x, index) for index in self._bucketed]

    def absent(self) -> list[Tensor | None]:
        """bool [b, t] for each bucket, whether there is no token; None: there are all."""
        if not self.packed:
            return [None]
        return [
            None if self.lengths[images[0]] == longest else self._range(longest) >= length
            for images, (_, length, longest) in zip(self._images, self._buckets, strict=True)
        ]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of `split`."""
        if len(parts) == 1:
            return self.pack(parts[0])
        return torch.cat([part.flatten(0, 1) for part in parts]).index_select(0, self._bucket_row)[None]

    def _range(self, end: int) -> Tensor:
        return torch.arange(end, device=self.length.device)

    def _rows(self, start: Tensor, length: Tensor, longest: int) -> Tensor:
        """int64 [b, t], the packed token at each place; past an image's end its last one."""
        return (start + torch.minimum(self._range(longest), length - 1)).clamp_(min=0)  # an image may have no token

    @cached_property
    def _padded(self) -> Tensor:
        return self._rows(self.start, self.length[:, None], self.longest)

    @cached_property
    def _bucketed(self) -> list[Tensor]:
        return [self._padded] if len(self._images) == 1 else [self._rows(*bucket) for bucket in self._buckets]

    @cached_property
    def _images(self) -> list[list[int]]:
        """The images of each bucket, the shortest first."""
        rising = sorted(range(self.batch), key=self.lengths.__getitem__)
        size = bucket_size(self.length.device, self.batch, self.longest)
        return [rising[first : first + size] for first in range(0, self.batch, size)]

    @cached_property
    def _buckets(self) -> list[tuple[Tensor, Tensor, int]]:
        """Of each bucket, where its images begin and how long they are, int64 [b, 1], and the longest of them.

        Images in one bucket keep their order.
        """
        length = self.length[:, None]
        if len(self._images) == 1:
            return [(self.start, length, self.longest)]
        return [(self.start[images], length[images], self.lengths[images[-1]]) for images in self._images]

    @cached_property
    def _padded_row(self) -> Tensor:
        """int64 [S], the row of each packed token among the [B * T] padded ones."""
        return self._row(self._range(self.batch) * self.longest)

    @cached_property
    def _bucket_row(self) -> Tensor:
        """int64 [S], the row of each packed token among the padded ones of all buckets."""
        begins, behind = [0] * self.batch, 0
        for images in self._images:
            for image in images:
                begins[image] = behind
                behind += self.lengths[images[-1]]
        return self._row(torch.tensor(begins, device=self.length.device))

    def _row(self, begins: Tensor) -> Tensor:
        """int64 [S], the row of each packed token where image b begins at row `begins[b]`."""
        shift = begins - self.start[:, 0]
        return shift.repeat_interleave(self.length, output_size=self.total) + self._range(self.total)


def _taken(x: Tensor, index: Tensor) -> Tensor:
    """Packed tokens [1, S, ...] at int64 [b, t]: [b, t, ...]."""
    return x[0].index_select(0, index.flatten()).view(*index.shape, *x.shape[2:])
