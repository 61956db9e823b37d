"""Hierarchical pooling of page vectors (ColPali's token pooling, arXiv 2409.14683): Ward's clusters, each one
vector."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dymu.checks import check_fields
from dymu.reducers.keep import check_keep, check_of_items, kept_of, kept_of_rows
from dymu.reducers.reducer import Reduced, Reducer, Shown, Tokens
from dymu.token_map import TokenMap, leaders_of


def ward(distance: Tensor, clusters: int) -> tuple[Tensor, list[float]]:
    """Join again and again the two clusters of the least distance, by Ward's rule (of Lance and Williams).

    Args:
        distance: [N, N], of single tokens.

    Returns:
        int64 [N], for each token the first of its cluster; and the heights at which they were joined.
    """
    squares = distance.cpu().square().fill_diagonal_(torch.inf)  # a GPU would be waited for at each step
    size, label = squares.new_ones(len(squares)), torch.arange(len(squares))
    least, nearest = squares.min(1)
    heights = list[float]()
    for _ in range(len(squares) - clusters):
        one = int(least.argmin())
        first, second = sorted((one, int(nearest[one])))
        height, total = squares[first, second].clone(), size + size[first] + size[second]
        joined = (size + size[first]) * squares[first] + (size + size[second]) * squares[second] - size * height
        heights.append(float(height.sqrt()))
        squares[first] = squares[:, first] = joined / total
        squares[second] = squares[:, second] = squares[first, first] = torch.inf
        size[first] += size[second]
        label[label == second] = first
        closer = squares[first] < least
        least[closer], nearest[closer] = squares[first][closer], first
        stale = (nearest == first) | (nearest == second)
        stale[first] = True
        least[stale], nearest[stale] = squares[stale].min(1)
    return label.to(distance.device), heights


@dataclass(frozen=True)
class HierarchicalPool(Reducer):
    """Of every image, tokens are clustered by Ward's rule over 1 - cosine, and each cluster is the mean of its tokens.

    Args:
        keep: clusters; a float up to 1 is a fraction. A pool factor of 3 is 1 / 3, but for rounding: its
            libraries cut what is left to a whole number.
        unit: whether each mean is made one long, as a late-interaction score wants it; else it stays the mean.

    Raises:
        BadBudget: `keep` is not above 0; or in use, more than there are.
    """

    keep: int | float = 1 / 3
    unit: bool = False

    def __post_init__(self) -> None:
        check_keep(self)
        check_fields(self)

    def check_fits(self, layers: int, tokens: int | None = None) -> None:
        if tokens is not None:
            kept_of(self.keep, tokens)

    def check_shown(self, shown: Shown, images: Collection[int] | None = None) -> None:
        check_of_items(shown, self.keep)

    def in_prompt(self, tokens: Tokens) -> Reduced:
        label = torch.full_like(tokens.map.first(), -1)
        for row, keep in enumerate(kept_of_rows(self.keep, tokens)):
            x = tokens.unit(row)
            label[row, : len(x)] = ward((1 - x @ x.mT).clamp(0, 2), keep)[0]
        merged = Reduced(TokenMap.from_leaders(leaders_of(label, label.shape[1]), tokens.present))
        return Reduced(merged.map, normalize(tokens.features_of(merged), dim=-1)) if self.unit else merged
