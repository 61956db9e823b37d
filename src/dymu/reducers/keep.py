"""What reducers share that keep a number of tokens chosen beforehand."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor

from dymu.choices import Fill
from dymu.errors import BadBudget
from dymu.reducers.reducer import Reduced, Reducer, Tokens
from dymu.thresholds import number


def check_keep(reducer: Any) -> None:
    """Make `reducer.keep` a number of Python's own.

    Raises:
        BadBudget: it is no number, or nothing would be kept.
    """
    keep = number(reducer.keep, "`keep` is a number of tokens or a fraction of them")
    if not (keep > 0 and math.isfinite(keep)):
        raise BadBudget(f"cannot keep {keep:g} tokens of an image; keep at least 1.")
    object.__setattr__(reducer, "keep", keep)  # reducers are frozen


def in_tokens(keep: int | float, tokens: int) -> float:
    """`keep` in tokens: a float up to 1 is a fraction of `tokens`."""
    return keep * tokens if isinstance(keep, float) and keep <= 1 else keep


def kept_of(keep: int | float, tokens: int) -> int:
    """`keep` in whole tokens, at least one.

    Raises:
        BadBudget: more than there are.
    """
    kept = max(round(in_tokens(keep, tokens)), 1)
    if kept > tokens:
        raise BadBudget(f"cannot keep {kept} of {tokens} tokens; take fewer, or a fraction of them.")
    return kept


class FixedKeep(Reducer, ABC):
    """Of every image or video, `keep` tokens stay where they stand; `fill` says what stands for the others."""

    keep: int | float
    fill: Fill
    fill_nearest: ClassVar[Callable[[Tokens, Reduced], Reduced]]

    def __post_init__(self) -> None:
        check_keep(self)
        if self.fill not in get_args(Fill):
            raise ValueError(f"unknown fill {self.fill!r}; choose {' or '.join(get_args(Fill))}")

    def check_fits(self, layers: int, tokens: int | None = None) -> None:
        if tokens is not None:
            kept_of(self.keep, tokens)

    @abstractmethod
    def choose(self, tokens: Tokens, row: int, keep: int) -> Tensor | Sequence[int]:
        """Which `keep` tokens of a row stay."""

    def in_prompt(self, tokens: Tokens) -> Reduced:
        kept = torch.zeros_like(tokens.present)
        for row, count in enumerate(tokens.counts):
            kept[row, self.choose(tokens, row, kept_of(self.keep, count))] = True
        reduced = tokens.keep(kept)
        return type(self).fill_nearest(tokens, reduced) if self.fill == "nearest" else reduced
