"""What a way to prune within the language model is asked, and what it answers with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from numbers import Real
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from dymu.checks import check_fields, whole_numbers
from dymu.choices import Fill
from dymu.errors import BadBudget

LEAST = 1e-6
"""A part of an image's tokens that is less than one of them."""


@dataclass(frozen=True, eq=False)
class Ahead:
    """One prompt ahead of a layer of the language model. Rows are its merged tokens, M of them, in order.

    Attributes:
        layer: the layer; `layers` there are.
        hidden: [M, C], what comes out of the layer before; of rows that it did not run, of the last that did.
        embeds: [M, C], what went into the first layer.
        shown: int64 [V], the rows that are of images and videos.
        picture: int64 [V], which picture (image, tile, frame) each of them is of; a merged token, its first one.
        running: bool [V], those of them that ran in the layer before.
        size: float32 [V], how many tokens of the full prompt each of them stands for.
        last: the row of the prompt's last token; behind it may stand tokens of an answer that is tried.
        attend: float [H, R, M], the attention of some rows int64 [R] in a layer: this one, as it would run, or the one
            before. What did not run there gets 0.
        alike: float [R, M], attention likewise if all queries and keys were the same ahead of rotation.
        keys: [M, Hkv, D], the keys of that layer.
        norm: what the language model does behind its last layer.
    """

    layer: int
    layers: int
    hidden: Tensor
    embeds: Tensor
    shown: Tensor
    picture: Tensor
    running: Tensor
    size: Tensor
    last: int
    attend: Callable[[int, Tensor], Tensor] = field(repr=False)
    alike: Callable[[int, Tensor], Tensor] = field(repr=False)
    keys: Callable[[int], Tensor] = field(repr=False)
    norm: Callable[[Tensor], Tensor] = field(repr=False)

    @property
    def texts(self) -> Tensor:
        """int64, the rows of the prompt behind its last image or video."""
        return torch.arange(int(self.shown.max()) + 1, self.last + 1, device=self.hidden.device)

    def received(self, layer: int, rows: Tensor) -> Tensor:
        """float [V], the attention that image tokens get from some rows, the mean over these and over heads."""
        return self.attend(layer, rows).mean((0, 1))[self.shown]

    def best(self, score: Tensor, keep: int) -> Tensor:
        """int64, the `keep` of the image tokens that run with the largest score [V], in order; of equal ones the
        first."""
        score = score.masked_fill(~self.running, -torch.inf)
        return score.argsort(descending=True, stable=True)[: min(keep, int(self.running.sum()))].sort().values


@dataclass(frozen=True, eq=False)
class Joined:
    """Tokens that run, among them some as the mean of several.

    Attributes:
        rows: int64, which of the image tokens (0 to V - 1) run.
        into: int64 [V], for each token of a mean the one of `rows` in whose place the mean runs, itself included; -1
            for others.
    """

    rows: Tensor
    into: Tensor


