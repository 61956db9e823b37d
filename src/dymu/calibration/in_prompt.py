"""Thresholds for tokens that merge once more where they stand in the prompt, see `dymu.merging.in_prompt`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dymu.calibration.quantile import NEVER, Together, threshold_for
from dymu.calibration.spill import Slot, Spill
from dymu.merging import ROUNDS, PictureTokens, above


@dataclass(frozen=True)
class Waiting:
    """Tokens that stand in the prompt, whose features wait in a slot."""

    tokens: PictureTokens
    slot: Slot

    @classmethod
    def put(cls, tokens: PictureTokens, room: Spill | Slot) -> Waiting:
        """Keep the features in a slot that holds no others now, or in a new one."""
        slot = room.slot(tokens.x.nbytes) if isinstance(room, Spill) else room
        slot.put(tokens.x)
        return cls(replace(tokens, x=tokens.x[:0]), slot)

    def get(self) -> PictureTokens:
        return replace(self.tokens, x=self.slot.get().to(self.tokens.x.device))


def joined(edges: list[Tensor]) -> Tensor:
    """All edges of a worker, which may have none."""
    return torch.cat(edges) if edges else torch.empty(0, dtype=torch.float32, device="cpu")


def rounds(waiting: list[Waiting], goal: int, together: Together) -> tuple[tuple[float, ...], list[Waiting]]:
    """The thresholds at which `ROUNDS` rounds of merging leave `goal` tokens of all items of all workers together; and
    this worker's tokens.

    Every round takes the same part of what is there.
    """
    own = sum(one.tokens.state.layout.total for one in waiting)
    first = left = int(together.sum(torch.tensor([own], device="cpu"))[0])
    thresholds = []
    for number in range(1, ROUNDS + 1):
        matches = [one.get().match() for one in waiting]
        edges = joined([similarity.flatten() for similarity, _ in matches])
        due = left - max(round(first * (goal / first) ** (number / ROUNDS)), goal)
        threshold, count = threshold_for(edges[edges.isfinite()], due, together) if due > 0 else (NEVER, 0)
        thresholds.append(threshold)
        left -= count
        if count:
            pairs = zip(waiting, matches, strict=True)
            waiting = [Waiting.put(one.get().merge(above(threshold, *match)), one.slot) for one, match in pairs]
    return tuple(thresholds), waiting
