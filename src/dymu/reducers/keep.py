"""What reducers share that keep a number of tokens chosen beforehand."""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from dymu.checks import check_fields
from dymu.choices import Fill
from dymu.errors import BadBudget
from dymu.reducers.fill import fill_alike, fill_alike_in_picture, fill_runs
from dymu.reducers.reducer import Reduced, Reducer, Shown, Tokens
from dymu.thresholds import number

MANY = 2**53
"""More tokens than any image has."""


def check_keep(reducer: Any, name: str = "keep") -> None:
    """Make a count of a reducer, such as its `keep`, a number of Python's own.

    Raises:
        BadBudget: it is no number, or nothing would be kept.
    """
    keep = number(getattr(reducer, name), f"`{name}` is a number of tokens or a fraction of them")
    if not 0 < keep < MANY:
        raise BadBudget(f"cannot keep {keep!r:.30} tokens of an image; keep at least 1.")
    if isinstance(keep, float) and keep > 1 and not keep.is_integer():
        raise BadBudget(f"{name}={keep:g} is neither a whole number of tokens nor a fraction of all.")
    object.__setattr__(reducer, name, keep)  # reducers are frozen


def check_finite(reducer: Any, name: str, least: float = -math.inf, most: float = math.inf) -> None:
    """Refuse a field of a reducer that is no number from `least` to `most`.

    Raises:
        ValueError: it is not.
    """
    value = getattr(reducer, name)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and abs(value) <= sys.float_info.max and least <= value <= most):
        bounds = (
            "" if math.isinf(least) else f" from {least:g} on" if math.isinf(most) else f" from {least:g} to {most:g}"
        )
        raise ValueError(f"{type(reducer).__name__} takes a number{bounds} for {name}, not {value!r:.30}.")


def check_of_images(shown: Shown, images: Collection[int] | None, keep: int | float, exactly: bool = False) -> None:
    """Refuse a number of tokens that images, or frames of videos, cannot keep; a fraction any can, but for rounding.

    Args:
        images: see `Shown.image`; None: all.
        keep: tokens of each; a float up to 1 is a fraction.
        exactly: whether all must keep as many.

    Raises:
        BadBudget: it is more than one has, or fewer than the pictures (tiles) that one is cut into.
        BadPrompt: it is a number of tokens, and not known which tiles are of one image.
    """
    if is_part(keep):
        return
    shown.check_by_image()
    pictures = Counter(shown.image)
    for image in range(len(shown.image_tokens)) if images is None else images:
        there, kept = shown.image_tokens[image], int(keep)
        if exactly and kept > there:
            raise BadBudget(f"cannot keep {keep:g} tokens of an image that has {there}; take fewer, or a fraction.")
        if kept < min(pictures[image], there):
            raise BadBudget(
                f"cannot keep {kept} tokens of an image that is cut into {pictures[image]} pictures, each of which "
                "keeps at least one; take more."
            )


def in_tokens(keep: int | float, tokens: int) -> float:
    """`keep` in tokens: a float up to 1 is a fraction of `tokens`."""
    return keep * tokens if is_part(keep) else keep


def is_part(keep: int | float) -> bool:
    """Whether it is a fraction."""
    return isinstance(keep, float) and keep <= 1


def kept_of(keep: int | float, tokens: int) -> int:
    """`keep` in whole tokens, at least one.

    Raises:
        BadBudget: more than there are.
    """
    kept = max(round(in_tokens(keep, tokens)), 1)
    if kept > tokens:
        raise BadBudget(f"cannot keep {kept} of {tokens} tokens; take fewer, or a fraction of them.")
    return kept


def shared_out(total: int, weights: Sequence[float], most: Sequence[int]) -> list[int]:
    """A number in whole parts, about in proportion to the weights, none above its `most`: rounded down, and what is
    left one by one to the largest remainders, of equal ones to the first."""
    weights = [weight if weight > 0 else 0.0 for weight in weights]  # also what is no number
    parts, left = [0] * len(weights), total
    while left:
        there = [index for index, part in enumerate(parts) if part < most[index]]
        scale = left / (sum(weights[index] for index in there) or 1)
        wanted = {index: weights[index] * scale for index in there}
        full = [index for index in there if wanted[index] >= most[index] - parts[index]]
        for index in full:
            parts[index] = most[index]
        if not full:
            for index in there:
                parts[index] += int(wanted[index])
            for index in sorted(there, key=lambda index: -(wanted[index] % 1))[: total - sum(parts)]:
                parts[index] += 1
        left = total - sum(parts)
    return parts


def of_pictures(keep: int, weights: Sequence[float], most: Sequence[int]) -> list[int]:
    """The same, for pictures of one image or video; each keeps at least one, where there are as many."""
    parts, few = shared_out(keep, weights, most), set[int]()
    while keep >= len(most) and (none := {index for index, part in enumerate(parts) if not part and most[index]}):
        few |= none
        others = [0 if index in few else count for index, count in enumerate(most)]
        parts = [int(index in few) + part for index, part in enumerate(shared_out(keep - len(few), weights, others))]
    return parts


