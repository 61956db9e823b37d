"""ApET (2026): tokens that a few others cannot be combined to stay; the rest join what they are most like."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dymu.reducers.div_prune import far_apart
from dymu.reducers.faster_vlm import largest
from dymu.reducers.keep import FixedKeep
from dymu.reducers.reducer import Tokens


def hardest(x: Tensor, keep: int, basis: int) -> Tensor:
    """int64 [keep], those of the tokens [N, C] that linear combinations of some tokens far apart, which stay too, are
    farthest from, in the sense of least squares."""
    some = far_apart(1 - x @ x.mT, min(basis, keep))
    directions = torch.linalg.qr(x[some].mT).Q
    error = (x - x @ directions @ directions.mT).norm(dim=-1)
    error[some] = torch.inf
    return largest(error, keep)


@dataclass(frozen=True)
class ApET(FixedKeep):
    """Of every image or video, `basis` tokens far apart stay, and those that these approximate worst; each other one is
    averaged into that which it is most like.

    Args:
        keep: a number of tokens; a float up to 1 is a fraction.
        basis: tokens that approximate the others.

    Raises:
        BadBudget: `keep` is not above 0; or in use, more than there are.
        ValueError: `basis` is below 1.
    """

    keep: int | float
    basis: int = 10
    fill = "nearest"
    averages = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.basis < 1:
            raise ValueError(f"basis={self.basis!r}: at least one token approximates the others.")

    def choose(self, tokens: Tokens, row: int, keep: int) -> Tensor:
        return hardest(tokens.unit(row), keep, self.basis)
