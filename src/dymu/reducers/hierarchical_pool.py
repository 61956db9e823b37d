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


@torch.no_grad()
def ward(distance: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Join again and again the two clusters of the least distance, by Ward's rule (of Lance and Williams).

    All pairs of which each is the other's nearest join at once, since no other can come nearer to either by joining; of
    the tree that this makes, the joins of least height count.

    Args:
        distance: [N, N], of single tokens.

    Returns:
        int64 [N], for each token the first of its cluster; and [N - 1], the heights of all joins, rising.
    """
    squares = distance.square()
    squares = ((squares + squares.mT) / 2).fill_diagonal_(torch.inf)
    first = torch.arange(len(squares), device=squares.device)
    into, size, height = first.clone(), torch.ones_like(squares[0]), torch.zeros_like(squares[0])
    heights, ones, others = [height[:0]], [first[:0]], [first[:0]]
    while len(squares) > 1:
        nearest, index = squares.argmin(1), torch.arange(len(squares), device=squares.device)
        one = ((nearest[nearest] == index) & (index < nearest)).nonzero()[:, 0]
        other = nearest[one]
        between = squares[one, other]
        height[one] = torch.stack((between, height[one], height[other])).amax(0)
        heights.append(height[one])
        ones.append(first[one])
        others.append(first[other])
        squares[one] = _from_both(squares[one], squares[other], between, size[one], size[other], size)
        grown = size.index_add(0, one, size[other])
        squares[:, one] = _from_both(squares.mT[one], squares.mT[other], between, size[one], size[other], grown).mT
        left = torch.ones_like(index, dtype=torch.bool).index_fill(0, other, False)
        squares = squares[left][:, left]
        squares = ((squares + squares.mT) / 2).fill_diagonal_(torch.inf)
        first, size, height = first[left], grown[left], height[left]
    made = torch.cat(heights)
    order = made.argsort(stable=True)
    joined = order[: len(distance) - clusters]
    into[torch.cat(others)[joined]] = torch.cat(ones)[joined]
    for _ in range(len(distance).bit_length()):
        into = into[into]
    return into, made[order].sqrt()


def _from_both(one: Tensor, other: Tensor, between: Tensor, size: Tensor, added: Tensor, sizes: Tensor) -> Tensor:
    """[pairs, M], squared distances from two clusters that join to all, by those [pairs, M] from each of them."""
    size, added = size[:, None], added[:, None]
    joined = (size + sizes) * one + (added + sizes) * other - sizes * between[:, None]
    return joined / (size + added + sizes)


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