@dataclass(frozen=True)
class Pruning(ABC):
    """Which image tokens the layers of the language model run.

    A token that a layer does not run passes it as it is: no other token attends to it there, and the layer's KV cache
    does not hold it. Text always runs, and so do all tokens that follow a prompt.

    Attributes:
        fill: what stands for a token where it does not run: nothing, or the one that runs and is most like it by the
            hidden states there. Unmerging then goes over the rest of the layers.
        comes_back: whether tokens that did not run compete again.
        attends: whether tokens that do not run attend and are attended to all the same: they skip the MLP alone.
    """

    fill: Fill = field(default="none", kw_only=True)
    comes_back: ClassVar[bool] = False
    attends: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.fill == "runs" or (self.fill != "none" and self.attends):
            raise ValueError(
                f"{type(self).__name__} cannot have fill={self.fill!r}: within the language model the nearest token "
                "stands for one that is gone, or nothing does; for tokens that attend, nothing."
            )

    @property
    def forgets(self) -> bool:
        """Whether the KV cache forgets tokens that attend and do not run, once the prompt has been read."""
        return False

    @abstractmethod
    def starts(self, layers: int) -> tuple[int, ...]:
        """Of so many layers those ahead of which tokens are chosen, in order.

        Raises:
            ValueError: the language model has too few.
        """

    @abstractmethod
    def parts(self, layers: int) -> tuple[float, ...]:
        """For each of `starts`, the fraction of the image tokens that runs from there on."""

    @abstractmethod
    def scaled(self, factor: float) -> Self:
        """The same with all fractions so many times as large, but none above 1."""

    @abstractmethod
    def choose(self, ahead: Ahead) -> Tensor | Joined | None:
        """int64, which of the image tokens (0 to V - 1) run from this layer on, some perhaps as means; None: all that
        may.

        Everything is of one prompt, so that no prompt depends on others in a batch.
        """

    def mean(self, layers: int) -> float:
        """The fraction of the image tokens that run, the mean over so many layers. What methods are called after says
        something else, so compare by this."""
        starts = (*self.starts(layers), layers)
        return (starts[0] + self._later(layers)) / layers

    def _later(self, layers: int) -> float:
        """What of the image tokens runs from the first choice on, summed over layers."""
        starts, parts = (*self.starts(layers), layers), self.parts(layers)
        if len(parts) != len(starts) - 1:
            raise ValueError(
                f"{type(self).__name__} has {len(starts) - 1} starts and {len(parts)} parts; let it give one of each "
                "for every stage."
            )
        for part in parts:
            check_part("parts", part)
        return sum(part * (end - at) for part, (at, end) in zip(parts, pairwise(starts), strict=True))

    def for_mean(self, part: float, layers: int) -> Self:
        """The same with its fractions scaled so that this is its mean over so many layers.

        Raises:
            BadBudget: layers that drop nothing alone run as much.
        """
        least = self.scaled(LEAST).mean(layers)
        if part <= least:
            raise BadBudget(
                f"{type(self).__name__} drops nothing in some of {layers} layers: more than {least:.0%} of the image "
                f"tokens run on average, and {part:.1%} are asked for; let it drop in more layers (layer=, layers=, "
                "until= or pattern=), or take a larger budget."
            )
        low, high = 0.0, 1 / min(self.parts(layers))
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self.scaled(middle).mean(layers) < part else (low, middle)
        return self.scaled(high)


@dataclass(frozen=True)
class AtLayer(Pruning):
    """A part of the image tokens stays ahead of one layer; the layers before run all, and cache them.

    Args:
        keep: the fraction that stays.
        layer: ahead of which it happens.

    Raises:
        BadBudget: `keep` is no fraction.
        ValueError: `layer` is no whole number, or in use, the language model has no such layer.
    """

    keep: float
    layer: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "keep", check_part("keep", self.keep))

    def starts(self, layers: int) -> tuple[int, ...]:
        check_layer("layer", self.layer, layers)
        return (self.layer,)

    def parts(self, layers: int) -> tuple[float, ...]:
        return (self.keep,)

    def scaled(self, factor: float) -> Self:
        return replace(self, keep=min(factor * self.keep, 1.0))


@dataclass(frozen=True)
class InStages(Pruning):
    """A part of the image tokens runs from each of some layers on.

    Args:
        rates: of all image tokens, the fractions.
        layers: which layers, one number for one stage; empty: as the method says.

    Raises:
        BadBudget: a rate is no fraction.
        ValueError: rates rise where tokens do not come back, or are not as many as layers; or in use, the language
            model has too few layers.
    """

    rates: tuple[float, ...]
    layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        given: Any = self.rates
        rates = given if isinstance(given, list | tuple) else (given,)
        object.__setattr__(self, "rates", tuple(check_part("rates", rate) for rate in rates))
        object.__setattr__(self, "layers", whole_numbers(self, "layers"))
        if not self.rates or (self.layers and len(self.layers) != len(self.rates)):
            raise ValueError(
                f"{type(self).__name__} has {len(self.rates)} rates and {len(self.layers)} layers; give one of each "
                "for every stage."
            )
        if not self.comes_back and sorted(self.rates, reverse=True) != list(self.rates):
            raise ValueError(f"{type(self).__name__} drops for good, so that rates {self.rates} cannot rise.")

    def parts(self, layers: int) -> tuple[float, ...]:
        return self.rates

    def scaled(self, factor: float) -> Self:
        return replace(self, rates=tuple(min(factor * rate, 1.0) for rate in self.rates))

    def keep_of(self, ahead: Ahead) -> int:
        """How many of the image tokens run from this layer on."""
        return part_of(self.rates[self.starts(ahead.layers).index(ahead.layer)], len(ahead.shown))


