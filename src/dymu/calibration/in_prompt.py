"""Thresholds for tokens that merge once more where they stand in the prompt, see `dymu.merging.in_prompt`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from dymu.calibration.quantile import NEVER, threshold_for
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


def rounds(waiting: list[Waiting], goal: int) -> tuple[tuple[float, ...], list[Waiting]]:
    """The thresholds at which `ROUNDS` rounds of merging leave `goal` tokens of all items together; and those tokens.

    Every round takes the same part of what is there.
    """
    first = left = sum(one.tokens.state.layout.total for one in waiting)
    thresholds = []
    for number in range(1, ROUNDS + 1):
        matches = [one.get().match() for one in waiting]
        edges = torch.cat([similarity.flatten() for similarity, _ in matches])
        due = left - max(round(first * (goal / first) ** (number / ROUNDS)), goal)
        threshold, count = threshold_for(edges[edges.isfinite()], due) if due > 0 else (NEVER, 0)
        thresholds.append(threshold)
        left -= count
        if count:
            pairs = zip(waiting, matches, strict=True)
            waiting = [Waiting.put(one.get().merge(above(threshold, *match)), one.slot) for one, match in pairs]
    return tuple(thresholds), waiting
