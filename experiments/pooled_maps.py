"""How much of merging is left once a family pools or shrinks the grid, by three ways to say which cells are alike.

`python -m experiments.pooled_maps` lays the merges recorded for `dymu bench` (576 tokens of real photos) on smaller
grids, bilinearly as families do, and prints mean counts of different cells: by the weighted members of a cell, by the
set of its members, and by the member of the largest weight. docs/experiments.md and docs/layouts.md quote it.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor
from torch.nn.functional import interpolate, one_hot

from dymu.bench.replay import recorded

TOKENS, EVERY = 576, 4
GRIDS = (12, 13, 15, 18)


def counts(group: Tensor, side: int) -> list[int]:
    """Different cells of a grid of side x side: by weights, by sets, by the largest weight."""
    rows = round(TOKENS**0.5)
    members = one_hot(group).double().T.view(1, -1, rows, rows)
    weights = interpolate(members, size=(side, side), mode="bilinear")[0].flatten(1).T
    weighted = (weights * 2**20).round().unique(dim=0)
    sets = (weights > 1e-9).long().unique(dim=0)
    return [len(weighted), len(sets), len(weights.argmax(1).unique())]


def main() -> None:
    """Print a line for every recorded budget and grid."""
    recording = recorded(TOKENS)
    for budget in recording.into:
        groups = [recording.merged(budget, photo).group[0] for photo in range(0, len(recording.photos), EVERY)]
        kept = np.mean([int(group.max()) + 1 for group in groups])
        for side in GRIDS:
            mean = np.mean([counts(group, side) for group in groups], axis=0).round()
            weighted, sets, largest = (int(count) for count in mean)
            print(
                f"{kept:.0f} merged, {side} x {side}: {weighted} by weights, {sets} by sets, {largest} by the largest"
            )


if __name__ == "__main__":
    main()
