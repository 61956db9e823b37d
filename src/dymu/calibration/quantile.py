"""The similarity at which so many tokens merge, of all edges that one or several workers hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

NEVER = 2.0
"""A threshold that no cosine reaches."""
_BITS = 16
"""Of a number, so many are looked at in one round of counting."""
_BINS = 1 << _BITS


class Together(Protocol):
    """What the workers of one calibration tell each other. All call the same of it in the same order."""

    def sum(self, numbers: Tensor) -> Tensor:
        """int64 [N], added up over all workers."""
        ...

    def gather(self, values: Sequence[Any]) -> list[Any]:
        """The values of all workers, in one order for all."""
        ...


class Alone:
    """A worker that is the only one."""

    def sum(self, numbers: Tensor) -> Tensor:
        return numbers

    def gather(self, values: Sequence[Any]) -> list[Any]:
        return list(values)


def threshold_for(edges: Tensor, count: int, together: Together) -> tuple[float, int]:
    """The threshold that `count` of all workers' edges (similarities, [E]) lie above, and how many really do.

    It is the middle between the last edge that merges and the first that does not (or the end of the cosine's range),
    as a number that float32 holds. Where equal edges leave no room for it, the nearest count that does is taken. Edges
    that rounding put above 1 are equal to 1, since a threshold above it merges nothing.
    """
    ranked = _Ranked(edges.clamp(max=1), together)
    if ranked.total == 0:
        return NEVER, 0
    count = min(max(count, 0), ranked.total)
    if count:
        value, above, at_least = ranked.largest(count)
        count = at_least if at_least - count < count - above else (count if at_least == count else above)
        last = value if count == at_least else ranked.largest(count)[0] if count else max(1.0, ranked.highest + 1e-6)
    else:
        last = max(1.0, ranked.highest + 1e-6)
    first = ranked.largest(count + 1)[0] if count < ranked.total else min(-1.0, ranked.largest(count)[0] - 1e-6)
    middle = torch.tensor((last + first) / 2, dtype=torch.float32, device="cpu").item()
    return (middle if first <= middle < last else first), count


class _Ranked:
    """Numbers of all workers by rank. They tell each other how many of theirs lie where, and no number itself.

    Attributes:
        total: how many there are.
    """

    def __init__(self, numbers: Tensor, together: Together) -> None:
        self._together = together
        self._float, self._integer, self._rounds = torch.float32, torch.int32, 2
        if any(together.gather([numbers.dtype == torch.float64])):
            self._float, self._integer, self._rounds = torch.float64, torch.int64, 4
        bits = (numbers.to(self._float) + 0.0).contiguous().view(self._integer)  # + 0.0 makes -0.0 of 0.0 alike
        self._sign = torch.iinfo(self._integer).max
        self._keys = torch.where(bits < 0, bits ^ self._sign, bits)  # which rise as the numbers do
        self.total = int(together.sum(torch.tensor([len(numbers)], device="cpu"))[0])

    @property
    def highest(self) -> float:
        return self.largest(1)[0]

    def largest(self, rank: int) -> tuple[float, int, int]:
        """The number of that rank, the largest being 1; how many are larger; and how many are not smaller."""
        keys, key, above, equal = self._keys, 0, 0, self.total
        for number in range(self._rounds):
            shift = _BITS * (self._rounds - 1 - number)
            part = (keys >> shift) + _BINS // 2 if number == 0 else (keys >> shift) & (_BINS - 1)
            counts = self._together.sum(torch.bincount(part.long(), minlength=_BINS).cpu())
            reached = counts.flip(0).cumsum(0)
            place = int(torch.searchsorted(reached, rank - above))
            chosen = _BINS - 1 - place
            equal = int(counts[chosen])
            above += int(reached[place]) - equal
            keys = keys[part == chosen]
            key = (key << _BITS) + (chosen - _BINS // 2 if number == 0 else chosen)
        bits = torch.tensor(key, dtype=self._integer, device="cpu")
        bits = torch.where(bits < 0, bits ^ self._sign, bits)
        return bits.view(self._float).item(), above, above + equal