def check_chosen(pruning: Pruning, chosen: Any, may: Tensor) -> None:
    """Refuse what `choose` may not answer.

    Args:
        may: bool [V], the image tokens that may be chosen.

    Raises:
        ValueError: it is none of these tokens, or one twice; or tokens are joined to one that does not run.
        BadBudget: it is nothing.
    """
    name, tokens = f"{type(pruning).__name__}.choose", len(may)
    joins = isinstance(chosen, Joined)
    for answer, least in ((chosen.rows, 0), (chosen.into, -1)) if joins else ((chosen, 0),):
        fits = isinstance(answer, Tensor) and answer.dtype == torch.int64 and answer.ndim == 1
        fits = fits and (not least or len(answer) == tokens)
        if not fits or not bool(((answer >= least) & (answer < tokens)).all()):
            raise ValueError(f"{name} must answer int64 indices of {tokens} image tokens, and answered {answer!r:.80}.")
    rows = chosen.rows if joins else chosen
    if not len(rows):
        raise BadBudget(f"{name} leaves no image token; let at least one run.")
    if len(rows.unique()) < len(rows):
        raise ValueError(f"{name} names an image token twice.")
    if not bool(may[rows].all()):
        raise ValueError(f"{name} has chosen tokens that it had dropped before.")
    if joins:
        _check_joined(pruning, chosen, may)


def _check_joined(pruning: Pruning, chosen: Joined, may: Tensor) -> None:
    """See `check_chosen`."""
    name, into = f"{type(pruning).__name__}.choose", chosen.into
    if pruning.comes_back or pruning.attends:
        raise ValueError(f"{name} joins tokens that run again or attend: answer rows alone.")
    runs = torch.zeros_like(may).index_fill(0, chosen.rows, True)
    member, centre = (into >= 0).nonzero()[:, 0], into[into >= 0]
    if not bool(runs[centre].all()) or not torch.equal(into[centre], centre):
        raise ValueError(f"{name} joins tokens to one that does not run, or that is joined to another itself.")
    if bool((runs[member] & (member != centre)).any()):
        raise ValueError(f"{name} joins a token to another and lets it run by itself, too.")
    if not bool(may[member].all()):
        raise ValueError(f"{name} joins tokens that it had dropped before.")


def check_stages(pruning: Pruning, starts: Sequence[int], layers: int) -> tuple[int, ...]:
    """The layers ahead of which stages begin.

    Raises:
        ValueError: they do not rise, or there are no such among so many.
    """
    if not isinstance(starts, Sequence):
        raise ValueError(f"{type(pruning).__name__}.starts must answer layers, such as (2,), not {starts!r}.")
    if len(starts) >= layers:
        raise ValueError(
            f"{type(pruning).__name__} has {len(starts)} stages, and this language model of {layers} layers has room "
            f"for {layers - 1}: give fewer rates."
        )
    for layer in starts:
        check_layer("layers", layer, layers)
    if sorted(set(starts)) != list(starts):
        raise ValueError(
            f"{type(pruning).__name__} cannot begin stages ahead of layers {tuple(starts)}: name rising ones."
        )
    return tuple(starts)


def check_part(name: str, part: Any) -> float:
    """A fraction, as a number of Python's own.

    Raises:
        BadBudget: it is none above 0 and up to 1.
    """
    number: Any = -1 if isinstance(part, bool) or not isinstance(part, Real) else part
    if not 0 <= number <= 1:
        raise BadBudget(f"{name}={part!r} is no fraction of the image tokens; give one from 0 to 1.")
    if not number:
        raise BadBudget(f"{name}=0 would keep no image token; take a fraction above 0.")
    return float(number)


def check_layer(name: str, layer: Any, layers: int) -> None:
    """Raises: ValueError, unless something may be chosen ahead of this layer of so many."""
    if isinstance(layer, bool) or not isinstance(layer, int) or not 0 < layer < layers:
        raise ValueError(
            f"{name}={layer!r}: image tokens can be dropped ahead of layers 1 to {layers - 1} of this language model; "
            "name one of those."
        )


def part_of(part: float, tokens: int) -> int:
    """That part of so many tokens, at least 1."""
    return max(round(part * tokens), 1)
