"""Density peaks: dense tokens far from denser ones, which gather the others."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def distances(x: Tensor) -> Tensor:
    """[N, N], of tokens float [N, C] the Euclidean distances over the root of the channels."""
    x = x - x.mean(0)  # so that no digits are lost to what all have in common
    distance = torch.cdist(x, x, compute_mode="use_mm_for_euclid_dist") / math.sqrt(x.shape[1])
    return distance.fill_diagonal_(0.0)  # where rounding leaves some


def peaks(distance: Tensor, neighbours: int) -> Tensor:
    """[N], how much each of N tokens is a peak: its density, by the mean square of the least distances [N, N], itself
    counted, times the distance to the nearest denser one, for the densest that to the farthest of all."""
    near = distance.square().topk(min(neighbours, len(distance)), largest=False).values
    density = (-near.mean(1)).exp()
    index = torch.arange(len(density), device=density.device)
    denser = (density[None] > density[:, None]) | ((density[None] == density[:, None]) & (index < index[:, None]))
    nearest = distance.masked_fill(~denser, torch.inf).amin(1)
    return density * torch.where(nearest.isinf(), distance.max(), nearest)


def nearest_of(distance: Tensor, centres: Tensor) -> Tensor:
    """int64 [N], for each of N tokens the nearest of `centres`, as an index among those; each of these has its own."""
    label = distance[:, centres].argmin(1)
    label[centres] = torch.arange(len(centres), device=label.device)
    return label
