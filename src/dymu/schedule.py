"""How many tokens each layer of the encoder removes (paper section 4.3). Needs no torch."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable

from dymu.choices import SCHEDULES, Schedule
from dymu.errors import BadBudget, DymuError


def fewest(tokens: float, merging_layers: int, alike: bool = False) -> float:
    """The fewest of `tokens` tokens that so many merging layers leave of a picture.

    Tokens merge in pairs. Behind a class token one of an odd number has no partner, so where counts differ from picture
    to picture, half a token of the mean stays in every layer but the first.

    Args:
        alike: whether all pictures keep as many, as with a fixed number.
    """
    left: float = tokens
    for layer in range(merging_layers):
        left = left - left // 2 if alike else left - _most(left, first=layer == 0)
    return left


def fewest_of_any(tokens: int, merging_layers: int) -> int:
    """The fewest of `tokens` tokens that thresholds leave of any one picture, with or without a class token.

    It lies below `fewest`, which is of the mean: of an odd number up to one more than half may merge.
    """
    for _ in range(merging_layers):
        tokens = max(tokens // 2, 1)
    return tokens


def _most(left: float, first: bool) -> float:
    return left / 2 if first else (left - 1) / 2


def layers_to_merge_in(layers: Iterable[int], depth: int) -> tuple[int, ...]:
    """Indices of layers, each once, in rising order.

    Raises:
        DymuError: they are not some of the first `depth` layers.
    """
    try:
        layers = list(layers)
        indices = sorted({operator.index(layer) for layer in layers})
    except TypeError:
        indices = []
    if not indices or not 0 <= indices[0] <= indices[-1] < depth:
        raise DymuError(
            f"the layers to merge in, {indices or layers}, are not some of the layers 0 to {depth - 1} that feed "
            "this model; name some of those."
        )
    return tuple(indices)


def shares(schedule: Schedule | float, layers: int) -> list[float]:
    """How much each layer removes, in proportion to the others.

    Args:
        schedule: its name; or ToMe's inflection, from -1 (nothing in the last layer, and twice the mean in the first)
            over 0 (`constant`) to 1, the reverse. A layer of nothing removes what the others cannot.

    Raises:
        ValueError: it is neither.
    """
    rising = range(1, layers + 1)
    named = {"constant": [1] * layers, "linear": list(reversed(rising)), "reverse_linear": list(rising)}
    if isinstance(schedule, str) and schedule in named:
        return [float(share) for share in named[schedule]]
    if isinstance(schedule, bool) or not isinstance(schedule, int | float) or not -1 <= schedule <= 1:
        raise ValueError(
            f"unknown schedule {schedule!r}; choose one of {', '.join(SCHEDULES)}, or an inflection from -1 to 1"
        )
    return [max(1 + schedule * (2 * layer / max(layers - 1, 1) - 1), 1e-6) for layer in range(layers)]


def removals(
    tokens: float,
    keep: float,
    layers: int,
    schedule: Schedule | float,
    merging: Collection[int] | None = None,
    alike: bool = False,
) -> list[float]:
    """How many tokens each layer should remove so that `keep` of `tokens` remain.

    `constant` removes the same number everywhere, `linear` more in early layers, `reverse_linear` more in late ones
    (paper section 4.3). What a layer cannot remove (see `fewest`), the others do in proportion. Where only some layers
    are `merging`, they remove everything, in the same proportion to one another.

    Args:
        tokens: of an image; where images differ, on average.
        keep: of them in the end.
        layers: how many the encoder has.
        schedule: where to remove, see `shares`.
        merging: indices of the layers that may; None: all.
        alike: see `fewest`.

    Raises:
        ValueError: `schedule` is unknown, or `merging` names no layer or one that there is not.
        BadBudget: `keep` is more than `tokens`, or less than `fewest`.
    """
    weights = shares(schedule, layers)
    chosen = set(range(layers) if merging is None else merging)
    if not chosen or not chosen <= set(range(layers)):
        raise ValueError(f"cannot merge in layers {sorted(chosen)}; name some of 0 to {layers - 1}")
    lowest = fewest(tokens, len(chosen), alike)
    if not lowest - 1e-9 <= keep <= tokens:
        raise BadBudget(
            f"cannot keep {keep:g} of {tokens:g} tokens in {len(chosen)} layers, each of which at most halves them; "
            f"keep between {lowest:.4g} and {tokens:g}."
        )

    def removed_at(scale: float) -> list[float]:
        left, removed = float(tokens), []
        for weight in (weight if layer in chosen else 0 for layer, weight in enumerate(weights)):
            removed.append(min(scale * weight, _most(left, first=alike or left == tokens)))
            left -= removed[-1]
        return removed

    low, high = 0.0, float(tokens) / min(1.0, *weights)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(removed_at(middle)) < tokens - keep else (low, middle)
    return removed_at(high)