def check_of_items(shown: Shown, keep: int | float) -> None:
    """Refuse a number of tokens that an image with all its tiles, or a video, cannot keep.

    Raises:
        BadBudget: it is more than one has.
        BadPrompt: it is a number, and not known which tiles are of one image.
    """
    if not is_part(keep):
        shown.check_by_image()
        for pictures in shown.items:
            kept_of(keep, sum(pictures))


def kept_of_rows(keep: int | float, tokens: Tokens) -> list[int]:
    """How many each row keeps; tiles that are rows by themselves share out what their image keeps.

    Raises:
        BadBudget: it is fewer than the tiles.
    """
    if is_part(keep):
        return [kept_of(keep, count) for count in tokens.counts]
    keeps, rows = [0] * len(tokens.counts), dict[int, list[int]]()
    for row, first in enumerate(tokens.first[:-1]):
        rows.setdefault(tokens.shown.item[first], []).append(row)
    for of_image in rows.values():
        counts = [tokens.counts[row] for row in of_image]
        total = kept_of(keep, sum(counts))
        if total < len(of_image):
            raise BadBudget(
                f"cannot keep {keep:g} tokens of an image that is cut into {len(of_image)} pictures, each of which "
                "keeps at least one; take more."
            )
        for row, part in zip(of_image, of_pictures(total, counts, counts), strict=True):
            keeps[row] = part
    return keeps


def _chosen(name: str, chosen: Any, keep: int, count: int) -> Tensor:
    """int64 [up to keep], which of so many tokens stay, as the method of that name says.

    Raises:
        ValueError: it is none of these tokens, one twice, or more than `keep`.
    """
    whole = not isinstance(chosen, Tensor) and isinstance(chosen, Sequence)
    index = torch.tensor(chosen) if whole and all(type(each) is int for each in chosen) else chosen
    fits = isinstance(index, Tensor) and index.dtype == torch.int64 and index.ndim == 1 and len(index) <= keep
    if not fits or not bool(((index >= 0) & (index < count)).all()) or len(index.unique()) < len(index):
        raise ValueError(
            f"{name} must answer int64 indices of {count} tokens, each once and at most "
            f"{keep} of them, and answered {chosen!r:.80}."
        )
    return index


class FixedKeep(Reducer, ABC):
    """Of every image or video, `keep` tokens stay where they stand; `fill` says what stands for the others.

    Attributes:
        fill_nearest: which kept token stands for each of the others.
        averages: whether a kept token becomes the mean of all that it stands for.
    """

    keep: int | float
    fill: Fill = "none"
    fill_nearest: ClassVar[Callable[[Tokens, Reduced], Reduced]] = fill_alike
    averages: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_keep(self)
        check_fields(self)

    def check_fits(self, layers: int, tokens: int | None = None) -> None:
        if tokens is not None:
            kept_of(self.keep, tokens)

    def check_shown(self, shown: Shown, images: Collection[int] | None = None) -> None:
        check_of_items(shown, self.keep)

    @abstractmethod
    def choose(self, tokens: Tokens, row: int, keep: int) -> Tensor | Sequence[int]:
        """Which `keep` tokens of a row stay, at least 1."""

    def in_prompt(self, tokens: Tokens) -> Reduced:
        kept = torch.zeros_like(tokens.present)
        for row, keep in enumerate(kept_of_rows(self.keep, tokens)):
            chosen = self.choose(tokens, row, keep)
            kept[row, _chosen(f"{type(self).__name__}.choose", chosen, keep, tokens.counts[row])] = True
        reduced = tokens.keep(kept)
        if self.fill == "nearest":
            reduced = type(self).fill_nearest(tokens, reduced)
        if self.fill == "runs":
            reduced = fill_runs(tokens, reduced)
        return Reduced(reduced.map) if self.averages else reduced


class KeepOfPictures(FixedKeep):
    """The same, of every picture (tile, frame) its part, and what stands for a token is of its own picture."""

    fill_nearest = fill_alike_in_picture

    def choose(self, tokens: Tokens, row: int, keep: int) -> Tensor:
        indices = tokens.indices(row)
        counts = [len(index) for index in indices]
        name, chosen = f"{type(self).__name__}.choose_of", list[Tensor]()
        for index, part in zip(indices, of_pictures(keep, counts, counts), strict=True):
            if part:  # a video may keep fewer tokens than it has frames
                of = _chosen(name, self.choose_of(tokens, row, index, part), part, len(index))
                chosen.append(index[of.to(index.device)])
        return torch.cat(chosen)

    @abstractmethod
    def choose_of(self, tokens: Tokens, row: int, index: Tensor, keep: int) -> Tensor:
        """Which `keep` of the row's tokens `index`, those of a picture, stay, at least 1: indices of these."""
