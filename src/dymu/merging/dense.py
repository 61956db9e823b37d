"""Merged features back on the grid of the picture: copied, or interpolated."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dymu.token_map import at_least_float32

Filling = Literal["copy", "bilinear"]
"""How the places of a grid get their features.

- `copy`: each place has that of its group, as the encoder gives it.
- `bilinear`: each place has the mean of the copies over a rectangle around it: as wide as the run of its group's places
  in its row, as high as that in its column, as far as it lies within the picture. Where groups are blocks of one size,
  that is bilinear interpolation between their centres, constant beyond the outermost. A place that stands for itself
  keeps its feature, and no weight is negative.
"""


def dense(copied: Tensor, group: Tensor, filling: Filling = "copy") -> Tensor:
    """[..., rows, columns, C], the features of a picture at every place.

    Args:
        copied: [rows, columns, C], the feature of each place's group.
        group: int64 [rows, columns].
    """
    if filling == "copy":
        return copied
    if filling != "bilinear":
        raise ValueError(f"unknown filling {filling!r}; choose copy or bilinear")
    wide = at_least_float32(copied)
    by_row = _overlaps(_runs(group.mT).mT, 0, wide.dtype)
    by_column = _overlaps(_runs(group), 1, wide.dtype)
    weight = (by_row[:, :, :, None] * by_column[:, :, None, :]).flatten(2)
    filled = weight.flatten(0, 1) @ wide.flatten(0, 1)
    return filled.to(copied.dtype).view_as(copied)


def _runs(group: Tensor) -> Tensor:
    """int64 [rows, columns]: how many neighbours in its row, itself among them, each place shares its group with."""
    begins = torch.ones_like(group, dtype=torch.bool)
    begins[:, 1:] = group[:, 1:] != group[:, :-1]
    run = begins.flatten().cumsum(0) - 1
    return torch.bincount(run)[run].view_as(group)


def _overlaps(length: Tensor, axis: int, dtype: torch.dtype) -> Tensor:
    """[rows, columns, places along the axis]: which part of an interval of some `length` around each place lies
    over each place along the axis, out of the part that lies in the picture."""
    places = torch.arange(length.shape[axis], dtype=dtype, device=length.device)
    centre = (places[:, None] if axis == 0 else places) + 0.5
    begin, end = ((centre + sign * length / 2)[..., None] for sign in (-1, 1))
    covered = (torch.minimum(end, places + 1) - torch.maximum(begin, places)).clamp(min=0)
    return covered / covered.sum(-1, keepdim=True)
