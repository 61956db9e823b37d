"""Merged features on the grid of the picture, against a slow definition in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import interpolate

from dymu.merging.dense import dense


def by_hand(copied: Tensor, group: Tensor) -> Tensor:
    """The mean of the copies over a rectangle around each place, as far as it lies within the picture."""
    rows, columns = group.shape
    filled = torch.zeros_like(copied, dtype=torch.float64)
    for row in range(rows):
        for column in range(columns):
            height = run([int(group[r, column]) for r in range(rows)], row)
            width = run([int(group[row, c]) for c in range(columns)], column)
            total = 0.0
            for r in range(rows):
                for c in range(columns):
                    area = overlap(row, height, r) * overlap(column, width, c)
                    filled[row, column] += area * copied[r, c].double()
                    total += area
            filled[row, column] /= total
    return filled


def run(groups: list[int], place: int) -> int:
    """How many neighbours along a line share the group of a place, itself among them."""
    begin = end = place
    while begin > 0 and groups[begin - 1] == groups[place]:
        begin -= 1
    while end + 1 < len(groups) and groups[end + 1] == groups[place]:
        end += 1
    return end - begin + 1


def overlap(centre: int, length: int, place: int) -> float:
    """Of an interval of some length around the middle of the place `centre`, what lies over another place."""
    begin, end = centre + 0.5 - length / 2, centre + 0.5 + length / 2
    return max(0.0, min(end, place + 1) - max(begin, place))


@given(st.data())
def test_bilinear_is_its_definition(data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    groups = data.draw(st.lists(st.integers(0, 4), min_size=rows * columns, max_size=rows * columns))
    group = torch.tensor(groups).view(rows, columns)
    copied = torch.randn(5, 3)[group]
    filled = dense(copied, group, "bilinear")
    assert torch.allclose(filled.double(), by_hand(copied, group), atol=1e-5)
    alone = torch.tensor([groups.count(number) == 1 for number in groups]).view(rows, columns)
    assert torch.equal(filled[alone], copied[alone])
    low, high = copied.amin((0, 1)), copied.amax((0, 1))
    assert bool(((filled >= low - 1e-5) & (filled <= high + 1e-5)).all())


@pytest.mark.parametrize("block", [(1, 1), (2, 2), (3, 2), (1, 4)])
def test_between_equal_blocks_it_is_bilinear_interpolation_of_their_centres(block: tuple[int, int]) -> None:
    features = torch.randn(3, 4, 5)
    group = torch.arange(12).view(3, 4).repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    filled = dense(features.flatten(0, 1)[group], group, "bilinear")
    expected = interpolate(features.permute(2, 0, 1)[None], size=tuple(group.shape), mode="bilinear")
    assert torch.allclose(filled, expected[0].permute(1, 2, 0), atol=1e-5)


def test_one_group_is_constant_and_copies_stay() -> None:
    copied = torch.randn(7).expand(4, 6, 7)
    assert torch.allclose(dense(copied, torch.zeros(4, 6, dtype=torch.int64), "bilinear"), copied)
    assert dense(copied.half(), torch.zeros(4, 6, dtype=torch.int64), "bilinear").dtype == torch.float16
    assert dense(copied, torch.zeros(4, 6, dtype=torch.int64)) is copied
    with pytest.raises(ValueError, match="cubic"):
        dense(copied, torch.zeros(4, 6, dtype=torch.int64), "cubic")  # type: ignore[arg-type]
