"""The similarity at which so many tokens merge."""

from __future__ import annotations

import torch
from torch import Tensor

NEVER = 2.0
"""A threshold that no cosine reaches."""


def threshold_for(edges: Tensor, count: int) -> tuple[float, int]:
    """The threshold that `count` of `edges` (similarities, [E]) lie above, and how many really do.

    It is the middle between the last edge that merges and the first that does not (or the end of the cosine's range),
    as a number that float32 holds. Where equal edges leave no room for it, the nearest count that does is taken. Edges
    that rounding put above 1 are equal to 1, since a threshold above it merges nothing.
    """
    edges = edges.double().clamp(max=1).sort(descending=True).values
    if len(edges) == 0:
        return NEVER, 0
    count = min(max(count, 0), len(edges))
    if count:
        above, at_least = int((edges > edges[count - 1]).sum()), int((edges >= edges[count - 1]).sum())
        count = at_least if at_least - count < count - above else (count if at_least == count else above)
    last = edges[count - 1].item() if count else max(1.0, edges[0].item() + 1e-6)
    first = edges[count].item() if count < len(edges) else min(-1.0, edges[-1].item() - 1e-6)
    middle = torch.tensor((last + first) / 2, dtype=torch.float32, device="cpu").item()
    return (middle if first <= middle < last else first), count
