"""Thresholds for tokens that merge once more where they stand in the prompt, see `dymu.settling`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dymu.calibrate.edges import NEVER, threshold_for
from dymu.merging import above
from dymu.settling import Standing
from dymu.shelf import Place, Shelf

ROUNDS = 6
"""Each takes about a quarter of the tokens where eight in ten are to go."""


@dataclass(frozen=True)
class Shelved:
    """Tokens that stand in the prompt and wait on a shelf."""

    standing: Standing
    place: Place

    @classmethod
    def put(cls, standing: Standing, shelf: Shelf) -> Shelved:
        return cls(standing, shelf.place(standing.x.nbytes))._keep(standing)

    def _keep(self, standing: Standing) -> Shelved:
        self.place.put(standing.x)
        return Shelved(replace(standing, x=standing.x[:0]), self.place)

    def get(self) -> Standing:
        return replace(self.standing, x=self.place.get().to(self.standing.size.device))

    def merge(self, into: Tensor) -> Shelved:
        return self._keep(self.get().merge(into))


def rounds(standing: list[Shelved], goal: int) -> tuple[tuple[float, ...], list[Shelved]]:
    """The thresholds at which `ROUNDS` rounds of merging leave `goal` tokens of all items together; and those tokens.

    Every round takes the same part of what is there.
    """
    first = left = sum(one.standing.state.layout.total for one in standing)
    thresholds = []
    for number in range(1, ROUNDS + 1):
        matches = [one.get().match() for one in standing]
        edges = torch.cat([similarity.flatten() for similarity, _ in matches])
        wanted = left - max(round(first * (goal / first) ** (number / ROUNDS)), goal)
        threshold, count = threshold_for(edges[edges.isfinite()], wanted) if wanted > 0 else (NEVER, 0)
        thresholds.append(threshold)
        left -= count
        if count:
            standing = [one.merge(above(threshold, *match)) for one, match in zip(standing, matches, strict=True)]
    return tuple(thresholds), standing
