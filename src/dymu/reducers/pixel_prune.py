"""PixelPrune (2026): patches that their neighbours' pixels predict never enter the encoder."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dymu.reducers.keep import check_finite
from dymu.reducers.reducer import Pixels, Reducer
from dymu.token_map import TokenMap


def predicted(blocks: Tensor, tolerance: float) -> Tensor:
    """int64 [rows, columns], which block stands for each of [rows, columns, values], by its index row after row:
    itself, where its neighbours do not predict it.

    The prediction is the block to the left; or the one above, where the one above to the left is like the left one and
    not like the one above. Blocks are alike where no value differs by more than `tolerance`; a predicted neighbour
    counts as what it was predicted to be, so that errors do not pile up.
    """
    rows, columns = blocks.shape[:2]
    flat = blocks.detach().flatten(0, 1).cpu().numpy()
    stands = list(range(rows * columns))
    known: dict[tuple[int, int], bool] = {}

    def alike(first: int, second: int) -> bool:
        pair = (min(first, second), max(first, second))
        if pair not in known:
            known[pair] = first == second or bool(np.abs(flat[first] - flat[second]).max() <= tolerance)
        return known[pair]

    for index in range(1, rows * columns):
        row, column = divmod(index, columns)
        if not row:
            guess = stands[index - 1]
        elif not column:
            guess = stands[index - columns]
        else:
            left, above, corner = stands[index - 1], stands[index - columns], stands[index - columns - 1]
            guess = above if alike(corner, left) and not alike(corner, above) else left
        if alike(index, guess):
            stands[index] = guess
    return torch.tensor(stands, device=blocks.device).view(rows, columns)


@dataclass(frozen=True)
class PixelPrune(Reducer):
    """Of every picture, patches that their left and upper neighbours predict do not enter the encoder; the patch that
    is their prediction stands for them.

    Args:
        tolerance: by how much each value of a patch may differ from its prediction, in what the processor makes of
            pixels; 0: not at all.

    Raises:
        ValueError: `tolerance` is no finite number, or below 0.
    """

    tolerance: float = 0.0

    def __post_init__(self) -> None:
        check_finite(self, "tolerance", least=0.0)

    def before_encoder(self, pixels: Pixels) -> tuple[Tensor, TokenMap]:
        leaders = [predicted(blocks, self.tolerance).flatten() for blocks in pixels.blocks]
        return pixels.pixels, TokenMap.from_leaders(pad_sequence(leaders, True, -1))
